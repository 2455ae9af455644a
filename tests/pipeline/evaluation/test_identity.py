"""What is said of a model and its scores is what they were made from, whatever the recipe says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.files import DataError
from models.export_format import SETTINGS
from pipeline.checkpoints.folder import CheckpointError
from pipeline.evaluation.evaluator import evaluate
from pipeline.publishing.exports import export
from pipeline.publishing.model_card import model_card
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import checkpoints_of_run, untrained_model
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.conftest import save_checkpoint


def nudge(module: nn.Module) -> None:
    """Change the weights of a layer."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.add_(0.01)


@pytest.fixture(scope="module")
def run(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> TranslationRecipe:
    """A run with one checkpoint, of random weights."""
    run_dir = tmp_path_factory.mktemp("identity") / "run"
    shutil.copytree(prepared.run_dir, run_dir)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    recipe = load_recipe(tiny_recipe, [("run_dir", str(run_dir)), ("training.warmup_steps", "50")])
    save_checkpoint(untrained_model(recipe), recipe)
    return recipe


def to_folder(recipe: TranslationRecipe) -> None:
    export(recipe, recipe.run_dir / "other-export")


LATER: dict[str, Callable[[TranslationRecipe], object]] = {
    "train": lambda recipe: TranslationTask(recipe).check_recipe(),
    "evaluate": evaluate,
    "export": to_folder,
    "translate": checkpoints_of_run,
}


@pytest.mark.parametrize("stage", LATER)
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.test.name": "other"}, "data.test.name 'toy-test', the recipe says 'other'"),
        ({"data.test.source": "gone.de"}, "data.test.source 'toy/test.de', the recipe says"),
        ({"data.source_lang": "en", "data.target_lang": "de"}, "data.source_lang 'de', the"),
        ({"data.max_tokens_per_side": "60"}, "data.max_tokens_per_side 64, the recipe says 60"),
        ({"data.vocabulary.size": "310"}, "data.vocabulary.size 300, the recipe says 310"),
        ({"data.toy_corpus.train": "700"}, "data.toy_corpus.train 600, the recipe says 700"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_stage_refuses_a_recipe_that_says_otherwise(
    run: TranslationRecipe, tiny_recipe: Path, stage: str, overrides: dict[str, str], said: str
) -> None:
    settings = [("run_dir", str(run.run_dir)), *overrides.items()]
    with pytest.raises(DataError) as error:
        LATER[stage](load_recipe(tiny_recipe, settings))
    assert said in str(error.value)
    assert "./run.sh prepare" in str(error.value)
    assert not (run.run_dir / "other-export").exists()


def test_a_command_says_so_in_one_line(
    run: TranslationRecipe, tiny_recipe: Path, command: Command
) -> None:
    options = ["--config", tiny_recipe, "--run_dir", run.run_dir, "--data.test.name", "other"]
    done = command("pipeline.train", "--steps_left", *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "data.test.name 'toy-test', the recipe says 'other'" in line


def test_an_export_of_other_languages_is_not_evaluated(
    run: TranslationRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    export(run, folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(
        json.dumps({**settings, "source_lang": "en", "target_lang": "de"})
    )
    with pytest.raises(CheckpointError, match="translates en to de, the recipe says"):
        evaluate(run, folder)


def test_an_export_is_its_files(run: TranslationRecipe, tmp_path: Path) -> None:
    """Also where the name stays, and manifest.json."""
    folder, training = tmp_path / "export", run.training.model_copy(update={"warmup_steps": 51})
    other = run.model_copy(update={"run_dir": tmp_path / "run", "training": training})
    export(run, folder)
    scores = evaluate(run, folder).results[0].scores
    assert scores["in_training_text"] == {"sources": 0, "references": 0}
    assert evaluate(run, folder).missing == []
    shutil.copytree(run.run_dir, other.run_dir)
    shutil.rmtree(other.checkpoints)
    save_checkpoint(untrained_model(other).apply(nudge), other)
    export(other, tmp_path / "other")
    for name in ("model.bin", "model.safetensors"):
        if (folder / name).exists():
            shutil.copy(tmp_path / "other" / name, folder / name)
    again = evaluate(run, folder)
    assert again.results[0].fingerprint != scores["fingerprint"]
    # It has learnt from what the other run has, and is not the model of this one.
    theirs = evaluate(run, tmp_path / "other").results[0].scores
    assert theirs["in_training_text"] is None


def test_a_card_says_what_the_model_was_trained_with(
    run: TranslationRecipe, tiny_recipe: Path
) -> None:
    """Not what the command line says by now."""
    now = load_recipe(
        tiny_recipe,
        [
            ("run_dir", str(run.run_dir)),
            ("training.warmup_steps", "150"),
            ("training.label_smoothing", "0.3"),
            ("training.seed", "7"),
        ],
    )
    card = model_card(now, checkpoints_of_run(now))
    assert "50 steps of warm-up" in card
    assert "150 steps" not in card
    assert "| dropout, label smoothing | 0.1, 0 |" in card
    assert "| seed | 1 |" in card
