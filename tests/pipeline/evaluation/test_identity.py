"""What is said of a model and its scores is what they were made from, whatever the recipe says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from data_prep.files import DataError, digest_of
from data_prep.prepare import prepare
from models.export_format import SETTINGS, digest_of_export
from pipeline.checkpoints.folder import CheckpointError, list_checkpoints
from pipeline.checkpoints.trained_with import as_trained, changed_keys
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.result import digest_of_weights
from pipeline.publishing.exports import export
from pipeline.publishing.model_card import model_card
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import Tracker
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


@pytest.fixture
def copied(run: TranslationRecipe, tmp_path: Path) -> TranslationRecipe:
    """The same run, to be spoilt."""
    shutil.copytree(run.run_dir, tmp_path / "copied")
    return run.model_copy(update={"run_dir": tmp_path / "copied"})


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


def test_a_test_set_under_another_name_is_evaluated_anew(
    copied: TranslationRecipe, tiny_recipe: Path
) -> None:
    """Though its folder is the same."""
    for name in ("a set", "a-set"):
        entry = f"[{{name: {name}, source: toy/test.de, references: [toy/test.en]}}]"
        root = copied.run_dir / "fetch"
        options = {"run_dir": copied.run_dir, "data.root": root, "evaluation.test_sets": entry}
        keys = [(key, str(value)) for key, value in options.items()]
        _, result = evaluate(load_recipe(tiny_recipe, keys)).results
        assert result.folder.name == "a-set"
        assert result.scores["test_set"] == name


def test_a_damaged_answer_is_given_again(run: TranslationRecipe) -> None:
    answers = evaluate(run).results[0].folder / "hypotheses.txt"
    whole = answers.read_bytes()
    answers.write_bytes(whole[: len(whole) // 2])
    evaluate(run)
    assert answers.read_bytes() == whole


def test_prepared_text_that_was_edited_is_refused(copied: TranslationRecipe) -> None:
    path = copied.clean_text / "test.en"
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    for work in (evaluate, lambda recipe: prepare(recipe.data, recipe.run_dir)):
        with pytest.raises(DataError, match=r"test\.en is not as it was written: .*Move it away"):
            work(copied)
    path.unlink()
    prepare(copied.data, copied.run_dir)
    evaluate(copied)


def test_weights_that_were_replaced_are_refused(copied: TranslationRecipe) -> None:
    """By others of the same size."""
    (checkpoint,) = list_checkpoints(copied.checkpoints)
    other = copied.model_copy(update={"run_dir": copied.run_dir / "other"})
    other.run_dir.mkdir()
    (other.run_dir / "shards").symlink_to(copied.shards)
    save_checkpoint(untrained_model(copied).apply(nudge), other)
    for path in list_checkpoints(other.checkpoints)[0].folder.glob("*.pt"):
        shutil.copy(path, checkpoint.folder)
    with pytest.raises(CheckpointError, match=r"model_states\.pt is another than was written"):
        evaluate(copied)


def test_exports_of_one_name_do_not_share_scores(copied: TranslationRecipe, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        export(copied, tmp_path / place / "small")
    nudged = copied.model_copy(update={"run_dir": tmp_path / "nudged"})
    shutil.copytree(copied.run_dir, nudged.run_dir)
    shutil.rmtree(nudged.checkpoints)
    save_checkpoint(untrained_model(nudged).apply(nudge), nudged)
    shutil.rmtree(tmp_path / "two" / "small")
    export(nudged, tmp_path / "two" / "small")
    evaluate(copied, tmp_path / "one" / "small")
    with pytest.raises(
        UsageError, match=r"has the scores of .*one/small, and those of .*two/small"
    ):
        evaluate(copied, tmp_path / "two" / "small")
    shutil.rmtree(tmp_path / "one" / "small")  # then it was perhaps moved
    evaluate(copied, tmp_path / "two" / "small")


def test_a_model_began_from_what_it_began_from(copied: TranslationRecipe, tmp_path: Path) -> None:
    """Whatever the recipe names by now. What its base has learnt is not known here."""
    base, other = tmp_path / "base", tmp_path / "other"
    export(copied, base)
    export(copied, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (checkpoint,) = list_checkpoints(copied.checkpoints)
    path = checkpoint.folder / "checkpoint.json"
    said = json.loads(path.read_text())
    said["training"]["init_from"], said["base"] = str(base), digest_of_export(base)
    path.write_text(json.dumps(said))

    def now(place: Path) -> TranslationRecipe:
        (found,) = list_checkpoints(copied.checkpoints)
        training = copied.training.model_copy(update={"init_from": place})
        evaluation = copied.evaluation.model_copy(update={"untrained_baseline": True})
        recipe = copied.model_copy(update={"training": training, "evaluation": evaluation})
        return as_trained(recipe, found)

    (found,) = list_checkpoints(copied.checkpoints)
    assert now(other).training.init_from == base
    for place, changed in ((other, ["init_from"]), (base, [])):
        training = copied.training.model_copy(update={"init_from": place})
        assert changed_keys(training, found, ("init_from",)) == changed
    assert now(shutil.copytree(base, tmp_path / "moved")).training.init_from == tmp_path / "moved"
    scores = evaluate(now(other)).results[0].scores
    assert scores["in_training_text"] is None
    assert "untrained_bleu" in scores
    shutil.rmtree(base)
    assert "untrained_bleu" not in evaluate(now(other)).results[0].scores


def test_an_older_checkpoint_is_what_it_was(copied: TranslationRecipe) -> None:
    (checkpoint,) = list_checkpoints(copied.checkpoints)
    info = checkpoint.info.model_dump(mode="json", exclude={"base", "parts", "run_dir"})
    path = checkpoint.folder / "checkpoint.json"
    path.write_text(json.dumps(info))
    del info["validation"]["validation_set"]
    older = list_checkpoints(copied.checkpoints)
    assert digest_of_weights(copied, older) == digest_of([*copied.chosen_weights, info])


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


@pytest.mark.slow
def test_a_run_shows_its_last_evaluation(copied: TranslationRecipe) -> None:
    """MLflow would show that of the newest checkpoint, which need not be it."""
    (result,) = evaluate(copied).results
    for step, bleu in ((9, 30.0), (3, 35.0), (9, 30.0)):
        result.scores = {**result.scores, "step": step, "bleu": bleu}
        tracker = Tracker(copied)
        result.log(tracker)
        assert tracker.close(None)
        run = MlflowClient(copied.tracking_uri).get_run(str(tracker.run_id))
        assert run.data.metrics["quality/test_bleu"] == bleu
