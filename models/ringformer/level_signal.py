"""Level signals tell the shared layer at which level it runs (paper, section 3).

At level i a projection W of the shared layer becomes W + M_i with M_i = A_iᵀ B_i of rank r. Since
M_i is linear, it can be applied to the tokens or folded into the weight, with the same result.
Folding was faster at base size (docs/design.md).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

INIT_STD = 1e-6  # of B; A starts at zero: at step 0 the ring is a plain weight-tied Transformer


class Signal(NamedTuple):
    """A signal is A and B, each `[…, r, d]`, where … may be levels and projections."""

    a: Tensor
    b: Tensor


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
