"""A sweep from its first trial to its last."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from data_prep.files import DataError, read_json, sha256_of, write_atomically
from data_prep.stage import PREPARED_FROM
from models.export_format import digest_of_export
from pipeline.checkpoints.folder import Criterion
from pipeline.command_line import on_signals
from pipeline.recipe import Recipe, UsageError
from pipeline.recipe_file import Draft, load_recipe
from pipeline.sweeping.config import Choices, SweepConfig
from pipeline.sweeping.drawing import Drawn, draw_sweep
from pipeline.sweeping.study import REASON, Asked, Study
from pipeline.sweeping.trial import RECIPE, TrainingTrial, folder_of, home_of, values_of
from pipeline.tasks import task_of
from pipeline.tracking.provenance import gpu_names, log_data
from pipeline.tracking.tracker import Tracker, open_tracker

log = logging.getLogger("sweep")

STUDY, PICTURE, BEST = "sweep.db", "sweep.png", "best.yaml"
TICK_SECONDS = 1.0  # between looks at the trainings


class SweepError(Exception):
    """A sweep has found nothing."""


class Best(NamedTuple):
    """The best trial of a sweep."""

    number: int
    value: float
    recipe: Path


class Sweep:
    """Runs the trials of a sweep, some of them at once."""

    def __init__(self, draft: Draft, config: SweepConfig, criterion: Criterion, jobs: int) -> None:
        """Open the study that belongs to the recipe's run_dir.

        :param draft: the recipe.
        :param criterion: what trials are judged by.
        :param jobs: trainings at once.
        :raises DataError: it began with another recipe, other data, or another file, or is gone
            but for its trials.
        """
        self.recipe, self._draft = draft.recipe(), draft
        self._home = home_of(self.recipe)
        self.config, self.criterion, self._jobs = config, criterion, jobs
        self.study = Study(self._home.run_dir / STUDY, config, criterion, self.recipe)
        if self.study.is_new and folder_of(self._home, 0).exists():
            raise DataError(
                f"{self._home.run_dir} holds trials of a sweep whose {STUDY} is gone; move that "
                "folder away to begin anew"
            )
        recipe = self.recipe.model_dump(mode="json", include={"model", "training", "evaluation"})
        self.study.refuse_other(
            {
                "sweep": config.model_dump(mode="json"),
                "recipe": recipe,
                "data": read_json(self.recipe.shards / PREPARED_FROM),
                **self._content(),
            }
        )
        self._task_criterion = task_of(self.recipe).criterion
        self._running: dict[int, TrainingTrial] = {}  # by their share of the machine
        self._exhausted = False
        self._pruned_at: dict[int, int] = {}  # the steps at which trials of these numbers were
        self._stopping = False
        self._began, self._finished_before = time.monotonic(), len(self.study.finished)

    def _content(self) -> dict[str, str]:
        """Return digests of the files that keys of `training` name, in the recipe or as choices."""
        found = {}
        for name, digest in (("deepspeed_config", sha256_of), ("init_from", digest_of_export)):
            key, own = f"training.{name}", getattr(self.recipe.training, name)
            if isinstance(searched := self.config.space.get(key), Choices):
                for path in filter(None, searched.choices):
                    found[f"content of {key} {path}"] = digest(Path(path).expanduser())
            elif own is not None:
                found[f"content of {key}"] = digest(own)
        return found

    def run(self) -> Best:
        """Run all trials that are left.

        :raises KeyboardInterrupt: by a signal, after the trainings have saved.
        :raises SweepError: no trial came to its end.
        """
        on_signals(self._stop)
        tracker = open_tracker(self._home)
        log_data(tracker, self.recipe, task_of(self.recipe).data_facts())
        settings = self.config.model_dump(mode="json", exclude_none=True)
        tracker.log_params(sweep={**settings, "metric": self.criterion.metric})
        status = "FAILED"
        try:
            tracker.log_status("RUNNING")
            self._run_trials(tracker)
            self._tell(tracker)
            if self._stopping:
                status = "KILLED"
                raise KeyboardInterrupt
            best = self._best()
            status = "FINISHED"
        finally:
            tracker.close(status)
        for trial in self.study.finished:  # what was not sent before a kill, or to no server
            path = folder_of(self._home, trial.number) / RECIPE
            if self._stopping:
                break
            if path.exists() and not self._tag(trial, load_recipe(path, kind=Recipe), None):
                break  # the server is away: the next would wait for it as long
        return best

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """Have all trainings save and end; a second signal kills them."""
        again, self._stopping = self._stopping, True
        for trial in self._running.values():
            if again:
                trial.kill()
            else:
                trial.stop()

    # ── Trials ──────────────────────────────────────────────────────────────────────────────────

    def _run_trials(self, tracker: Tracker) -> None:
        waiting = self.study.unfinished()
        while True:
            for slot in range(self._jobs):
                while slot not in self._running and (asked := self._next(waiting)):
                    self._begin(slot, asked)
            if not self._running:
                return
            time.sleep(TICK_SECONDS)
            for slot, trial in list(self._running.items()):
                ended = trial.ended()  # before its last words are read
                self._observe(trial)
                if ended:
                    del self._running[slot]
                    self._finish(trial)
                    if not self._stopping:
                        self._tell(tracker)
                        self._progress()

    def _next(self, waiting: list[Asked]) -> Asked | None:
        """Return a trial to begin, if there is one: first those that were interrupted."""
        if self._stopping:
            return None
        if waiting:
            return waiting.pop(0)
        begun = [trial for trial in self.study.trials if trial.state != TrialState.WAITING]
        if self._exhausted or len(begun) >= self.config.trials:
            return None
        asked = self.study.ask()
        if asked is None:
            self._exhausted = True
            log.info("all values of the space are tried: %d trials, and no more", len(begun))
        return asked

    def _begin(self, slot: int, asked: Asked) -> None:
        """Start or continue a training; one whose recipe is wrong fails at once."""
        text = in_words(asked.parameters)
        try:
            trial = TrainingTrial(asked, self._home, self._draft, self.recipe.run_dir)
        except UsageError as error:
            log.warning("trial %d failed: %s (%s)", asked.number, error, text)
            self.study.fail(asked.number, str(error))
            self._progress()
            return
        trial.folder.mkdir(parents=True, exist_ok=True)
        while not trial.can_start():
            log.info("trial %d: its interrupted training still saves", asked.number)
            time.sleep(5 * TICK_SECONDS)
            if self._stopping:
                return
        self._running[slot] = trial
        reported = self.study.reported(asked.number)
        if (step := self.study.pruned_at(asked.number)) is not None:
            self._pruned_at[asked.number] = step  # a kill came before its end was noted
        else:
            log.info("trial %d %s: %s", asked.number, "goes on" if reported else "begins", text)
            trial.start(share_of_machine(slot, self._jobs))
        if self._stopping:  # a signal came before it could be stopped
            trial.stop()

    def _observe(self, trial: TrainingTrial) -> None:
        """Report new validations to Optuna; what it prunes is stopped."""
        number = trial.number
        reported = self.study.reported(number)
        for step, value in sorted(trial.validations(self.criterion.metric).items()):
            if step in reported or number in self._pruned_at:
                continue
            self.study.report(number, step, value)
            if self.study.pruned_at(number) is not None:
                self._pruned_at[number] = step
                trial.stop()

    def _finish(self, trial: TrainingTrial) -> None:
        """Note what became of a training that has ended; one that was only interrupted stays."""
        number, metric = trial.number, self.criterion.metric
        values = trial.validations(metric)
        finished = trial.is_finished(self._task_criterion)
        pruned_at = self._pruned_at.get(number)
        # Pruning by the last validation of all comes too late.
        if pruned_at is not None and not (finished and pruned_at == max(values)):
            self.study.prune(number)
            log.info("trial %d pruned at step %d: %s %.4f", number, pruned_at, metric,
                     values[pruned_at])  # fmt: skip
        elif finished and (finite := list(filter(math.isfinite, values.values()))):
            best = self.criterion.best(finite)
            self.study.complete(number, best)
            log.info("trial %d: %s %.4f", number, metric, best)
        elif trial.interrupted or self._stopping:
            if not self._stopping:  # somebody has stopped the training and not the sweep
                self._stop(signal.SIGTERM, None)
            return
        else:
            reason = trial.reason()
            log.warning("trial %d failed: %s", number, reason)
            self.study.fail(number, reason)
        noted = self.study.trials[number]
        failed = noted.state == TrialState.FAIL
        self._tag(noted, trial.recipe, "FAILED" if failed else None)

    # ── What is told ────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _tag(trial: FrozenTrial, recipe: Recipe, status: str | None) -> bool:
        """Say in MLflow what became of a trial.

        :param status: of its run, where training has not said it.
        :returns: whether MLflow has all that is known of it.
        """
        tracker = open_tracker(recipe)
        tags = {"sweep.trial": str(trial.number), "sweep.state": trial.state.name.lower()}
        if trial.state == TrialState.FAIL:
            tags["sweep.reason"] = trial.user_attrs[REASON]
        tracker.log_tags(tags)
        return tracker.close(status)

    def _tell(self, tracker: Tracker) -> None:
        """Write the picture and the best recipe as they are now, and tell MLflow."""
        finished, metric = self.study.finished, self.criterion.metric
        for trial in finished:
            if trial.state == TrialState.COMPLETE:
                value = {f"sweep/{metric}": float(trial.value or 0.0)}
                tracker.log_metrics(value, trial.number, once=list(value))
        folder = self._home.run_dir
        if finished:
            draw_sweep(
                [self._drawn(t) for t in finished], self.config.space, self.criterion,
                folder / PICTURE,
            )  # fmt: skip
        if (best := self.study.best) is not None:
            self._write_best(folder / BEST, self._text_of(best))
            if self._is_best(folder / BEST, best):
                tracker.log_artifact(folder / BEST)
        if (folder / PICTURE).exists():
            tracker.log_artifact(folder / PICTURE)

    def _text_of(self, trial: FrozenTrial) -> str:
        place = folder_of(self._home, trial.number)
        return self._draft.text(values_of(self.study.parameters(trial), self._home, place))

    def _is_best(self, path: Path, best: FrozenTrial) -> bool:
        return path.read_text(encoding="utf-8", errors="replace") == self._text_of(best)

    def _write_best(self, path: Path, text: str) -> None:
        """Write a recipe, unless what is there has been edited since it was written."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        if path.exists() and sha256_of(path) not in (digest, *self.study.written):
            log.warning("%s is not as it was written, and stays; move it away for a new one", path)
            return
        self.study.note_written(digest)
        write_atomically(path, text)

    def _drawn(self, trial: FrozenTrial) -> Drawn:
        value = None if trial.state == TrialState.FAIL else trial.value
        pruned = trial.state == TrialState.PRUNED
        return Drawn(trial.number, self.study.parameters(trial), value, pruned)

    def _progress(self) -> None:
        finished, total = self.study.finished, self.config.trials
        parts = [f"{len(finished)} of {total} trials done"]
        for state, word in ((TrialState.PRUNED, "pruned"), (TrialState.FAIL, "failed")):
            if number := sum(trial.state == state for trial in finished):
                parts[0] += f", {number} {word}"
        if (best := self.study.best) is not None:
            parts.append(f"best so far {best.value:.4f} (trial {best.number})")
        if (done := len(finished) - self._finished_before) and len(finished) < total:
            seconds = (time.monotonic() - self._began) / done * (total - len(finished))
            parts.append(f"ETA {timedelta(seconds=round(seconds))}")
        log.info("%s", " | ".join(parts))

    def _best(self) -> Best:
        best = self.study.best
        if best is None:
            last = self.study.trials[-1]
            reason = last.user_attrs.get(REASON, last.state.name.lower())
            raise SweepError(
                f"none of {len(self.study.trials)} trials came to its end; the last one: {reason}"
            )
        recipe = self._home.run_dir / BEST
        if recipe.exists() and not self._is_best(recipe, best):  # it was edited
            recipe = folder_of(self._home, best.number) / RECIPE
        return Best(best.number, float(best.value or 0.0), recipe)


def in_words(parameters: Mapping[str, Any]) -> str:
    """Return what lines say of a trial's parameters."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in parameters.items()
    )


def share_of_machine(slot: int, jobs: int) -> dict[str, str]:
    """Return the variables that give a training its share of cores and GPUs.

    :param slot: which of the trainings at once it is, from 0.
    :param jobs: how many there are.
    """
    if jobs == 1:
        return {}
    variables = {}
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(n) for n in range(len(gpu_names()))] if given is None else given.split(",")
    if len(gpus) > 1:
        own = gpus[slot::jobs] or [gpus[slot % len(gpus)]]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return variables
