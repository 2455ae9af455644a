"""Ranks that do not divide the micro-batches, and more ranks than micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.recipe import ROOT
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import new_run, tracked, train, weights

pytestmark = pytest.mark.slow

THREE_MICRO_BATCHES = {"max_tokens": 1536, "log_every": 1, "max_steps": 4, "validate_every": 4}


@pytest.fixture(scope="module")
def alone(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    run_dir = new_run(prepared, "alone")
    codes, said = train(tiny_recipe, run_dir, **THREE_MICRO_BATCHES)
    assert codes == [0], said
    return run_dir


@pytest.mark.parametrize("ranks", [2, 5])
def test_any_number_of_ranks_trains_the_same(
    prepared: TranslationRecipe, tiny_recipe: Path, alone: Path, ranks: int
) -> None:
    """With dropout: its masks are a micro-batch's, whoever works on it. At ZeRO stage 2, where
    gradients are added up in the order in which each rank has them."""
    run_dir = new_run(prepared, f"shared-by-{ranks}")
    codes, said = train(
        tiny_recipe, run_dir, "--deepspeed_config", ROOT / "ds_configs" / "zero2.json",
        ranks=ranks, **THREE_MICRO_BATCHES,
    )  # fmt: skip
    assert codes == [0] * ranks, said
    ours, theirs = tracked(run_dir, "train_loss"), tracked(alone, "train_loss")
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run_dir)[name], tensor, rtol=1e-4, atol=1e-5)
    idle = "2 of 5 ranks have nothing to do: a global batch has 3 micro-batch(es)"
    assert said.count(idle) == (ranks == 5)
    assert said.count("training.micro_batch_tokens 256") == (ranks == 5)  # 1536 over 6
