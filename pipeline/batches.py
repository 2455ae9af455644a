"""From shards to batches: the batch plan, and collation.

The plan is a pure function of (lengths, seed, epoch, token budgets). Micro-batches of sentences of
similar length are shuffled and grouped into global batches; how many ranks and accumulation steps
share a global batch does not change what is in it. So a position in training is one number: the
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from fairseq2.nn import BatchLayout
from numpy.typing import NDArray
from torch import Tensor

from data_prep.shards import ShardReader, TokenIds
from data_prep.vocabulary import BOS_IDX, PAD_IDX

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step sees."""

    micro_batches: list[Indices]
    """Sentence indices of each micro-batch, longest last."""

    target_tokens: int
    """Target tokens in all of them, EOS included: what the summed loss is divided by."""

    def share(self, rank: int, world_size: int) -> list[Indices]:
        """The micro-batches of one of `world_size` ranks, equally many for each.

        When the micro-batches do not divide among the ranks, each is first split into as many
        pieces as makes them divide; a piece can be empty.
        """
        pieces = world_size // gcd(world_size, len(self.micro_batches))
        split = [micro[i::pieces] for micro in self.micro_batches for i in range(pieces)]
        return split[rank::world_size]


class BatchPlan:
    """The global batches of all steps."""

    def __init__(
        self,
        source_lengths: NDArray[np.int32],
        target_lengths: NDArray[np.int32],
        *,
        max_tokens: int,
        micro_batch_tokens: int | None,
        seed: int,
    ) -> None:
        """
        :param source_lengths, target_lengths: tokens of each pair, EOS included, `[pairs]`.
        :param max_tokens: budget of a global batch: sentences × longest side, padding included,
            summed over its micro-batches.
        :param micro_batch_tokens: the same for one micro-batch; None: one micro-batch a step.
        """
        self._lengths = np.stack([source_lengths, target_lengths])
        self._micro_batch_tokens = micro_batch_tokens or max_tokens
        self.micro_batches_per_step = max(1, max_tokens // self._micro_batch_tokens)
        self._seed = seed
        longest = np.sort(self._lengths.max(0))
        self._cuts = _cut_points(longest, self._micro_batch_tokens)
        self.steps_per_epoch = -(-len(self._cuts) // self.micro_batches_per_step)
        self._epoch = -1
        self._micro_batches: list[Indices] = []

    def __getitem__(self, step: int) -> GlobalBatch:
        """The batch of step 0, 1, …, over as many epochs as it takes."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._micro_batches = epoch, self._shuffled(epoch)
        begin = index * self.micro_batches_per_step
        # The last global batch of an epoch is completed with micro-batches from its start.
        end = begin + self.micro_batches_per_step
        micro_batches = [
            self._micro_batches[i % len(self._micro_batches)] for i in range(begin, end)
        ]
        target_tokens = sum(int(self._lengths[1, micro].sum()) for micro in micro_batches)
        return GlobalBatch(micro_batches, target_tokens)

    def _shuffled(self, epoch: int) -> list[Indices]:
        generator = np.random.default_rng([self._seed, epoch])
        micro_batches = self.sorted_micro_batches(generator.permutation(self._lengths.shape[1]))
        return [micro_batches[i] for i in generator.permutation(len(micro_batches))]

    def sorted_micro_batches(self, tie_break: Indices | None = None) -> list[Indices]:
        """Every pair once, shortest first; pairs of equal lengths in the order of `tie_break`."""
        longest, shortest = self._lengths.max(0), self._lengths.min(0)
        ties = np.arange(len(longest)) if tie_break is None else tie_break
        order = np.lexsort((ties, shortest, longest))
        return np.split(order, self._cuts[1:])

    def padding_share(self) -> float:
        """Share of padding among the source and target positions of an epoch."""
        padded = sum(
            len(micro) * int(self._lengths[:, micro].max(1).sum())
            for micro in self.sorted_micro_batches()
        )
        return 1 - float(self._lengths.sum()) / padded


def _cut_points(sorted_longest: NDArray[np.int32], budget: int) -> list[int]:
    """Where a new micro-batch begins, so that sentences × longest side stays within budget."""
    cuts = []
    begin = 0
    while begin < len(sorted_longest):
        cuts.append(begin)
        window = sorted_longest[begin : begin + budget]
        cost = np.arange(1, len(window) + 1) * window
        begin += max(1, int(np.searchsorted(cost, budget, side="right")))
    return cuts


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch; sequences are padded on the right."""

    source: Tensor
    """Token ids with EOS `[B, S]`."""

    source_layout: BatchLayout

    target_input: Tensor
    """BOS and the target without its EOS `[B, T]`."""

    target_layout: BatchLayout

    targets: Tensor
    """Target token ids with EOS `[B, T]`."""


def collate(reader: ShardReader, indices: Indices, device: torch.device) -> Batch:
    """Read and pad the pairs `indices`.

    For an empty micro-batch (more ranks than sentences) it is a pair without anything to predict,
    so that all ranks take part in the step.
    """
    pairs = [reader[int(index)] for index in (indices if len(indices) else [0])]
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    source, target = _pad(sources), _pad(targets)
    target_input = np.concatenate(
        [np.full((len(target), 1), BOS_IDX, dtype=np.int64), target[:, :-1]], axis=1
    )
    if not len(indices):
        target[:] = PAD_IDX
    tensors = [torch.from_numpy(ids).to(device) for ids in (source, target_input, target)]
    return Batch(
        tensors[0],
        BatchLayout.of(tensors[0], [len(ids) for ids in sources]),
        tensors[1],
        BatchLayout.of(tensors[1], [len(ids) for ids in targets]),
        tensors[2],
    )


def _pad(sequences: list[TokenIds]) -> NDArray[np.int64]:
    lengths = np.array([len(ids) for ids in sequences])
    padded = np.full((len(sequences), lengths.max()), PAD_IDX, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(sequences)
    return padded
