"""What training tells while it runs: lines in the log, a bar on a terminal, metrics for MLflow."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.preflight import GIB
from pipeline.training.task import Batch, Task

log = logging.getLogger("train")


@dataclass
class Window:
    """Counts what happened since the last progress line; `loss`, `positions` and `waited` are this
    rank's."""

    loss: torch.Tensor
    """Summed over the targets."""

    steps: int = 0

    units: int = 0
    """The size of the global batches, in the task's units."""

    normaliser: int = 0
    """The number of their targets."""

    positions: int = 0
    """Positions that were computed, padding included."""

    waited: float = 0.0
    """Seconds without a batch to work on."""

    since: float = field(default_factory=time.monotonic)

    def metrics(
        self, task: Task[Batch], total_loss: float, total_positions: float, waited: float
    ) -> dict[str, float]:
        """Return what MLflow gets.

        :param total_loss, total_positions: summed over all ranks.
        :param waited: the mean of the ranks.
        """
        seconds = time.monotonic() - self.since
        # When all steps were skipped there is neither loss nor padding.
        loss = total_loss / self.normaliser if self.normaliser else math.nan
        padding = 1 - self.units / total_positions if total_positions else math.nan
        return {
            **task.loss_metrics(loss),
            f"speed/{task.unit}_per_second": self.units / seconds,
            f"speed/{task.target_unit}_per_second": self.normaliser / seconds,
            "speed/steps_per_second": self.steps / seconds,
            "speed/padding_share": padding,
            "speed/data_wait_share": waited / seconds,
            "speed/memory_gib": memory(self.loss.device) / GIB,
        }


def memory(device: torch.device) -> int:
    """Return the GPU's peak so far, or what the process holds now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def progress_line(
    task: Task[Batch], metrics: dict[str, float], step: int, last_step: int, eta: float
) -> str:
    """Return what the log says of a step.

    :param eta: seconds to the last step.
    """
    parts = [
        f"step {step}/{last_step}",
        f"epoch {metrics['epoch']:.2f}",
        task.in_words(task.loss_metrics(metrics["train_loss"])),
        f"lr {metrics['learning_rate']:.2e}",
        f"grad norm {metrics['grad_norm']:.2f}",
        f"{metrics[f'speed/{task.unit}_per_second']:,.0f} {task.unit}/s",
        f"padding {metrics['speed/padding_share']:.1%}",
        f"data wait {metrics['speed/data_wait_share']:.1%}",
        f"{metrics['speed/memory_gib']:.2f} GiB",
        f"ETA {timedelta(seconds=round(eta))}",
    ]
    return " | ".join(parts)


def rate_line(task: Task[Batch], window: Window, step: int, last_step: int, eta: float) -> str:
    """Return what can be said of a step without asking the other ranks.

    :param eta: seconds to the last step.
    """
    rate = window.units / (time.monotonic() - window.since)
    return (
        f"step {step}/{last_step} | {rate:,.0f} {task.unit}/s | ETA {timedelta(seconds=round(eta))}"
    )


def start_logging(rank: int) -> Console | None:
    """Log to stderr: rank 0 everything, the others their errors.

    :returns: the terminal that rank 0 writes to, if it is one.
    """
    console = Console(stderr=True)
    if rank == 0 and console.is_terminal:
        handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False, highlighter=None
        )
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
        return console
    name = "%(name)s" if rank == 0 else f"%(name)s: rank {rank}"
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format=f"{name}: %(message)s")
    return None


def progress_bar(console: Console | None) -> Progress:
    """Return a bar over the steps; it shows nothing without a terminal."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=console is None)
