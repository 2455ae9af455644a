"""A ring's decoder keeps this state from one decoding step to the next.

The hypotheses of a sentence (its beam) are consecutive rows of the batch. They are decoded as query
positions of one sequence, so neither the sentence's encoder output nor its cache is ever copied for
each of them: all write into one cache, and `visible` says what in it is whose past.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from fairseq2.nn import IncrementalState
from torch import Tensor

from models.ringformer.weights import CrossAttention

CAPACITY_INCREMENT = 16  # decoding steps by which a cache grows

Append = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Adds a step's keys and values to a level's cache and returns all of them."""


class Cache:
    """A cache holds the keys and values of a level's self-attention so far."""

    def __init__(self) -> None:
        self.keys_values: Tensor | None = None  # [2, B, H, capacity, d/H]

    def append(self, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Add a step's keys and values.

        :param k, v: of the positions before `end`, `[B, H, T, d/H]`.
        :returns: those of all positions before `end`, `[B, H, end, d/H]`.
        """
        begin = end - k.size(2)
        if self.keys_values is None or self.keys_values.size(3) < end:
            room = k.new_empty(2, *k.shape[:2], k.size(2) * CAPACITY_INCREMENT, k.size(3))
            kept = [] if self.keys_values is None else [self.keys_values[:, :, :, :begin]]
            self.keys_values = torch.cat([*kept, room], dim=3)
        self.keys_values[0, :, :, begin:end] = k
        self.keys_values[1, :, :, begin:end] = v
        keys, values = self.keys_values[:, :, :, :end].unbind()
        return keys, values


class DecoderState(IncrementalState):
    """The state is of B sentences with K hypotheses each: rows b·K to b·K + K - 1 of the batch."""

    def __init__(self, cross: list[CrossAttention]) -> None:
        self.cross = cross
        self.caches = [Cache() for _ in cross]
        k = cross[0].k
        self.visible = torch.ones(k.size(0), 1, 0, dtype=torch.bool, device=k.device)
        """True where a position belongs to a hypothesis' past, `[B, K, positions]`."""

    def begin_step(self, seqs: Tensor) -> tuple[Tensor, Tensor]:
        """Turn hypotheses into query positions of their sentences.

        :param seqs: one position of each hypothesis `[B·K, 1, d]`; in the first step `[B, T, d]`.
        :returns: `seqs` as queries `[B, K or T, d]`, and their mask `[B, 1, K or T, positions]`.
        :raises ValueError: several positions after the first step.
        """
        batch, _, past = self.visible.shape
        if seqs.size(1) > 1 and past:
            raise ValueError("After the first call, decode one position at a time.")
        x = seqs.reshape(batch, -1, seqs.size(2))
        width = x.size(1)
        # Hypotheses see themselves, not each other; positions of a prompt see those before them.
        new = torch.eye(width, dtype=torch.bool, device=x.device)
        if seqs.size(1) > 1:
            new = torch.ones_like(new).tril()
        seen = self.visible.expand(-1, width, -1)
        mask = torch.cat([seen, new.expand(batch, -1, -1)], dim=2)
        self.visible = mask[:, -1:] if seqs.size(1) > 1 else mask
        return x, mask[:, None]

    def reorder(self, new_order: Tensor) -> None:
        """Put the batch in a new order, which may be on the host.

        The hypotheses of a sentence may change places and multiply; sentences may leave.

        Where sentences keep unequally many hypotheses, each becomes a sentence of its own.
        """
        batch, beam_size, _ = self.visible.shape
        sentences, slots = zip(*(divmod(row, beam_size) for row in new_order.tolist()), strict=True)
        runs = [(sentence, len(list(rows))) for sentence, rows in groupby(sentences)]
        kept = [sentence for sentence, _ in runs]
        if len(set(kept)) < len(kept) or len({length for _, length in runs}) > 1:
            kept = list(sentences)
        device = self.visible.device
        index = torch.tensor(kept, device=device)
        places = torch.tensor(slots, device=device).view(len(kept), -1)
        self.visible = self.visible[index[:, None], places]
        if kept != list(range(batch)):
            self._keep(index)

    def _keep(self, sentences: Tensor) -> None:
        for cache in self.caches:
            if cache.keys_values is not None:
                cache.keys_values = cache.keys_values.index_select(1, sentences)
        selected: dict[int, Tensor] = {}  # levels share the mask, and a ring's keys and values

        def select(tensor: Tensor) -> Tensor:
            if id(tensor) not in selected:
                selected[id(tensor)] = tensor.index_select(0, sentences)
            return selected[id(tensor)]

        self.cross = [
            cross._replace(
                k=select(cross.k),
                v=select(cross.v),
                mask=None if cross.mask is None else select(cross.mask),
            )
            for cross in self.cross
        ]

    def size_bytes(self) -> int:
        """Return the same as `capacity_bytes`."""
        return self.capacity_bytes()

    def capacity_bytes(self) -> int:
        """Return the size of keys and values, shared ones counted once."""
        held = {id(t): t.nbytes for c in self.cross for t in (c.k, c.v)}
        caches = (cache.keys_values for cache in self.caches)
        return sum(held.values()) + sum(cache.nbytes for cache in caches if cache is not None)
