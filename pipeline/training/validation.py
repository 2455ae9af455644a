"""Validation while training: when it stops for a signal, and what becomes of its verdicts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.arrow import validation_digest
from data_prep.batch_plan import BatchPlan, Indices
from pipeline.checkpoints.folder import ValidationState
from pipeline.training.trainer import Trainer

log = logging.getLogger("train")

SECONDS_BETWEEN_QUESTIONS = 1.0  # whether a signal has come to another rank


class Stopped(Exception):
    """A signal has come, and training stops."""


class Interruption:
    """Asks whether a signal has come, and stops what is at work."""

    def __init__(self, trainer: Trainer[Any], signalled: Callable[[], bool]) -> None:
        """Make ready to ask.

        :param signalled: tells whether a signal has come to this rank.
        """
        self._trainer, self._signalled = trainer, signalled
        self._asked, self._steps, self._steps_until_asking = time.monotonic(), 0, 1

    def lately(self) -> bool:
        """Tell whether a signal has come to any rank, as far as this one knows. Every rank must
        call this after every step, and learns the same.

        Asking the others makes the host wait for the GPU, so they are asked about once a second.
        """
        signalled, trainer = self._signalled(), self._trainer
        if trainer.world_size == 1:
            return signalled
        self._steps += 1
        if self._steps < self._steps_until_asking:
            return False
        seconds_per_step = (time.monotonic() - self._asked) / self._steps
        anywhere, seconds_per_step = trainer.mean_over_ranks(float(signalled), seconds_per_step)
        steps = int(SECONDS_BETWEEN_QUESTIONS / seconds_per_step)
        self._steps_until_asking = min(max(steps, 1), trainer.config.log_every)
        self._asked, self._steps = time.monotonic(), 0
        return anywhere > 0

    def agree(self) -> None:
        """Go on if no rank has a signal. Every rank must call this equally often.

        :raises Stopped: on every rank, when a signal has come to one.
        """
        if self._trainer.mean_over_ranks(float(self._signalled()))[0] > 0:
            raise Stopped(f"stopped by a signal at step {self._trainer.step}")

    def here(self) -> None:
        """Go on if this rank has no signal; the ranks must `agree` afterwards.

        :raises Stopped: on this rank, when a signal has come to it.
        """
        if self._signalled():
            raise Stopped


class Validation:
    """The validations of a training. Every rank has one, and they agree in everything."""

    def __init__(self, trainer: Trainer[Any], interruption: Interruption) -> None:
        self.trainer, self.interruption = trainer, interruption
        self.state = ValidationState(
            criterion=trainer.task.criterion.metric,
            found_by=trainer.task.criterion.found_by,
            validation_set=validation_digest(trainer.recipe.shards),
        )

    def set_due(self, due: bool) -> None:
        """Note whether the validation of this step is still to be done."""
        self.state = self.state.model_copy(update={"due": due})

    def resume(self, state: ValidationState) -> None:
        """Go on with the state of a checkpoint. By another criterion, or of other examples, its
        values say nothing, and the best is looked for anew."""
        own = self.state
        if state.criterion != own.criterion:
            why = f"the criterion is {own.criterion} now, and was {state.criterion}"
        elif not state.is_by(self.trainer.task.criterion):
            why = f"{own.criterion} is found by other keys of `evaluation` than before"
        elif not state.is_of(own.validation_set):
            why = "the validation set has changed"
        else:
            known = {"validation_set": own.validation_set, "found_by": own.found_by}
            self.state = state.model_copy(update=known)
            return
        if self.trainer.rank == 0:
            log.warning("the best step is looked for anew: %s", why)
        self.set_due(state.due)

    def run(self) -> dict[str, float]:
        """Validate, and judge this step by the criterion, if it is among the metrics.

        :returns: the metrics, the same on every rank.
        :raises Stopped: on every rank, when a signal has come to one.
        """
        task, step = self.trainer.task, self.trainer.step
        metrics = task.validate(self.trainer, self.interruption)
        if (value := metrics.get(task.criterion.metric)) is not None:
            self.state = self.state.judged(value, step, task.criterion)
        self.set_due(False)
        return metrics

    @property
    def improved(self) -> bool:
        """Whether the newest validation was the best."""
        return self.state.best_step == self.trainer.step

    @property
    def asks_for_checkpoint(self) -> bool:
        """Whether the newest validation wants a checkpoint of its step, besides the schedule's."""
        return self.improved or self.gave_up

    @property
    def gave_up(self) -> bool:
        """Whether early stopping ends training."""
        return self.state.gives_up(self.trainer.config.early_stopping)


def sum_over(
    plan: BatchPlan,
    trainer: Trainer[Any],
    interruption: Interruption,
    measure: Callable[[Indices], Tensor],
) -> list[float]:
    """Return sums over a validation set, the same on every rank, and every rank must call this.

    :param measure: returns the sums over some of its examples `[sums]`, by `trainer.engine`, which
        neither drops out nor keeps anything for gradients.
    :raises Stopped: on every rank, when a signal has come to one.
    """
    total = torch.zeros((), device=trainer.device)
    trainer.engine.eval()  # the next step switches back
    with torch.no_grad():
        for examples in _shared_micro_batches(plan, trainer):
            total = total + measure(examples)
            interruption.agree()
    return [mean * trainer.world_size for mean in trainer.mean_over_ranks(*total)]


def _shared_micro_batches(plan: BatchPlan, trainer: Trainer[Any]) -> Iterator[Indices]:
    """Yield this rank's micro-batches of a validation set, equally many on every rank: ZeRO-3
    gathers parameters in each forward pass. Those that make up the number are empty."""
    micro_batches = plan.sorted_micro_batches()
    while len(micro_batches) % trainer.world_size:
        micro_batches.append(np.empty(0, dtype=np.int64))
    yield from micro_batches[trainer.rank :: trainer.world_size]
