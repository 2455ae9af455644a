"""From the batch plan to a rank's collated micro-batches, read some steps ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Generic

import numpy as np
import torch

from data_prep.batch_plan import Indices
from pipeline.training.task import Batch, Task


@dataclass(frozen=True)
class Share(Generic[Batch]):
    """One rank's share of a global batch, collated."""

    micro_batches: list[Batch]

    seeds: list[int]
    """Of each: of its augmentation, and of its dropout."""

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


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the seed of a micro-batch, numbered within its global batch.

    It depends on the place of a micro-batch in training alone: whoever works on it, and however
    often training was resumed.

    :param seed: the recipe's.
    """
    entropy = np.random.SeedSequence([seed, step, micro_batch])
    return int(entropy.generate_state(1, np.uint64)[0]) >> 1


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
        places = range(rank, len(examples) * world_size, world_size)
        seeds = [micro_batch_seed(task.recipe.training.seed, step, place) for place in places]
        collated = [
            task.collate(indices, seed, device)
            for indices, seed in zip(examples, seeds, strict=True)
        ]
        return Share(collated, seeds, examples, task.units(batch), task.normaliser(batch))

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
