"""This module makes the sinusoids that tell positions in a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag, PositionEncoder
from torch import Tensor
from typing_extensions import Self


def sinusoids(length: int, dim: int) -> Tensor:
    """Return the table of positions: sin in even, cos in odd columns, angle p / 10000^{i/d}.

    fairseq2's own table keeps sines and cosines apart, in halves.

    :returns: `[length, dim]`, float32.
    """
    position = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
    angles = position * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class InterleavedSinusoids(PositionEncoder):
    """The encoder adds sinusoidal positions, interleaved as in the published model.

    The table is a buffer because a frozen Parameter would break ZeRO-3's recomputation. It keeps
    its precision when the model is cast to another.
    """

    table: Tensor

    def __init__(self, dim: int, max_seq_len: int, *, persistent: bool = True) -> None:
        """Make the table.

        :param persistent: whether it is part of the state dict.
        """
        super().__init__(dim)
        self.register_buffer("table", sinusoids(max_seq_len, dim), persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        table = self.table
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not table.is_meta:
            self.table = table.to(self.table.device)
        return self

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """Add positions to embeddings.

        :param seqs: `[B, S, d]`.
        :param state_bag: its `step_nr` is the first position.
        :returns: same shape.
        :raises ValueError: the sequence is longer than the table.
        """
        begin = state_bag.step_nr if state_bag is not None else 0
        return seqs + self.at(range(begin, begin + seqs.size(1))).to(seqs.dtype)

    def at(self, positions: range) -> Tensor:
        """Return what is added at these positions.

        :returns: `[S, d]`.
        :raises ValueError: the table ends before.
        """
        if positions.stop > self.table.size(0):
            raise ValueError(
                f"A sequence of {positions.stop} tokens exceeds model.max_seq_len "
                f"({self.table.size(0)})."
            )
        return self.table[positions.start : positions.stop]
