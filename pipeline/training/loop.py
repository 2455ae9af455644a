"""TODO docstring."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import ExitStack, nullcontext
from types import FrameType

import torch
import torch.distributed
from rich.console import Console

from data_prep.files import only_command_in
from data_prep.shards import ShardReader
from pipeline.checkpoints.folder import (
    Checkpoint,
    record_validation,
    remove_unfinished,
    set_aside_damaged,
)
from pipeline.checkpoints.resume import checkpoint_to_resume, is_finished
from pipeline.pictures import draw_losses
from pipeline.preflight import check_space
from pipeline.recipe import Recipe
from pipeline.tracking.open import open_tracker
from pipeline.tracking.provenance import log_data, log_training
from pipeline.tracking.system_metrics import SystemMetrics
from pipeline.tracking.tracker import Tracker
from pipeline.training.progress import Window, progress_bar, progress_line
from pipeline.training.trainer import Training, TrainingError, rehearse
from pipeline.training.validation import Stopped, Validation, any_rank
from pipeline.training.watchdog import Watchdog

log = logging.getLogger("train")


class StopSignal:
    """SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.received = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


class Loop:
    """Train to the last step; log, validate and save on the way."""

    def __init__(
        self, training: Training, newest: Checkpoint | None, tracker: Tracker | None
    ) -> None:
        """:param newest: the checkpoint that `training` has resumed from."""
        self.training, self.tracker, self.config = training, tracker, training.config
        self.stop = StopSignal()
        self.watchdog = Watchdog(
            self.config.collective_timeout,
            training.rank,
            lambda: f"after step {training.step}",
            training.recipe.run_dir / "hangs" / f"rank-{training.rank}.txt",
        )
        self.validation = Validation(training, self._alive)
        if newest is not None:
            self.validation.resume(newest.info["validation"])
        self.first_step, self.started = training.step, time.monotonic()
        self.window = self._new_window()

    def run(self, console: Console | None) -> None:
        """:raises Stopped: by a signal, after saving.
        :raises TrainingError: a gradient is not finite.
        """
        training = self.training
        try:
            with progress_bar(console) as bar:
                task = bar.add_task("", total=training.last_step, completed=training.step)
                if self.validation.state["due"]:
                    self._catch_up()
                while training.step < training.last_step and not self.validation.gave_up:
                    self.step()
                    bar.update(task, completed=training.step)
        finally:
            self.watchdog.stop()  # rank 0 may take its time to tell MLflow
        if self.validation.gave_up and training.rank == 0:
            log.info(
                "early stopping at step %d: step %d was the best (%s %.4f)",
                training.step,
                *(self.validation.state[key] for key in ("best_step", "criterion", "best")),
            )

    def step(self) -> None:
        """One step, and what is due after it."""
        self.training.train_step(self.window)
        self._after_step(stopped=any_rank(self.training, self._alive()))

    def _alive(self) -> bool:
        """:returns: whether a signal has come to this rank."""
        self.watchdog.seen()
        return self.stop.received

    def _new_window(self) -> Window:
        return Window(torch.zeros((), device=self.training.device))

    def _after_step(self, stopped: bool) -> None:
        training, config = self.training, self.config
        step, last = training.step, training.step == training.last_step
        due = step % config.validate_every == 0 or last
        validating = due and not stopped
        saving = step % config.checkpoint_every == 0 or last or stopped
        if step % config.log_every == 0 or validating or saving:
            self._report()
        pause = time.monotonic()
        self.validation.state["due"] = due
        if validating:
            try:
                self._validate()
            except Stopped:
                stopped = saving = True
            else:
                saving |= self.validation.improved or self.validation.gave_up
        if saving:
            training.save(self.tracker.run_id if self.tracker else None, self.validation.state)
            self.watchdog.seen()
        self.window.since += time.monotonic() - pause
        if stopped and (not last or self.validation.state["due"]):
            raise Stopped(f"stopped by a signal at step {step}")

    def _catch_up(self) -> None:
        """The validation that a signal has kept the run before from."""
        self._validate()
        if self.training.rank == 0:
            state, folder = self.validation.state, self.training.checkpoints
            record_validation(folder, self.training.step, state)

    def _validate(self) -> None:
        metrics = self.validation.run()
        words = {
            "valid_loss": "valid loss %.4f",
            "valid_ppl": "ppl %.2f",
            "valid_bleu": "BLEU %.2f",
        }
        text = " | ".join(words[key] % value for key, value in metrics.items())
        best = " | best so far" if self.validation.improved else ""
        self._tell(f"step {self.training.step} | {text}{best}", metrics, once=["valid_loss"])

    def _report(self) -> None:
        """One progress line, and the same numbers to the tracker."""
        training, window = self.training, self.window
        loss, positions, waited = training.mean_over_ranks(
            window.loss, window.positions, window.waited
        )
        metrics = window.metrics(
            loss * training.world_size, positions * training.world_size, waited
        )
        metrics |= {
            "learning_rate": training.engine.get_lr()[0],
            "grad_norm": float(training.engine.get_global_grad_norm() or 0.0),
            "epoch": training.step / training.plan.steps_per_epoch,
            "skipped_steps": training.engine.skipped_steps,
        }
        elapsed, steps = time.monotonic() - self.started, training.step - self.first_step
        eta = (training.last_step - training.step) * elapsed / steps
        self._tell(
            progress_line(metrics, training.step, training.last_step, eta),
            metrics,
            once=["train_loss", "learning_rate"],
        )
        self.window = self._new_window()

    def _tell(self, line: str, metrics: dict[str, float], once: list[str]) -> None:
        if self.tracker:
            log.info("%s", line)
            self.tracker.log_metrics(metrics, self.training.step, once=once)


