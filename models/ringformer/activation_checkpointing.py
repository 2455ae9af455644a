"""What the backward pass finds kept from a ring's forward pass, and what it recomputes.

Always torch's non-reentrant form: the only one that works with every ZeRO stage when the levels
share their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Function = Callable[..., Tensor]

# The kernels behind `scaled_dot_product_attention`; without one of them all is recomputed.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(function: Function, *arguments: Any) -> Tensor:
    """Keep the arguments only."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return result


def recompute_but_attention(function: Function, *arguments: Any) -> Tensor:
    """Keep the arguments and the outputs of attention."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(
        function, *arguments, use_reentrant=False, context_fn=_keep_attention
    )
    return result


def _policy(context: object, operator: object, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operator in ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = partial(create_selective_checkpoint_contexts, _policy)
