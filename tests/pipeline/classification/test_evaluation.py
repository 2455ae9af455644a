"""Scores of a classifier belong to the weights, the images and the sizes that gave them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.images.prepare import prepare_images
from data_prep.images.shards import ImageReader, read_images_manifest
from models.export_format import SETTINGS, ModelError
from pipeline.checkpoints.folder import CheckpointError
from pipeline.classification.classifier import TorchClassifier, settings_of_run
from pipeline.classification.run_model import checkpoints_of_run, model_for, model_identity
from pipeline.classification.serving import OnnxClassifier
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.images import evaluate_images, images_digest, scores_of
from pipeline.publishing.image_exports import export_classifier
from pipeline.recipe import UsageError, slug_of
from pipeline.recipe_file import load_recipe
from tests.pipeline.conftest import save_checkpoint


def recipe_of(bars: Path, run_dir: Path, **changes: str) -> ClassificationRecipe:
    """Return the recipe of bars with other keys of `data`, prepared in a run of its own."""
    keys = [(f"data.{key}", value) for key, value in changes.items()]
    recipe = load_recipe(bars, [("run_dir", str(run_dir)), *keys], kind=ClassificationRecipe)
    prepare_images(recipe.data, recipe.run_dir)
    return recipe


@pytest.fixture
def run(bars: Path, prepared_bars: ClassificationRecipe, tmp_path: Path) -> ClassificationRecipe:
    """Return a run with one checkpoint, of random weights."""
    recipe = recipe_of(bars, tmp_path / "run")
    model = model_for(recipe, read_images_manifest(recipe.shards))
    save_checkpoint(model, recipe, model_identity(recipe))
    return recipe


def test_an_export_is_scored_on_images_of_its_size_only(
    bars: Path, run: ClassificationRecipe, tmp_path: Path
) -> None:
    export_classifier(run, tmp_path / "export", "onnx")
    assert evaluate_images(run, tmp_path / "export").results[0].size == 60
    others = recipe_of(bars, tmp_path / "others", stored_size="16")
    with pytest.raises(CheckpointError, match=r"scaled to 14 pixels, and those of .* to 16"):
        evaluate_images(others, tmp_path / "export")


def test_a_graph_that_is_not_what_its_settings_say_is_refused(
    run: ClassificationRecipe, tmp_path: Path
) -> None:
    export_classifier(run, tmp_path / "export", "onnx")
    path = tmp_path / "export" / SETTINGS
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "classes": settings["classes"][:2]}))
    with pytest.raises(ModelError, match=r"model\.onnx is of another model"):
        OnnxClassifier(tmp_path / "export")


def test_a_path_of_any_bytes_comes_back(
    bars: Path, run: ClassificationRecipe, tmp_path: Path
) -> None:
    export_classifier(run, tmp_path / "export", "onnx")
    strange = os.fsencode(tmp_path) + b"/\xff\n.png"
    shutil.copyfile(bars.parent / "data" / "test" / "down" / "00.png", strange)
    options = ["--config", str(bars), "--model", str(tmp_path / "export")]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.classify", strange, *options],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(strange.replace(b"\n", rb"\n") + b"\t")


def test_scores_of_other_test_images_are_not_told_on_the_card(
    bars: Path, run: ClassificationRecipe, tmp_path: Path
) -> None:
    evaluate_images(run)
    checkpoints = checkpoints_of_run(run)
    found = scores_of(run, checkpoints)
    assert found["images"] == 60
    shutil.copytree(run.data.root, tmp_path / "data")
    (tmp_path / "data" / "test" / "down" / "00.png").unlink()
    fewer = recipe_of(bars, run.run_dir, root=str(tmp_path / "data"))
    assert scores_of(fewer, checkpoints) == {}
    evaluate_images(fewer)
    assert scores_of(fewer, checkpoints)["images"] == 59


def test_names_of_a_test_set_stay_in_their_folder(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="validation must not be called validation: the valid"):
        recipe_of(bars, tmp_path, **{"test.name": "validation"})
    assert slug_of("..") == "-"
    assert slug_of("ü/тест") == "ü-тест"


def test_images_that_were_left_out_make_another_test_set(bars: Path, tmp_path: Path) -> None:
    """Of the same files one run takes half and another one the rest."""
    data = tmp_path / "data"
    shutil.copytree(bars.parent / "data", data)
    for path in data.glob("*/*/*[13579].png"):
        Image.open(path).resize((15, 15)).save(path)
    digests = set()
    for size in ("14", "15"):
        keys = {"root": str(data), "stored_size": size, "wrong_size": "refuse", "valid_images": "9"}
        recipe = recipe_of(bars, tmp_path / size, **keys)
        for split in ("valid", "test"):
            reader = ImageReader(recipe.shards, split)
            digests.add((split, len(reader), images_digest(reader.data, split)))
    assert [size for _, size, _ in sorted(digests)] == [30, 30, 9, 9]


def test_a_diverged_model_is_named(bars: Path, run: ClassificationRecipe, tmp_path: Path) -> None:
    image = bars.parent / "data" / "test" / "down" / "00.png"
    model = model_for(run, read_images_manifest(run.shards))
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="output is not a number"):
        TorchClassifier(model, settings_of_run(run)).classify(image)
    shutil.rmtree(run.checkpoints)
    save_checkpoint(model, run, model_identity(run))
    with pytest.raises(CheckpointError, match="not all weights are numbers; training has diverged"):
        export_classifier(run, tmp_path / "export", "onnx")
