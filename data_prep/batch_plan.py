"""The batch plan: which pairs each step of training sees.

The plan is a pure function of (lengths, seed, epoch, token budgets). Micro-batches of pairs of
similar length are shuffled and grouped into global batches; how many ranks and accumulation steps
share a global batch does not change what is in it. So a position in training is one number: the
step.
"""

from __future__ import annotations

import fcntl
import hashlib
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.files import digest_of, fsync
from data_prep.shards import open_shard, write_shard

BATCH_PLAN_VERSION = 3  # raise it when the same shards and seed would give other batches

Indices = NDArray[np.signedinteger[Any]]
"""Indices of pairs, `[pairs]`."""


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch is what one optimizer step sees."""

    micro_batches: list[Indices]
    """Indices of the pairs of each micro-batch, longest pair last."""

    source_tokens: int
    """Source tokens in all micro-batches, EOS included."""

    target_tokens: int
    """Target tokens in all micro-batches, EOS included: what the summed loss is divided by."""

    def share(self, rank: int, world_size: int) -> list[Indices]:
        """Return the micro-batches of one of `world_size` ranks, equally many for each.

        When the micro-batches do not divide among the ranks, each is first cut into as many
        fractions as makes them divide; a fraction can be empty.
        """
        fractions = fractions_of_each(len(self.micro_batches), world_size)
        return [
            self.micro_batches[i // fractions][i % fractions :: fractions]
            for i in range(rank, fractions * len(self.micro_batches), world_size)
        ]


def fractions_of_each(micro_batches: int, world_size: int) -> int:
    """Return into how many fractions to cut each micro-batch so that all ranks get as many."""
    return world_size // gcd(world_size, micro_batches)


class BatchPlan:
    """The plan gives the global batch of every step."""

    def __init__(
        self,
        source_lengths: NDArray[np.int32],
        target_lengths: NDArray[np.int32],
        *,
        max_tokens: int,
        micro_batch_tokens: int | None,
        seed: int,
        cache: Path | None = None,
    ) -> None:
        """Plan batches of pairs within a budget of tokens.

        :param source_lengths, target_lengths: tokens of each pair, EOS included, `[pairs]`.
        :param max_tokens: budget of a global batch: pairs × longest side, padding included, summed
            over its micro-batches.
        :param micro_batch_tokens: the same for one micro-batch; None: one micro-batch a step.
        :param cache: folder for the order of the current epoch, which ranks and later runs share.
        """
        lengths = np.stack([source_lengths, target_lengths])
        # Narrow keys are sorted by radix, ten times as fast; `_sorted` adds two lengths.
        self._lengths = lengths.astype(np.min_scalar_type(2 * int(lengths.max(initial=0))))
        self._micro_batch_tokens = micro_batch_tokens or max_tokens
        self.micro_batches_per_step = max_tokens // self._micro_batch_tokens
        self._seed = seed
        longest = np.sort(self._lengths.max(0), kind="stable")
        self._cuts = _cut_points(longest, self._micro_batch_tokens)
        self.steps_per_epoch = -(-len(self._cuts) // self.micro_batches_per_step)
        self._cache = cache
        self._epoch = -1
        self._pairs: Indices = np.empty(0, dtype=np.int32)
        self._begins: Indices = np.empty(0, dtype=np.int32)

    def micro_batches_per_rank(self, world_size: int) -> int:
        """Return how many micro-batches, or fractions of them, each rank gets in a step."""
        micro_batches = self.micro_batches_per_step
        return micro_batches * fractions_of_each(micro_batches, world_size) // world_size

    def __getitem__(self, step: int) -> GlobalBatch:
        """Return the batch of step 0, 1, …; steps go on into the epochs that follow."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            micro_batches = self._micro_batches(epoch)
            self._pairs = micro_batches.values.to_numpy()
            self._begins = micro_batches.offsets.to_numpy()
            self._epoch = epoch
        begin = index * self.micro_batches_per_step
        # The last global batch of an epoch is completed with micro-batches from its start.
        numbers = np.arange(begin, begin + self.micro_batches_per_step) % len(self._cuts)
        chosen = [self._pairs[self._begins[i] : self._begins[i + 1]] for i in numbers]
        source, target = (sum(int(side[micro].sum()) for micro in chosen) for side in self._lengths)
        return GlobalBatch(chosen, source, target)

    def _micro_batches(self, epoch: int) -> pa.ListArray:
        """Return the micro-batches of an epoch in its order, from the cache if there is one.

        The first rank that needs an epoch fills the cache, and the others wait for it.
        """
        if self._cache is None:
            return self._shuffled(epoch)
        digest = hashlib.sha256(self._lengths.data).hexdigest()
        inputs = [BATCH_PLAN_VERSION, digest, self._seed, self._micro_batch_tokens]
        names = [f"epoch-{n}-{digest_of([*inputs, n])[:16]}.arrow" for n in (epoch, epoch - 1)]
        path = self._cache / names[0]
        self._cache.mkdir(parents=True, exist_ok=True)
        with (self._cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return open_shard(path).column("pairs")
            except (OSError, pa.ArrowInvalid):  # not there, or damaged
                shuffled = self._shuffled(epoch)
            partial = path.with_suffix(".partial")
            try:
                write_shard(partial, pa.record_batch([shuffled], names=["pairs"]))
                fsync(partial)
                partial.replace(path)
                fsync(self._cache)
            except OSError:  # a full disk: training can go on without a cache
                partial.unlink(missing_ok=True)
                return shuffled
            # The epoch before stays: a slower rank may be reading it.
            for file in self._cache.glob("epoch-*"):
                if file.name not in names:
                    file.unlink()
            return open_shard(path).column("pairs")

    def _shuffled(self, epoch: int) -> pa.ListArray:
        """Return the micro-batches of an epoch in its order, computed anew."""
        generator = np.random.default_rng([self._seed, epoch])
        order = self._all_pairs()
        generator.shuffle(order)
        ends = np.append(self._cuts, len(order)).astype(np.int32)
        micro_batches = pa.ListArray.from_arrays(ends, self._sorted(order))
        return micro_batches.take(pa.array(generator.permutation(len(micro_batches))))

    def sorted_micro_batches(self) -> list[Indices]:
        """Return the micro-batches from the shortest pairs to the longest, each pair once."""
        return list(np.split(self._sorted(self._all_pairs()), self._cuts[1:]))

    def largest_micro_batch(self) -> Indices:
        """Return the micro-batch with most positions, padding included."""
        order, pairs, widths = self._shapes()
        largest = int(np.argmax(pairs * widths))
        return order[self._cuts[largest] :][: pairs[largest]]

    def _all_pairs(self) -> NDArray[np.int32]:
        return np.arange(self._lengths.shape[1], dtype=np.int32)

    def _sorted(self, order: NDArray[np.int32]) -> NDArray[np.int32]:
        """Sort pairs by their longer side, shortest first.

        Pairs with an equally long longer side go from the longest targets to the longest sources,
        and back in the next length: neighbours are alike on both sides. Pairs of equal lengths
        stay in the order that they have.
        """
        source, target = self._lengths
        longest = np.maximum(source, target)
        leaning = longest + np.where(longest % 2, source - target, target - source)
        for key in (leaning, longest):
            order = order[np.argsort(key[order], kind="stable")]
        return order

    def padding_share(self) -> float:
        """Return the share of padding among the source and target positions of an epoch."""
        _, pairs, widths = self._shapes()
        return 1 - float(self._lengths.sum()) / float(pairs @ widths)

    def _shapes(self) -> tuple[Indices, Indices, Indices]:
        """Return all pairs, sorted; and of each micro-batch, its pairs and the positions of one."""
        order = self._sorted(self._all_pairs())
        pairs = np.diff(self._cuts, append=len(order))
        widths = np.maximum.reduceat(self._lengths[:, order], self._cuts, axis=1).sum(0)
        return order, pairs, widths


def _cut_points(sorted_longest: NDArray[Any], budget: int) -> Indices:
    """Return where micro-batches begin so that pairs × longest side stays within the budget."""
    cuts = []
    begin = 0
    while begin < len(sorted_longest):
        cuts.append(begin)
        window = sorted_longest[begin : begin + budget // int(sorted_longest[begin]) + 1]
        cost = np.arange(1, len(window) + 1) * window
        begin += max(1, int(np.searchsorted(cost, budget, side="right")))
    return np.array(cuts)
