"""Level signals tell the shared layer at which level it runs (paper, section 3).

At level i a projection W of the shared layer becomes W + M_i with M_i = A_iᵀ B_i of rank r. Since
M_i is linear, it can be folded into the weight or applied to the tokens, with the same result.
Folding is faster with many tokens. With few, time goes into reading weights, and those that all
levels share stay in the cache (docs/design.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 1e-6  # of B; A starts at zero: at step 0 the ring is a plain weight-tied Transformer
SMALL = 1 << 16  # numbers, zeros included, of which one product takes less time than several


class Signal(NamedTuple):
    """A signal is A and B, each `[…, r, d]`, where … may be levels and projections.

    One level's has A and B of all its projections: B is `[k·r, d]`, and A either `[k, r, d]` or, if
    it is small, a matrix `[k·r, k·d]` that has them on its diagonal.
    """

    a: Tensor
    b: Tensor


def parameters(num_levels: int, *shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Make A and B of every level, each `[N, *shape]`."""
    a = torch.zeros(num_levels, *shape)
    b = torch.empty(num_levels, *shape).normal_(std=INIT_STD)
    return nn.Parameter(a), nn.Parameter(b)


def of_levels(signal: Signal) -> list[Signal]:
    """Return each level's signal.

    :param signal: of one projection `[N, r, d]`, or of k projections `[N, k, r, d]`.
    """
    a, b = signal.a, signal.b.flatten(1, -2)
    if a.dim() == 4 and a[0].numel() * a.size(1) <= SMALL:
        a = a.movedim(1, -1).diag_embed(dim1=1, dim2=3).flatten(3).flatten(1, 2)
    return [Signal(*own) for own in zip(a, b, strict=True)]


def apply(x: Tensor, signal: Signal) -> Tensor:
    """Return M x = Aᵀ(B x).

    :param x: `[…, d]`.
    :param signal: of one level.
    :returns: `[…, d]`, or k projections' behind each other `[…, k·d]`.
    """
    low = F.linear(x, signal.b)
    if signal.a.dim() == 2:
        return low @ signal.a
    parts = zip(low.chunk(len(signal.a), -1), signal.a, strict=True)
    return torch.cat([part @ a for part, a in parts], dim=-1)


def fold(weight: Tensor, signal: Signal) -> Tensor:
    """Return W + AᵀB, with which q = W x + M x is one product.

    :param weight: `[…, d, d]`.
    :returns: `[…, d, d]`.
    """
    return weight + signal.a.mT @ signal.b


def fold_into_input(weight: Tensor, signal: Signal) -> Tensor:
    """Return W (I + AᵀB), with which W (x + M x) is one product.

    :param weight: `[…, m, d]`.
    :returns: `[…, m, d]`.
    """
    return weight + (weight @ signal.a.mT) @ signal.b
