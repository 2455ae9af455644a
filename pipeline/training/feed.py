"""From the batch plan to a rank's collated micro-batches, read some steps ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Generic

import torch

from data_prep.batch_plan import Indices
from pipeline.training.task import Batch, Task


@dataclass(frozen=True)
class Share(Generic[Batch]):
    """One rank's share of a global batch, collated."""

    micro_batches: list[Batch]

    examples: list[Indices]
    """The numbers of the examples in each of them."""

    units: int
    """The size of the whole global batch, in the task's units."""

    normaliser: int
    """What the summed loss of the whole global batch is divided by."""

    @property
    def positions(self) -> int:
        """Positions that this rank computes, padding included."""
        return sum(batch.positions for batch in self.micro_batches)


def feed(
    task: Task[Batch],
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    first_step: int,
    read_ahead_steps: int,
) -> Iterator[Share[Batch]]:
    """Yield what `rank` works on in `first_step`, `first_step` + 1, …, collated ahead.

    Each of the steps to come is read by a thread of its own.
    """

    def prepare(step: int) -> Share[Batch]:
        batch = task.plan[step]
        examples = batch.share(rank, world_size)
        collated = [task.collate(indices, device) for indices in examples]
        return Share(collated, examples, task.units(batch), task.normaliser(batch))

    threads = ThreadPoolExecutor(read_ahead_steps, thread_name_prefix="feed")
    steps = count(first_step)
    try:
        ahead = deque(threads.submit(prepare, next(steps)) for _ in range(read_ahead_steps))
        while True:
            ready = ahead.popleft().result()
            ahead.append(threads.submit(prepare, next(steps)))
            yield ready
    finally:
        threads.shutdown(cancel_futures=True)
