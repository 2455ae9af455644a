"""The tests of several rooms share this."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.export_format import Format, Quantization
from models.ringformer import RingDecoder
from models.seq2seq import TranslationModel
from pipeline.checkpoints.folder import (
    CheckpointInfo,
    Layout,
    ValidationState,
    finish_checkpoint,
    tag_of,
)
from pipeline.publishing.exports import export
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import model_identity, untrained_model
from pipeline.translation.serving import TextTranslator
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import new_run, train


@pytest.fixture(scope="session")
def six_steps(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    """Return the run_dir of a finished training: 6 steps with dropout, 1 rank, ZeRO stage 1."""
    run_dir = new_run(prepared, "six_steps")
    codes, said = train(tiny_recipe, run_dir, log_every=1)
    assert codes == [0], said
    return run_dir


def save_checkpoint(
    model: nn.Module,
    recipe: Recipe,
    identity: Mapping[str, Any] | None = None,
    tracker_run_id: str | None = None,
) -> None:
    """Save a model as the only checkpoint of a run, as ZeRO stage 0 writes it.

    :param identity: what the weights are bound to; None: what those of a translation model are.
    """
    if identity is None:
        assert isinstance(recipe, TranslationRecipe)
        identity = model_identity(recipe)
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
        tracker_run_id=tracker_run_id,
        run_dir=str(recipe.run_dir.resolve()),
        saved_at=0,
        **layout.model_dump(),
        **identity,
    )
    finish_checkpoint(checkpoints, info, keep=1)


# ── A model that translates ─────────────────────────────────────────────────────────────────────


def talkative(model: TranslationModel) -> TranslationModel:
    """Give a model sharp random weights: there are no ties, PAD and BOS are never produced, and
    translations end by themselves, some early and some late."""
    stack: Any = model.decoder
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(model.config.model_dim, generator=generator)
    direction /= direction.norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3, generator=generator)
            elif parameter.dim() == 1 or re.search("embed|layer_norm|final_proj", name):
                parameter.mul_(2)
            else:  # fresh ones are small; now Xavier's, twice
                for matrix in parameter.view(-1, *parameter.shape[-2:]):
                    matrix.mul_(2 * (6 / sum(matrix.shape)) ** 0.5 / matrix.abs().max())
        if isinstance(stack, RingDecoder):
            assert stack.ffn_layer_norm is not None
            last_bias = stack.ffn_layer_norm[-1, 1]
        else:
            last_bias = stack.layers[-1].ffn_layer_norm.bias
        last_bias.copy_(5 * direction)  # so h · direction is about 5, always
        weight = model.final_proj.weight
        weight[[PAD_IDX, BOS_IDX]] = -20 * direction
        weight[EOS_IDX] = (2 if model.config.tied_embeddings else 1) * direction
    return model


def run_of(
    prepared: TranslationRecipe, tiny_recipe: Path, folder: Path, **overrides: str
) -> TranslationRecipe:
    """Make a finished run in `folder`, with a talkative model of these `model` keys."""
    keys = {f"model.{key}": value for key, value in overrides.items()}
    keys |= {"run_dir": str(folder), "evaluation.beam_size": "4"}
    keys["evaluation.max_length_ratio"] = "0.5"  # random weights go round in circles, near ties
    recipe = load_recipe(tiny_recipe, list(keys.items()))
    shutil.copytree(prepared.run_dir / "shards", folder / "shards")
    save_checkpoint(talkative(untrained_model(recipe)), recipe)
    return recipe


@pytest.fixture(scope="session")
def talkative_run(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> TranslationRecipe:
    """Return the recipe of a finished run with a small, talkative RingFormer."""
    return run_of(prepared, tiny_recipe, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="session")
def ctranslate2_folder(talkative_run: TranslationRecipe) -> Path:
    """Return the folder of that run's CTranslate2 export in float32."""
    return exported(talkative_run, "ctranslate2")


@pytest.fixture(scope="session")
def sentences(prepared: TranslationRecipe) -> list[str]:
    """Return sentences to translate, some of them empty."""
    text = (prepared.run_dir / "clean" / "test.de").read_text(encoding="utf-8")
    return ["", *text.splitlines(), "Ja.", "   ", "Das Haus ist 1,5 km weit weg, sagt der Mann."]


def exported(
    recipe: TranslationRecipe, format: Format, quantization: Quantization | None = None
) -> Path:
    """Export a run into a folder beside its run_dir, and return that."""
    folder = recipe.run_dir.parent / f"{recipe.run_dir.name}-{format}-{quantization}"
    export(recipe, folder, format, quantization)
    return folder


def encoded(translator: TextTranslator, sentences: Sequence[str]) -> list[list[int]]:
    """Return the source ids of those sentences that are not empty."""
    ids = translator.source_vocabulary.encode(list(sentences), add_eos=True)
    return [tokens for tokens in ids if len(tokens) > 1]
