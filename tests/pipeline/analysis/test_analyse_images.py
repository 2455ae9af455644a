"""`./run.sh analyse` on image classifiers: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.images.prepare import prepare_images
from data_prep.images.shards import read_images_manifest
from models.export_format import WEIGHTS, write_settings, write_weights
from models.image_classifier import ImageClassifier
from pipeline.analysis.distance import patch_distances
from pipeline.analysis.examples import Settings
from pipeline.analysis.report import Report
from pipeline.classification.classifier import settings_of_run
from pipeline.classification.run_model import model_for, model_identity
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import UsageError
from tests.data_prep.images.small_sets import FOLDER_SETS, SIZE, write_folders
from tests.pipeline.conftest import save_checkpoint

ALL = Settings(examples=512, head=None, show=None)


def run_of(root: Path, run_dir: Path, **model: Any) -> ClassificationRecipe:
    """Make a run with images of 8 × 8 pixels and a classifier with random weights."""
    sizes = {"model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 3, "patch_size": 2}
    recipe = ClassificationRecipe.model_validate(
        {
            "task": "classification",
            "run_dir": run_dir,
            "data": {"root": root, "image_size": SIZE, "workers": 1, **FOLDER_SETS},
            "model": {**sizes, **model},
        }
    )
    run_dir.mkdir()
    prepare_images(recipe.data, run_dir)
    save_checkpoint(untrained(recipe), recipe, model_identity(recipe))
    return recipe


def untrained(recipe: ClassificationRecipe) -> ImageClassifier:
    torch.manual_seed(0)
    model = model_for(recipe, read_images_manifest(recipe.shards))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folders(folder)
    return folder


@pytest.fixture(scope="module")
def ring(root: Path) -> ClassificationRecipe:
    return run_of(root, root / "ring")


def analysed(recipe: ClassificationRecipe, against: Path | None = None) -> dict[str, Any]:
    """Return the JSON of each analysis, by its name."""
    report = Report.of(recipe, against, ALL)
    report.bring_up_to_date()
    assert report.up_to_date
    return {
        path.stem: json.loads(path.read_text()) for path in report.files if path.suffix == ".json"
    }


def test_a_ring_alone(ring: ClassificationRecipe) -> None:
    found = analysed(ring)
    names = ["cka", "attention_distance", "state_similarity", "signals", "attention_class_token"]
    assert list(found) == [*names, "analysis"]
    assert found["cka"]["examples"] == 8
    matrix = np.array(found["cka"]["stacks"]["encoder"])
    np.testing.assert_allclose(matrix.diagonal(), 1)
    distances = found["attention_distance"]["models"]["ring"]["encoder"]
    assert np.shape(distances["levels"]) == (3, 2)
    np.testing.assert_allclose(distances["levels"], distances["uniform"], rtol=0.2)
    assert distances["uniform"] == pytest.approx(patch_distances(4, 4, 2).mean().item(), abs=1e-4)
    assert list(found["signals"]["stacks"]["encoder"]) == ["q", "k", "v", "ffn"]
    images = found["attention_class_token"]["images"]
    assert {image["class"] for image in images} <= {"cat", "dog"}
    for image in images:
        levels = np.array(image["levels"])
        assert levels.shape == (3, 4, 4)
        assert (levels.sum((1, 2)) < 1).all()  # the class token looks at itself too


def test_against_a_transformer_with_other_patches(ring: ClassificationRecipe, root: Path) -> None:
    other = run_of(root, root / "plain", architecture="transformer", patch_size=4, num_levels=2)
    recipe = root / "plain.yaml"
    recipe.write_text(json.dumps(other.model_dump(mode="json")))
    found = analysed(ring, recipe)
    assert np.shape(found["cka"]["stacks"]["encoder"]) == (4, 3)
    assert set(found["attention_distance"]["models"]) == {"ring", "plain"}


def exported(recipe: ClassificationRecipe, folder: Path, **changes: Any) -> Path:
    """Write a run's classifier as an export."""
    folder.mkdir()
    write_weights(untrained(recipe), folder)
    write_settings(folder, settings_of_run(recipe).model_copy(update=changes))
    return folder


def test_against_exports(ring: ClassificationRecipe, tmp_path: Path) -> None:
    found = analysed(ring, exported(ring, tmp_path / "same"))
    matrix = np.array(found["cka"]["stacks"]["encoder"])
    np.testing.assert_allclose(matrix.diagonal(), 1, atol=1e-5)
    (tmp_path / "elsewhere").mkdir()
    namesake = exported(ring, tmp_path / "elsewhere" / "same")
    weights = namesake / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match="would be called the same: rename one of the two"):
        analysed(ring, namesake)
    with pytest.raises(UsageError, match="its classes or images are not those of"):
        analysed(ring, exported(ring, tmp_path / "cows", classes=["cat", "cow"]))
    with pytest.raises(UsageError, match="export with `--format safetensors`"):
        analysed(ring, exported(ring, tmp_path / "onnx", format="onnx"))


def test_wrong_settings_leave_what_is_there(ring: ClassificationRecipe) -> None:
    analysed(ring)
    for wrong in (ALL._replace(show=99), ALL._replace(examples=1)):
        with pytest.raises(UsageError, match="validation set"):
            Report.of(ring, None, wrong).bring_up_to_date()
    assert Report.of(ring, None, ALL).up_to_date


def test_a_recipe_of_another_task_is_refused(ring: ClassificationRecipe, tiny_recipe: Path) -> None:
    with pytest.raises(UsageError, match="for translation, this one is for classification"):
        analysed(ring, tiny_recipe)
