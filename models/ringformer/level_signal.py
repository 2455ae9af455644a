"""Level signals: what tells an iteration of the ring where in depth it is (paper, section 3).

A projection W of the shared layer becomes, at level i, W + M_i with M_i = A_iᵀ B_i of rank r.
Because M_i is linear it folds into the weight exactly; both forms below compute the paper's
q = W x + M_i x and FFN_i(x) = W_down · dropout(gelu(W_up (x + M_i x))).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIGNAL_INIT_STD = 1e-6  # A starts at zero: at step 0 the ring is a plain weight-tied Transformer


def _signal(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    a, b = torch.zeros(shape), torch.empty(shape).normal_(std=SIGNAL_INIT_STD)
    return nn.Parameter(a), nn.Parameter(b)


class LevelProjection(nn.Module):
    """`num_projections` projections of one input (q, k, v), each with its own level signals."""

    def __init__(self, model_dim: int, num_projections: int, num_levels: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_projections, model_dim, model_dim))
        self.signal_a, self.signal_b = _signal(num_levels, num_projections, rank, model_dim)
        for projection in self.weight:
            nn.init.xavier_uniform_(projection)

    def forward(self) -> Tensor:
        """:returns: the folded weights W + A_iᵀ B_i of all levels, `[N, num_projections·d, d]`."""
        return (self.weight + self.signal_a.mT @ self.signal_b).flatten(1, 2)


class LevelFeedForward(nn.Module):
    """The shared feed-forward network; the signal is added to its input."""

    def __init__(
        self, model_dim: int, inner_dim: int, num_levels: int, rank: int, dropout: float
    ) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(inner_dim, model_dim))
        self.down = nn.Parameter(torch.empty(model_dim, inner_dim))
        self.signal_a, self.signal_b = _signal(num_levels, rank, model_dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.up)
        nn.init.xavier_uniform_(self.down)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """:param x: `[B, S, d]`. Factored form: costs 4·r·d a token instead of a folded W_up."""
        x = x + (x @ self.signal_b[level].T) @ self.signal_a[level]
        return F.linear(self.dropout(F.gelu(F.linear(x, self.up))), self.down)
