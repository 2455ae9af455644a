"""The estimate's arithmetic gives what can be counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.text import PAD_IDX
from models.config import ActivationCheckpointing
from models.factory import abstract_model, create_model
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.estimate import (
    Parameters,
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
    counted = abstract_model(config, (1000, 1000)).parameter_counts
    assert counted.total == sum(p.numel() for p in model.parameters())


def test_every_zero_stage_shards_more_and_sends_what_it_must() -> None:
    each = Parameters(100, 100)
    whole = 4 + 4 + 8
    assert [sum(state_bytes(each, stage, 1, "fp32")) for stage in range(4)] == [100 * whole] * 4
    sharded = [sum(state_bytes(each, stage, 4, "fp32")) / 100 for stage in range(4)]
    assert sharded == [16, 4 + 4 + 2, 4 + 1 + 2, 4]
    assert sum(state_bytes(each, 3, 4, "fp16")) * 4 == 100 * (2 + 2 + 12)
    assert sum(state_bytes(each, 3, 4, "bf16")) * 4 == 100 * (2 + 4 + 12)  # summed in float32
    assert sum(state_bytes(each, 1, 4, "bf16")) == 100 * (2 + 2 + 12 / 4)
    assert [sent_bytes(each, stage, 1, "fp32", 1) for stage in range(4)] == [0] * 4
    assert [sent_bytes(each, stage, 2, "fp32", 3) for stage in range(4)] == [400, 400, 800, 1800]
    assert [sent_bytes(each, stage, 2, "bf16", 3) for stage in (1, 2, 3)] == [300, 700, 1200]


def test_what_is_frozen_has_neither_gradients_nor_moments() -> None:
    part = Parameters(100, 10)
    assert state_bytes(part, 1, 1, "fp32") == (400, 40, 80)
    assert sum(state_bytes(part, 3, 4, "bf16")) * 4 == 100 * 2 + 10 * (4 + 12)
    assert [sent_bytes(part, stage, 2, "fp32", 3) for stage in range(4)] == [40, 40, 80, 1260]
    whole, frozen = (
        needs_of(load_recipe(QUICKSTART, keys), torch.float32)
        for keys in ([], [("training.freeze", "[encoder]")])
    )
    assert frozen.parameters.all == whole.parameters.all == whole.parameters.trained
    assert 0 < frozen.parameters.trained < frozen.parameters.all
    assert frozen.activations < whole.activations


def test_sentences_are_no_longer_than_the_model_takes() -> None:
    recipe = load_recipe(
        QUICKSTART, [("model.max_seq_len", "16"), ("data.max_tokens_per_side", "16")]
    )
    assert needs_of(recipe, torch.float32).activations > 0


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
