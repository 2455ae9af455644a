"""How much the state of a token changes from level to level: the cosine between what it is behind
one level and behind another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class StateCosines:
    """The mean over all tokens of all batches, for each two levels."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())
        self._tokens = 0

    def add(self, states: Tensor, real: Tensor) -> None:
        """Take a batch in.

        :param states: what enters the stack and what leaves each level, `[N + 1, B, S, d]`.
        :param real: False where a position is padding, `[B, S]`.
        """
        tokens = F.normalize(states[:, real].double(), dim=-1)
        self._sum = self._sum + torch.einsum("itd,jtd->ij", tokens, tokens)
        self._tokens += int(real.sum())

    def value(self) -> Tensor:
        """Return the mean cosines, `[N + 1, N + 1]`, float64."""
        return self._sum / self._tokens
