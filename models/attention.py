"""Attention, by the kernels that are fastest where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 64  # keys
ONE_TILE = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the latter for float64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Return softmax(q kᵀ / √(d/H) + mask) v, head by head.

    :param q: `[B, H, T, d/H]`.
    :param k, v: `[B, H, S, d/H]`.
    :param mask: which of the S may be looked at: 0, else -inf, or True, else False; None: all.
    :param causal: a position looks at itself and those before it; in place of a mask.
    :returns: `[B, H, T, d/H]`.
    """
    if q.requires_grad and q.device.type == "cpu" and q.dtype.itemsize == 2:
        # There the fused kernel's gradient takes ten times as long as products and softmax.
        return attention_weights(q, k, mask, causal=causal) @ v
    if q.is_cuda and not is_compiling() and (k.size(2) <= SHORT or not q.requires_grad):
        # cuDNN's kernel, which torch would choose, is for long sequences: of 32 tokens it takes 1.5
        # times as long (docs/benchmarks.md), and it is built anew for every shape.
        with sdpa_kernel(ONE_TILE):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return softmax(q kᵀ / √(d/H) + mask); the parameters are those of `attention`.

    :returns: `[B, H, T, S]`; a row is a query's and sums to 1.
    """
    scores: Tensor = (q * q.size(-1) ** -0.5) @ k.mT
    if causal:
        mask = scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    elif mask is not None and mask.dtype == torch.bool:
        mask = bias_of(mask, scores.dtype)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1)


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores where a mask is True: 0, and elsewhere: -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
