"""These tests count operations by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.config import ModelConfig, VisionConfig
from models.count import Lengths, count_classifier, count_recipe, count_translation
from models.image_classifier import ImageShape
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe_file import load_recipe
from tests.conftest import ROOT, Command

D, M, N, H, C = 32, 64, 3, 4, 10  # width, hidden width, levels, heads, classes
VISION = {
    "model_dim": D, "num_heads": H, "ffn_inner_dim": M, "num_levels": N, "patch_size": 7,
}  # fmt: skip
RANKS = {"attention_signal_rank": 3, "ffn_signal_rank": 5}
S = 1 + 4 * 4  # positions of a 28 × 28 image
AROUND = 2 * 16 * D * 7 * 7 + 2 * D * C  # a product with each patch; the head reads one position
# A layer's four d × d projections and two d × m, then scores and their products with values.
VIT_LAYER = 2 * S * (4 * D * D + 2 * D * M) + 2 * (2 * S * S * D)
# B and A of q, k and v, whose A is a matrix with three on its diagonal; then those of the FFN.
SIGNALS = 2 * S * (9 * D + 9 * 3 * D + 2 * 5 * D)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "transformer"}, N * VIT_LAYER),
        (RANKS, N * (VIT_LAYER + SIGNALS)),
        ({"level_signals": "static"}, N * VIT_LAYER),
        ({"architecture": "universal"}, N * VIT_LAYER),
        ({"architecture": "one_wide_ffn"}, N * VIT_LAYER),
    ],
)
def test_operations_of_a_classifier(changes: dict[str, object], expected: int) -> None:
    config = VisionConfig.model_validate({**VISION, **changes})
    assert count_classifier(config, ImageShape(1, 28), C).flops == AROUND + expected


@pytest.mark.parametrize(
    ("architecture", "keys_and_values"), [("transformer", N), ("ringformer", 1)]
)
def test_operations_of_a_translation(architecture: str, keys_and_values: int) -> None:
    """Folded signals cost nothing; a ring projects the encoder's output to keys and values once."""
    source, target, vocab = 40, 30, 50
    config = ModelConfig.model_validate(
        {"architecture": architecture, "model_dim": D, "num_heads": H, "ffn_inner_dim": M,
         "num_levels": N}
    )  # fmt: skip
    encoder = 2 * source * (4 * D * D + 2 * D * M) + 2 * (2 * source * source * D)
    decoder = 2 * target * (4 * D * D + 2 * D * M) + 2 * (2 * target * target * D)
    cross = 2 * target * 2 * D * D + 2 * (2 * target * source * D)
    expected = N * (encoder + decoder + cross) + keys_and_values * 2 * source * 2 * D * D
    expected += 2 * target * D * vocab
    counts = count_translation(config, (vocab, vocab), Lengths(source, target))
    assert counts.flops == expected


def test_parameters_of_the_parts_are_all() -> None:
    counts = count_classifier(
        VisionConfig.model_validate({**VISION, **RANKS}), ImageShape(1, 28), C
    )
    parts = counts.parts
    assert parts["patches"] == 7 * 7 * D + D
    assert parts["class_token"] == D
    assert parts["head"] == D * C + C
    assert sum(parts.values()) == counts.total
    assert counts.core == parts["encoder"] + parts["final_layer_norm"]
    base = count_translation(ModelConfig(), (100, 100), Lengths(32, 32))
    assert base.core == 8_943_616
    assert base.total == base.core + 100 * 512  # one matrix of embeddings, tied


@pytest.mark.slow
def test_the_command_counts_a_recipe(command: Command) -> None:
    wmt = "--config", ROOT / "recipes" / "wmt14_de_en.yaml"
    done = command("models.count", *wmt)
    assert done.returncode == 0, done.stderr
    assert "8,943,616" in done.stdout
    assert "44,070,912" in done.stdout
    done = command("models.count", *wmt, "--model.level_signals", "none")
    assert done.returncode == 0, done.stderr
    assert "7,370,752" in done.stdout


def recipe_of(folder: Path, **data: object) -> Path:
    data |= {"train": [{"name": "some", "folder": "train"}], "valid_images": 9}
    data |= {"test": {"name": "others", "folder": "test"}, "image_size": 32}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"task": "classification", "run_dir": str(folder), "data": data}))
    return file


def test_a_recipe_names_its_classes(tmp_path: Path) -> None:
    file = recipe_of(tmp_path, classes=["cat", "dog"])
    recipe = load_recipe(file, kind=ClassificationRecipe)
    ours, transformer = count_recipe(recipe, Lengths(32, 32), None)
    assert ours.parts["head"] == 2 * 512 + 2
    assert ours.flops > transformer.flops  # by the level signals


@pytest.mark.slow
def test_somebody_says_how_many_classes_there_are(command: Command, tmp_path: Path) -> None:
    file = recipe_of(tmp_path)
    done = command("models.count", "--config", file)
    assert done.returncode == 2
    assert done.stderr == (
        "count: error: data.classes names none; say with --classes how many there are\n"
    )
    done = command("models.count", "--config", file, "--classes", 1000)
    assert done.returncode == 0, done.stderr
    assert "513,000" in done.stdout  # the head
