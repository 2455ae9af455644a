"""Tests of image classification share this: a folder of bars, its recipe, and a trained run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images.prepare import prepare_images
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe_file import load_recipe
from tests.pipeline.ranks import finish, options, start

CLASSES = ("across", "down", "slanting")
SIDE = 12

RECIPE = """
run_dir: {folder}/run
task: classification
data:
  root: {folder}/data
  train: [{{name: bars, folder: train}}]
  valid_images: 30
  test: {{name: bars-test, folder: test}}
  image_size: 12
  stored_size: 14
  channels: 1
  images_per_piece: 40
  images_per_shard: 50
  workers: 1
model:
  model_dim: 32
  num_heads: 4
  ffn_inner_dim: 64
  num_levels: 3
  patch_size: 4
training:
  max_steps: 30
  batch_size: 24
  micro_batch_size: 12
  learning_rate: 5e-3
  warmup_steps: 5
  augmentation: [{{transform: crop, padding: 1}}, {{transform: erase}}]
  log_every: 5
  validate_every: 10
  checkpoint_every: 10
tracking:
  experiment: teams/bars
"""


def bar(kind: str, draw: np.random.Generator) -> Image.Image:
    """Return a bright bar somewhere on noise."""
    pixels = draw.integers(0, 90, (SIDE + 2, SIDE + 2))
    place = int(draw.integers(3, SIDE - 1))
    if kind == "across":
        pixels[place] = 250
    elif kind == "down":
        pixels[:, place] = 250
    else:
        np.fill_diagonal(pixels[:, max(0, place - 6) :], 250)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a folder of bars, 40 of each kind to train on, 20 to test."""
    folder, draw = tmp_path_factory.mktemp("bars"), np.random.default_rng(1)
    for split, count in (("train", 40), ("test", 20)):
        for kind in CLASSES:
            place = folder / "data" / split / kind
            place.mkdir(parents=True)
            for number in range(count):
                bar(kind, draw).save(place / f"{number:02d}.png")
    path = folder / "bars.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def prepared_bars(bars: Path) -> ClassificationRecipe:
    """Return the recipe, with its images prepared in run_dir."""
    recipe = load_recipe(bars, kind=ClassificationRecipe)
    prepare_images(recipe.data, recipe.run_dir)
    return recipe


@pytest.fixture(scope="session")
def trained_bars(bars: Path, prepared_bars: ClassificationRecipe) -> ClassificationRecipe:
    """Return the recipe, trained to the end by one rank."""
    log = bars.parent / "log"
    processes = start(options(bars, prepared_bars.run_dir), log, ranks=1)
    assert finish(processes) == [0], log.read_text()
    return prepared_bars
