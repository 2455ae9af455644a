"""These functions keep less for the backward pass and recompute the rest in it.

Recomputing always takes torch's non-reentrant form: the only one that works with every ZeRO stage
when the levels share their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

P = ParamSpec("P")

# The kernels behind `scaled_dot_product_attention`; without one of them all is recomputed.
ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_keep = partial(create_selective_checkpoint_contexts, ATTENTION)
# Torch's compiler fails where it is to compute dropout again (2.9: "… was invalid, but is output").
_keep_when_compiled = partial(
    create_selective_checkpoint_contexts, [*ATTENTION, torch.ops.aten.native_dropout.default]
)


def recompute(function: Callable[[range, Tensor], Tensor], levels: range, x: Tensor) -> Tensor:
    """Return `function(levels, x)`, and keep only `x` for the backward pass."""
    result: Tensor = checkpoint(function, levels, x, use_reentrant=False)
    return result


def recompute_but_attention(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make `function` keep only its arguments and the outputs of attention."""

    def recomputed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        result: Tensor = checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=_keep_when_compiled if torch.compiler.is_compiling() else _keep,
            **kwargs,  # type: ignore[arg-type]
        )
        return result

    return recomputed
