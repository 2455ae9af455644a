"""The tests of several rooms share this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.seq2seq import TranslationModel
from pipeline.checkpoints.folder import (
    CheckpointInfo,
    Layout,
    ValidationState,
    finish_checkpoint,
    tag_of,
)
from pipeline.recipe import Recipe
from pipeline.translation.run_model import model_identity
from tests.pipeline.ranks import new_run, train


@pytest.fixture(scope="session")
def six_steps(prepared: Recipe, tiny_recipe: Path) -> Path:
    """Return the run_dir of a finished training: 6 steps with dropout, 1 rank, ZeRO stage 1."""
    run_dir = new_run(prepared, "six_steps")
    codes, said = train(tiny_recipe, run_dir, log_every=1)
    assert codes == [0], said
    return run_dir


def save_checkpoint(model: TranslationModel, recipe: Recipe) -> None:
    """Save a model as the only checkpoint of a run, as ZeRO stage 0 writes it."""
    checkpoints = recipe.checkpoints
    (checkpoints / tag_of(1)).mkdir(parents=True)
    weights = {"module": model.state_dict()}
    torch.save(weights, checkpoints / tag_of(1) / "mp_rank_00_model_states.pt")
    layout = Layout(zero_stage=0, world_size=1, precision="fp32", offload=False)
    info = CheckpointInfo(
        step=1,
        training=recipe.training.model_dump(mode="json"),
        steps_per_epoch=1,
        validation=ValidationState(criterion="valid_loss"),
        tracker_run_id=None,
        saved_at=0,
        **layout.model_dump(),
        **model_identity(recipe),
    )
    finish_checkpoint(checkpoints, info, keep=1)
