"""A trial: a training by `./run.sh train` in a folder of its own, with the sweep's shards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.files import DataError, only_command_in, write_atomically
from data_prep.stage import CLEAN, FETCH, SHARDS, VOCABULARY
from pipeline.checkpoints.folder import CheckpointError, Criterion
from pipeline.checkpoints.resume import is_finished
from pipeline.checkpoints.trained_with import newest_checkpoint
from pipeline.command_line import STOPPED
from pipeline.recipe import ROOT, Recipe
from pipeline.recipe_file import Draft
from pipeline.sweeping.study import Asked, Parameters
from pipeline.tracking.tracker import history_of

RECIPE, LOG = "recipe.yaml", "train.log"
ERROR = re.compile(r"^(?:train|run\.sh)(?:: rank \d+)?: error: (.*)$", re.MULTILINE)
# Reads until the sweep is gone, by SIGKILL too, and has the training save and end. (Linux's signal
# at a parent's death comes once for each of its threads, and a second one kills.)
WATCH = 'read -r nothing; kill -TERM "$0"'


class TrainingTrial:
    """A trial of a sweep, and its training while it runs."""

    def __init__(self, asked: Asked, sweep: Recipe, draft: Draft, data: Path) -> None:
        """Make the trial's recipe.

        :param sweep: as of `home_of`.
        :param draft: the recipe, as it was read.
        :param data: the run_dir that has the data.
        :raises UsageError: values that fit one by one do not fit together.
        """
        self.number, self.folder = asked.number, folder_of(sweep, asked.number)
        values = values_of(asked.parameters, sweep, self.folder)
        values["tracking.parent"] = str(sweep.run_dir)
        self.recipe = draft.recipe(values)
        self._text, self._shared = draft.text(values), data
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._asked_to_stop = False
        self._log_start = 0

    # ── The process ─────────────────────────────────────────────────────────────────────────────

    def can_start(self) -> bool:
        """Tell whether nobody is at work in the trial's folder: the training of a sweep that was
        killed may still be saving."""
        try:
            with only_command_in(self.folder):
                return True
        except DataError:
            return False

    def start(self, environment: Mapping[str, str]) -> None:
        """Train, or go on from the newest checkpoint.

        :param environment: variables for it, besides our own.
        """
        self._link_data()
        recipe, log = self.folder / RECIPE, self.folder / LOG
        write_atomically(recipe, self._text)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [str(ROOT / "run.sh"), "train", "--config", str(recipe)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
            )
        self._watcher = subprocess.Popen(
            ["sh", "-c", WATCH, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ended(self) -> bool:
        """Tell whether the training does not run."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
        return True

    @property
    def interrupted(self) -> bool:
        """Whether the training was stopped by a signal, and saved."""
        return self._process is not None and self._process.returncode == STOPPED

    def stop(self) -> None:
        """Ask the training once to save and to end."""
        if self._process is not None and not self._asked_to_stop:
            self._asked_to_stop = True
            self._process.terminate()

    def kill(self) -> None:
        """Have a training that was asked to stop killed: that is what a second signal does."""
        if self._process is not None:
            self._process.terminate()

    def _link_data(self) -> None:
        """Give the trial the sweep's prepared data, as other names of the same files."""
        for stage in (FETCH, CLEAN, VOCABULARY, SHARDS):
            source, target = self._shared / stage, self.folder / stage
            if source.is_dir() and not target.exists():
                partial = self.folder / f".{stage}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(source, partial, copy_function=_link)
                partial.rename(target)

    # ── What became of it ───────────────────────────────────────────────────────────────────────

    def validations(self, metric: str) -> dict[int, float]:
        """Return what validations have reported so far: step → value."""
        return history_of(self.recipe).get(metric, {})

    def is_finished(self, criterion: Criterion) -> bool:
        """Tell whether training has come to its end.

        :param criterion: the task's.
        """
        newest = newest_checkpoint(self.recipe)
        with suppress(CheckpointError):  # it is damaged, and training has said so
            return newest is not None and is_finished(self.recipe, criterion, newest)
        return False

    def reason(self) -> str:
        """Return why the training has failed."""
        with (self.folder / LOG).open("rb") as log:
            log.seek(self._log_start)
            said = log.read().decode(errors="replace")
        if found := ERROR.search(said):
            return found[1]
        assert self._process is not None
        return f"training ended with {self._process.returncode}; see {self.folder / LOG}"


def home_of(recipe: Recipe) -> Recipe:
    """Return a sweep's recipe with the sweep's own folder as its run_dir: what it makes is there,
    beside the run_dir, which may have a training and an MLflow run of its own."""
    folder = recipe.run_dir
    if folder.name in ("", ".."):
        folder = folder.resolve()
    folder = folder.with_name(f"{folder.name}-sweep")
    return recipe.model_copy(update={"run_dir": folder})


def folder_of(sweep: Recipe, number: int) -> Path:
    """Return the run_dir of a trial.

    :param sweep: as of `home_of`.
    """
    return sweep.run_dir / "trials" / f"{number:03d}"


def values_of(parameters: Parameters, sweep: Recipe, folder: Path) -> dict[str, Any]:
    """Return the keys of the recipe that are a trial's own.

    :param parameters: the trial's.
    :param sweep: as of `home_of`.
    :param folder: the trial's run_dir.
    """
    return {**parameters, "run_dir": str(folder), "tracking.uri": sweep.tracking_uri}


def _link(source: str, target: str) -> None:
    """Give a file another name, or copy it where the file system knows no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