def _look_before(recipe: Recipe, held: ExitStack) -> Checkpoint | None:
    """Rank 0's look at everything that training depends on. :returns: the checkpoint to resume.

    :raises DataError, CheckpointError, PreflightError: it cannot work, and why.
    """
    held.enter_context(only_command_in(recipe.run_dir))
    started = time.monotonic()
    train = ShardReader(recipe.run_dir / "shards", "train", verify=True)
    ShardReader(recipe.run_dir / "shards", "valid", verify=True)
    newest = checkpoint_to_resume(recipe, train.manifest)
    if newest is not None and is_finished(recipe.training, newest):
        return newest
    checkpoints = recipe.run_dir / "checkpoints"
    if newest is not None:
        set_aside_damaged(checkpoints, newest)
    remove_unfinished(checkpoints)
    clean = recipe.run_dir / "clean"
    if recipe.training.bleu_every and not (clean / f"valid.{recipe.data.source_lang}").exists():
        raise TrainingError(f"training.bleu_every needs the text in {clean}: run ./run.sh prepare")
    sizes = train.manifest["vocabulary"]["sizes"]
    free, needed = check_space(recipe, sizes)
    log.info(
        "preflight: %s training pairs; %.1f GiB free, %.2f GiB for checkpoints; %.1f s",
        f"{len(train):,}",
        free,
        needed,
        time.monotonic() - started,
    )
    return newest


def _train(recipe: Recipe, newest: Checkpoint | None, console: Console | None) -> None:
    """:raises Stopped: by a signal, after saving."""
    fits = rehearse(recipe)
    training = Training(recipe)
    if newest is not None:
        training.resume(newest)
    tracker = None
    if training.rank == 0:
        log.info("preflight: %s", fits)
        if newest is None and recipe.training.init_from:
            log.info("initial weights: %s", recipe.training.init_from)
        log.info(
            "%s, %s core parameters; %s; %d rank(s) × %d micro-batch(es) a step, ZeRO stage %d; "
            "padding %.1f%%",
            recipe.model.architecture,
            f"{training.core_parameters:,}",
            training.device,
            training.world_size,
            training.accumulation_steps,
            training.engine.zero_optimization_stage(),
            100 * training.plan.padding_share(),
        )
        tracker = open_tracker(recipe)
        log_data(tracker, recipe)
        log_training(tracker, recipe, training)
    status = "FAILED"
    try:
        with SystemMetrics(tracker, training) if tracker else nullcontext():
            Loop(training, newest, tracker).run(console)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracker:
            _log_losses(tracker, recipe)
            tracker.close(status)


def _log_losses(tracker: Tracker, recipe: Recipe) -> None:
    """The picture of the run, for those who have no dashboard at hand."""
    picture = recipe.run_dir / "loss.png"
    try:
        draw_losses(tracker.history, picture)
        tracker.log_artifact(picture)
    except OSError as error:  # a full disk: training ends as it has, not with a traceback
        log.warning("%s: not drawn: %s", picture, error.strerror)
