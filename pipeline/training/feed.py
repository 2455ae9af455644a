"""TODO docstring."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import torch

from data_prep.batch_plan import BatchPlan, Indices
from data_prep.shards import ShardReader
from pipeline.translation.batches import Batch, collate


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of a global batch, collated."""

    micro_batches: list[Batch]

    sentences: list[Indices]
    """Sentence indices of each of them."""

    source_tokens: int
    """Of the whole global batch, as `target_tokens`."""

    target_tokens: int

    @property
    def positions(self) -> int:
        """Source and target positions of this rank, padding included."""
        return sum(batch.source.numel() + batch.targets.numel() for batch in self.micro_batches)


def feed(
    plan: BatchPlan,
    reader: ShardReader,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
    first_step: int,
) -> Iterator[StepBatches]:
    """What `rank` works on in `first_step`, `first_step` + 1, …, collated one step ahead."""

    def prepare(step: int) -> StepBatches:
        batch = plan[step]
        sentences = batch.share(rank, world_size)
        collated = [collate(reader, indices, device) for indices in sentences]
        return StepBatches(collated, sentences, batch.source_tokens, batch.target_tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        ahead = thread.submit(prepare, first_step)
        for step in count(first_step + 1):
            ready = ahead.result()
            ahead = thread.submit(prepare, step)
            yield ready
