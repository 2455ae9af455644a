"""This dropout is `F.dropout`, but on a CPU, where that spends most of its time on random numbers.

It makes a number of 32 bits for each element; here one of 64 bits serves four.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS = 16  # of an element's random number: p is a multiple of 2⁻¹⁶
NUMBERS = 1 << BITS


class Dropout(nn.Dropout):
    """The module of `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements out while training."""
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return x / (1 - p) with elements dropped out, each with probability p; not training, x.

    :returns: the same shape; the same for the same state of torch's random numbers.
    """
    if not training or not p:
        return x
    # A compiler has faster random numbers of its own, and would stop at ours.
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = int(p * NUMBERS)
    # All 64 bits are random only if both bounds are given.
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.empty_like(x)  # 0 or 1, without a Boolean in between
    torch.ge(numbers, dropped - NUMBERS // 2, out=kept)
    return x * kept.mul_(NUMBERS / (NUMBERS - dropped))


def replace_dropouts(model: nn.Module) -> None:
    """Put `Dropout` in the places of torch's own modules."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
