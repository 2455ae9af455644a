"""A decoder that was trained at random depths translates with fewer levels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.ringformer import RingDecoder
from pipeline.evaluation.evaluator import evaluate
from pipeline.publishing.exports import export
from pipeline.recipe import ROOT, UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import checkpoints_of_run, model_of_run
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.ranks import new_run, tracked, train, weights

pytestmark = pytest.mark.slow

AT_RANDOM = {"random_depth": "true", "log_every": 1, "max_steps": 4, "validate_every": 4}


@pytest.fixture(scope="module")
def run_dir(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    run_dir = new_run(prepared, "random-depth", "clean")
    codes, said = train(tiny_recipe, run_dir, **AT_RANDOM)
    assert codes == [0], said
    return run_dir


def recipe_of(tiny_recipe: Path, run_dir: Path, **evaluation: object) -> TranslationRecipe:
    keys = {f"evaluation.{key}": str(value) for key, value in evaluation.items()}
    return load_recipe(tiny_recipe, [("run_dir", str(run_dir)), *keys.items()])


def test_depths_are_a_micro_batchs_own(
    prepared: TranslationRecipe, tiny_recipe: Path, run_dir: Path
) -> None:
    """Neither ranks nor checkpoints change them, and without them it is another training. ZeRO 2
    adds gradients up in the order in which ranks have them, each at its depth."""
    others = {}
    zero2 = ROOT / "ds_configs" / "zero2.json"
    for name, ranks, more in (
        ("shared", 2, {"activation_checkpointing.levels": 1, "deepspeed_config": zero2}),
        ("whole", 1, {"random_depth": "false"}),
    ):
        others[name] = new_run(prepared, f"random-depth-{name}")
        codes, said = train(tiny_recipe, others[name], ranks=ranks, **{**AT_RANDOM, **more})
        assert codes == [0] * ranks, said
    expected = tracked(run_dir, "train_loss")
    assert tracked(others["shared"], "train_loss") == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(run_dir).items():
        torch.testing.assert_close(weights(others["shared"])[name], tensor, rtol=1e-4, atol=1e-5)
    assert tracked(others["whole"], "train_loss") != pytest.approx(expected, rel=1e-4)


def test_fewer_levels_translate(tiny_recipe: Path, run_dir: Path, tmp_path: Path) -> None:
    found = {}
    for levels in (1, 3):
        recipe = recipe_of(tiny_recipe, run_dir, decoder_levels=levels)
        model = model_of_run(recipe, checkpoints_of_run(recipe))
        assert isinstance(model.decoder, RingDecoder)
        assert model.decoder.num_levels == levels
        (result,) = evaluate(recipe).results
        assert result.scores["decoder_levels"] == levels
        found[levels] = result.scores["fingerprint"], model
        for format in ("safetensors", "ctranslate2"):
            folder = tmp_path / f"{format}-{levels}"
            export(recipe, folder, format)
            settings = json.loads((folder / "export.json").read_text())
            assert settings["model"]["decoder_levels"] == levels
            assert f"| 3 and {levels} |" in (folder / "README.md").read_text()
    (first, one), (second, three) = found.values()
    assert first != second
    source, target = torch.randint(4, 300, (2, 7)), torch.randint(4, 300, (2, 5))
    layouts = three.layout(source), three.layout(target)
    three.eval(), one.eval()
    expected = three.forward(source, layouts[0], target, layouts[1], decoder_levels=1)
    torch.testing.assert_close(one.logits(source, target), expected)


def test_others_do_not(tiny_recipe: Path, six_steps: Path, command: Command) -> None:
    """Whoever was trained otherwise is known by the checkpoint, whatever the recipe says now."""
    recipe = recipe_of(tiny_recipe, six_steps, decoder_levels=2)
    lying = recipe.training.model_copy(update={"random_depth": True})
    for each in (recipe, recipe.model_copy(update={"training": lying})):
        with pytest.raises(UsageError, match=r"decoder_levels \(2\) is less .*random_depth"):
            checkpoints_of_run(each)
    keys = ["--config", tiny_recipe, "--run_dir", six_steps, "--evaluation.decoder_levels"]
    early = command("pipeline.train", *keys, 2, "--steps_left")
    assert early.returncode == 2
    assert "training.random_depth" in early.stderr
    too_many = command("pipeline.evaluate", *keys, 4)
    assert too_many.returncode == 2
    assert "exceeds model.decoder_levels (3)" in too_many.stderr
