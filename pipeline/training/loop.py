"""The training loop: steps, and what is due after each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Generic, NamedTuple

import torch
from rich.console import Console

from pipeline.checkpoints.folder import Checkpoint, record_validation
from pipeline.command_line import on_signals
from pipeline.recipe import TrainingConfig
from pipeline.tracking.tracker import Tracker
from pipeline.training.progress import Window, progress_bar, progress_line, rate_line
from pipeline.training.task import Batch
from pipeline.training.trainer import Trainer
from pipeline.training.validation import Interruption, Stopped, Validation
from pipeline.training.watchdog import Watchdog

log = logging.getLogger("train")


FIRST_SIGN_SECONDS = 5.0  # after which a slow run says how fast it is, before its first report


class StopSignal:
    """Remembers that a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.received = False
        on_signals(self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


class Due(NamedTuple):
    """What is due after a step. A validation that is due when a signal has come is put off."""

    report: bool
    validate: bool
    save: bool
    """By the schedule; a stop saves too."""

    stop: bool

    @classmethod
    def after(cls, step: int, last_step: int, config: TrainingConfig, stop: bool) -> Due:
        """Return what the schedule asks for after `step`.

        :param stop: whether a signal has come to any rank.
        """
        last = step == last_step
        validate = last or step % config.validate_every == 0
        save = last or step % config.checkpoint_every == 0
        report = save or stop or validate or step % config.log_every == 0
        return cls(report, validate, save, stop)


class Loop(Generic[Batch]):
    """Trains to the last step; logs, validates and saves on the way."""

    def __init__(
        self, trainer: Trainer[Batch], newest: Checkpoint | None, tracker: Tracker | None
    ) -> None:
        """Make ready to go on from where `trainer` is.

        :param newest: the checkpoint that it has resumed from.
        :param tracker: rank 0's.
        """
        self.trainer, self.tracker, self.config = trainer, tracker, trainer.config
        self.stop = StopSignal()
        self.watchdog = Watchdog(
            self.config.collective_timeout,
            trainer.rank,
            lambda: f"after step {trainer.step}",
            trainer.recipe.run_dir / "hangs" / f"rank-{trainer.rank}.txt",
        )
        self.interruption = Interruption(trainer, self._signalled)
        self.validation = Validation(trainer, self.interruption)
        if newest is not None:
            self.validation.resume(newest.info.validation)
        self.first_step, self.started = trainer.step, time.monotonic()
        self.told = False  # how fast training is
        self.window = self._new_window()

    def run(self, console: Console | None) -> None:
        """Train to the end.

        :param console: the terminal to show a bar on.
        :raises Stopped: by a signal, after saving.
        :raises TrainingError: a gradient is not finite.
        """
        trainer, validation = self.trainer, self.validation
        try:
            with progress_bar(console) as bar:
                task = bar.add_task("", total=trainer.last_step, completed=trainer.step)
                if validation.state.due:
                    self._catch_up()
                    self.window, self.started = self._new_window(), time.monotonic()
                while trainer.step < trainer.last_step and not validation.gave_up:
                    self.step()
                    bar.update(task, completed=trainer.step)
        finally:
            self.watchdog.stop()  # rank 0 may take its time to tell MLflow
        if validation.gave_up and trainer.rank == 0:
            state, best = validation.state, "no validation gave a number"
            if state.best is not None:
                best = f"step {state.best_step} was the best ({state.criterion} {state.best:.4f})"
            log.info("early stopping at step %d: %s", trainer.step, best)

    def step(self) -> None:
        """Train one step, and do what is due after it.

        :raises Stopped: by a signal, after saving.
        """
        trainer = self.trainer
        trainer.train_step(self.window)
        stop = self.interruption.lately()
        due = Due.after(trainer.step, trainer.last_step, self.config, stop)
        if not due.report:
            self._give_first_sign()
        self._do_what_is_due(due)

    def _do_what_is_due(self, due: Due) -> None:
        """Report, validate, save, stop, as far as it is due.

        :raises Stopped: by a signal, after saving.
        """
        if due.report:
            self._report()
        pause = time.monotonic()
        scheduled, stop = due.save, due.stop
        self.validation.set_due(due.validate)
        if due.validate and not stop:
            try:
                self._validate()
            except Stopped:
                stop = True
            else:
                scheduled |= self.validation.asks_for_checkpoint
        if scheduled or stop:
            run_id = self.tracker.run_id if self.tracker else None
            self.trainer.save(run_id, self.validation.state, scheduled=scheduled)
            self.watchdog.seen()
        self.window.since += time.monotonic() - pause
        trained = self.trainer.step == self.trainer.last_step
        if stop and (not trained or self.validation.state.due):
            raise Stopped(f"stopped by a signal at step {self.trainer.step}")

    def _signalled(self) -> bool:
        """Tell whether a signal has come to this rank. Who asks has made progress."""
        self.watchdog.seen()
        return self.stop.received

    def _new_window(self) -> Window:
        return Window(torch.zeros((), device=self.trainer.device))

    def _catch_up(self) -> None:
        """Do the validation that the run before has put off, and write it into its checkpoint."""
        self._validate()
        if self.trainer.rank == 0:
            folder, asked = self.trainer.recipe.checkpoints, self.validation.asks_for_checkpoint
            record_validation(folder, self.trainer.step, self.validation.state, asked=asked)

    def _validate(self) -> None:
        """Validate and tell of it.

        :raises Stopped: on every rank, when a signal has come to one.
        """
        metrics = self.validation.run()
        text = self.trainer.task.in_words(metrics)
        best = " | best so far" if self.validation.improved else ""
        self._tell(f"step {self.trainer.step} | {text}{best}", metrics, once=["valid_loss"])

    def _report(self) -> None:
        """Write one progress line, and give the same numbers to the tracker."""
        trainer, window = self.trainer, self.window
        loss, positions, waited = trainer.mean_over_ranks(
            window.loss, window.positions, window.waited
        )
        ranks = trainer.world_size
        metrics = window.metrics(trainer.task, loss * ranks, positions * ranks, waited)
        metrics |= {
            "learning_rate": trainer.engine.get_lr()[0],
            "grad_norm": float(trainer.engine.get_global_grad_norm() or 0.0),
            "epoch": trainer.step / trainer.task.plan.steps_per_epoch,
            "skipped_steps": trainer.engine.skipped_steps,
        }
        self._tell(
            progress_line(trainer.task, metrics, trainer.step, trainer.last_step, self._eta()),
            metrics,
            once=["train_loss", "learning_rate"],
        )
        self.window, self.told = self._new_window(), True

    def _give_first_sign(self) -> None:
        """Say once how fast a slow run is, before its first report.

        Rank 0 knows that without the others. MLflow gets nothing: what it has is the same however
        often a run was interrupted.
        """
        trainer = self.trainer
        if self.told or time.monotonic() - self.started < FIRST_SIGN_SECONDS:
            return
        self.told = True
        if trainer.rank == 0:
            line = rate_line(
                trainer.task, self.window, trainer.step, trainer.last_step, self._eta()
            )
            log.info("%s", line)

    def _eta(self) -> float:
        """Return the seconds to the last step, at the rate so far."""
        elapsed, steps = time.monotonic() - self.started, self.trainer.step - self.first_step
        return (self.trainer.last_step - self.trainer.step) * elapsed / steps

    def _tell(self, line: str, metrics: Mapping[str, float], once: Sequence[str]) -> None:
        """Log on rank 0.

        :param once: if an interrupted run has logged the same of these, the tracker has all.
        """
        if self.tracker:
            log.info("%s", line)
            self.tracker.log_metrics(metrics, self.trainer.step, once=once)
