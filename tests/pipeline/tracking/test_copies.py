"""A run_dir that was copied, or trained anew, has a run of its own in MLflow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from torch import nn

from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import (
    Tracker,
    history_of,
    open_tracker,
    run_id_of,
    send_left_over,
    set_aside_finished,
)
from pipeline.translation_recipe import TranslationRecipe
from tests.forked import SERVER
from tests.pipeline.conftest import save_checkpoint


def run_in(tiny_recipe: Path, folder: Path) -> TranslationRecipe:
    keys = {"run_dir": folder, "tracking.uri": f"sqlite:///{folder.parent}/mlflow.db"}
    return load_recipe(tiny_recipe, [(key, str(value)) for key, value in keys.items()])


def logged(recipe: TranslationRecipe, loss: float, step: int) -> str:
    """Log a loss; return the id of the run that has it."""
    tracker = Tracker(recipe)
    tracker.log_metrics({"train_loss": loss}, step)
    tracker.close()
    assert tracker.run_id is not None
    return tracker.run_id


def test_a_copy_and_a_move(
    tiny_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (run_in(tiny_recipe, tmp_path / name) for name in ("a", "b", "c"))
    own = logged(first, 3.0, 1)
    shutil.copytree(first.run_dir, second.run_dir)
    copied = logged(second, 2.0, 2)
    assert copied != own
    assert f"{second.run_dir} is a copy of {first.run_dir}" in caplog.text
    client = MlflowClient(first.tracking_uri)

    def losses(run_id: str) -> list[float]:
        return [each.value for each in client.get_metric_history(run_id, "loss/train_loss")]

    assert losses(own) == [3.0]
    assert losses(copied) == [3.0, 2.0]
    assert logged(first, 1.0, 2) == own
    first.run_dir.rename(third.run_dir)
    assert logged(third, 0.5, 3) == own
    assert losses(own) == [3.0, 1.0, 0.5]


def test_checkpoints_that_were_copied_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    """Beside the run that they are from a training on them is another; elsewhere it is the same."""
    first, second = (run_in(tiny_recipe, tmp_path / name) for name in ("a", "b"))
    own = logged(first, 3.0, 1)
    save_checkpoint(nn.Linear(1, 1), first, {}, tracker_run_id=own)
    shutil.copytree(first.checkpoints, second.checkpoints)
    tracker = open_tracker(second)
    tracker.log_metrics({"train_loss": 2.0}, 2)
    assert tracker.close()
    assert tracker.run_id not in (own, None)
    shutil.rmtree(second.run_dir / "tracking")
    shutil.rmtree(first.run_dir)  # it was on another machine
    tracker = open_tracker(second)
    tracker.log_metrics({"train_loss": 2.0}, 2)
    assert tracker.close()
    assert tracker.run_id == own


def test_what_is_left_over_is_sent_to_the_run_of_the_checkpoint(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """The folder of all runs was moved, and its store with them."""

    def recipe_in(folder: str) -> TranslationRecipe:
        return load_recipe(tiny_recipe, [("run_dir", str(tmp_path / folder / "run"))])

    run_id = logged(recipe_in("runs"), 3.0, 1)
    save_checkpoint(nn.Linear(1, 1), recipe_in("runs"), {}, tracker_run_id=run_id)
    (tmp_path / "runs").rename(tmp_path / "moved")
    send_left_over(recipe_in("moved"))
    assert run_id_of(recipe_in("moved")) == run_id


def test_a_journal_that_has_lost_its_end_is_sent_again(tiny_recipe: Path, tmp_path: Path) -> None:
    """As after a power cut, or from a backup."""
    recipe = run_in(tiny_recipe, tmp_path / "run")
    run_id = logged(recipe, 3.0, 1)
    for step in (2, 3):
        logged(recipe, 2.0, step)
    journal = recipe.run_dir / "tracking" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0][:-5])
    for step in (7, 8):
        assert logged(recipe, 1.0, step) == run_id
    history = MlflowClient(recipe.tracking_uri).get_metric_history(run_id, "loss/train_loss")
    assert {each.step for each in history} == {1, 2, 3, 7, 8}


def test_a_copy_names_no_run_before_it_has_one(tiny_recipe: Path, tmp_path: Path) -> None:
    first, second = (run_in(tiny_recipe, tmp_path / name) for name in ("a", "b"))
    logged(first, 3.0, 1)
    shutil.copytree(first.run_dir, second.run_dir)
    assert run_id_of(second) == run_id_of(first)
    away = Tracker(second)  # whose store may not answer for long
    assert run_id_of(second) is None
    away.close()


def log_note(recipe: TranslationRecipe, text: str) -> None:
    tracker = Tracker(recipe, run_id_of(recipe) or text)
    tracker.log_json("note.json", {"text": text})
    tracker.close()


def test_runs_that_were_copied_with_their_store(tiny_recipe: Path, tmp_path: Path) -> None:
    """Files of the copy are the copy's, as are those of a folder that was moved."""

    def recipe_in(folder: str) -> TranslationRecipe:
        return load_recipe(tiny_recipe, [("run_dir", str(tmp_path / folder / "run"))])

    def note(folder: str, text: str) -> None:
        """Log it in a process of its own: MLflow remembers where a run's files are."""
        process = SERVER.Process(target=log_note, args=(recipe_in(folder), text))
        process.start()
        process.join()
        assert process.exitcode == 0

    def notes() -> dict[str, str]:
        found = tmp_path.glob("*/mlartifacts/*/artifacts/note.json")
        return {
            path.relative_to(tmp_path).parts[0]: json.loads(path.read_text())["text"]
            for path in found
        }

    run_id = logged(recipe_in("first"), 3.0, 1)
    note("first", "one")
    shutil.copytree(tmp_path / "first", tmp_path / "a copy")
    note("a copy", run_id)  # as a checkpoint tells it
    assert notes() == {"first": "one", "a copy": run_id}
    (tmp_path / "a copy").rename(tmp_path / "moved")
    note("moved", run_id)
    assert notes() == {"first": "one", "moved": run_id}
    run = MlflowClient(recipe_in("moved").tracking_uri).get_run(run_id)
    place = tmp_path / "moved" / "mlartifacts" / run_id / "artifacts"
    assert run.info.artifact_uri == place.as_uri()


def test_training_anew(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = run_in(tiny_recipe, tmp_path / "run")
    tracker = Tracker(recipe)
    tracker.log_metrics({"train_loss": 3.0}, 1)
    tracker.close(None)  # killed before its first checkpoint
    before = run_id_of(recipe)
    set_aside_finished(recipe)
    assert logged(recipe, 2.0, 2) == before
    set_aside_finished(recipe)
    assert history_of(recipe) == {}
    assert logged(recipe, 2.5, 1) != before
    assert (recipe.run_dir / "tracking-1" / "journal.jsonl").exists()
    tracker = Tracker(recipe)
    tracker.close("FAILED")
    set_aside_finished(recipe)
    assert history_of(recipe) == {}
