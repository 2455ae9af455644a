"""The estimate's arithmetic gives what can be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.text import PAD_IDX
from models.config import ActivationCheckpointing
from models.factory import create_model, parameter_count
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.estimate import (
    activations_per_image,
    activations_per_token,
    needs_of,
    sent_bytes,
    state_bytes,
)
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from tests.conftest import Command

QUICKSTART, IMAGES = Path("recipes/quickstart.yaml"), Path("recipes/fashion_mnist.yaml")
CLASSES = 10


def test_parameters_are_counted_without_making_them() -> None:
    config = load_recipe(QUICKSTART).model
    model = create_model(config, (1000, 1000), PAD_IDX)
    assert parameter_count(config, (1000, 1000)) == sum(p.numel() for p in model.parameters())


def test_every_zero_stage_shards_more_and_sends_what_it_must() -> None:
    whole = 4 + 4 + 8
    assert [sum(state_bytes(100, stage, 1, "fp32")) for stage in range(4)] == [100 * whole] * 4
    sharded = [sum(state_bytes(100, stage, 4, "fp32")) / 100 for stage in range(4)]
    assert sharded == [16, 4 + 4 + 2, 4 + 1 + 2, 4]
    assert sum(state_bytes(100, 3, 4, "fp16")) * 4 == 100 * (2 + 2 + 12)
    assert sum(state_bytes(100, 3, 4, "bf16")) * 4 == 100 * (2 + 4 + 12)  # summed in float32
    assert sum(state_bytes(100, 1, 4, "bf16")) == 100 * (2 + 2 + 12 / 4)
    assert [sent_bytes(100, stage, 1, "fp32", 1) for stage in range(4)] == [0] * 4
    assert [sent_bytes(100, stage, 2, "fp32", 3) for stage in range(4)] == [400, 400, 800, 1800]
    assert [sent_bytes(100, stage, 2, "bf16", 3) for stage in (1, 2, 3)] == [300, 700, 1200]


def test_checkpoints_keep_a_part_of_the_activations() -> None:
    none, every_level = (
        activations_per_token(
            load_recipe(QUICKSTART, [("training.activation_checkpointing.levels", levels)]),
            torch.float32,
        )
        for levels in ("0", "1")
    )
    # At the least a level's input of each stack.
    assert 2 * 3 * 128 * 4 <= every_level < 0.2 * none


def test_images_keep_what_enters_a_level() -> None:
    recipe = load_recipe(IMAGES, kind=ClassificationRecipe)
    training = recipe.training.model_copy(
        update={"activation_checkpointing": ActivationCheckpointing(levels=1)}
    )
    every_level = activations_per_image(
        recipe.model_copy(update={"training": training}), CLASSES, torch.float32
    )
    one_level = 50 * 128 * 4  # bytes, of a class token and 49 patches
    assert 4 * one_level <= every_level < 6 * one_level
    assert activations_per_image(recipe, CLASSES, torch.float32) > 5 * every_level
    half = activations_per_image(recipe, CLASSES, torch.bfloat16)
    assert 2 * half == activations_per_image(recipe, CLASSES, torch.float32)


def test_nobody_says_how_many_classes_there_are(tmp_path: Path) -> None:
    recipe = load_recipe(IMAGES, [("run_dir", str(tmp_path))], kind=ClassificationRecipe)
    folders = recipe.data.model_copy(update={"classes": None})
    with pytest.raises(UsageError, match="prepare` finds out how many"):
        needs_of(recipe.model_copy(update={"data": folders}), torch.float32)


@pytest.mark.slow
def test_command(command: Command) -> None:
    done = command("pipeline.estimate", "--config", IMAGES, "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert "2 GPUs; a global batch of 128 images is 1 × 128 images a GPU, and 1 GPUs" in done.stdout
    done = command("pipeline.estimate", "--nodes", 2, "--gpus", 4)
    assert done.returncode == 0, done.stderr
    assert ", 16 bits\n8 GPUs; a global batch of 512 tokens" in done.stdout  # not as on this CPU
    assert command("pipeline.estimate", "--nodes", 0).returncode == 2
