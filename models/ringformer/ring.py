"""These are the ring's equations: ONE layer runs for levels i = 1…N (arXiv 2502.13181).

The layer differs from a plain post-LN Transformer's:
- all levels share every projection; each level owns its LayerNorms and level signals;
- level signals are folded into the weights once per forward pass (`weights.py`), or applied;
- q, k and v are one product;
- cross-attention has no level signal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import LAYER_NORM_EPS
from models.ringformer.decoder_state import Append
from models.ringformer.level_signal import apply
from models.ringformer.weights import CrossAttention, FeedForward, Level, RingWeights, SelfAttention
from models.stack import LayerNorm


class Ring(RingWeights):
    """Level i of a ring computes x ← LN_i(x + sublayer_i(x)), sublayer by sublayer."""

    causal: bool  # whether a position sees only itself and those before it

    def layer(
        self, x: Tensor, level: Level, mask: Tensor | None, cross: CrossAttention | None,
        append: Append | None = None,
    ) -> Tensor:  # fmt: skip
        """Run one level: self-attention, in a decoder cross-attention, and feed-forward network.

        :param mask: of self-attention: 0 or True where it may look; None: everywhere, or causal.
        :param append: while decoding, puts k_i and v_i behind those of earlier positions.
        """
        y = self.self_attention(x, level.self_attn, mask, append)
        x = self.add_norm(x, y, level.self_attn.layer_norm)
        if cross is not None:
            x = self.add_norm(x, self.cross_attention(x, cross), cross.layer_norm)
        if level.ffn is not None:
            x = self.add_norm(x, self.feed_forward(x, level.ffn), level.ffn.layer_norm)
        return x

    def self_attention(
        self, x: Tensor, own: SelfAttention, mask: Tensor | None, append: Append | None
    ) -> Tensor:
        """Return W_o · softmax(q_i k_iᵀ / √(d/H)) v_i."""
        q, k, v = self.qkv(x, own)
        if append is not None:
            k, v = append(k, v)
        return F.linear(self.attend(q, k, v, mask, self.causal and mask is None), own.output)

    def qkv(self, x: Tensor, own: SelfAttention) -> tuple[Tensor, ...]:
        """Return q_i = W_q x + A_iᵀ B_i x, and k_i and v_i alike."""
        y = F.linear(x, own.qkv, own.qkv_bias)
        if own.signal is not None:
            y = y + apply(x, own.signal)
        return self.heads(y, 3)

    def cross_attention(self, x: Tensor, cross: CrossAttention) -> Tensor:
        """Return W_o · softmax(q kᵀ / √(d/H)) v, where k and v are of the encoder output."""
        (q,) = self.heads(F.linear(x, cross.q), 1)
        return F.linear(self.attend(q, cross.k, cross.v, cross.mask), cross.output)

    def feed_forward(self, x: Tensor, own: FeedForward) -> Tensor:
        """Return FFN_i(x) = W_down · dropout(gelu(W_up (x + A_iᵀ B_i x)))."""
        if own.signal is not None:
            x = x + apply(x, own.signal)
        return F.linear(self.dropout(F.gelu(F.linear(x, own.up, own.up_bias))), own.down)

    def add_norm(self, x: Tensor, y: Tensor, layer_norm: LayerNorm) -> Tensor:
        """Return LN_i(α x + dropout(y))."""
        x = torch.add(self.dropout(y), x, alpha=self.residual_scale)
        return F.layer_norm(x, x.shape[-1:], *layer_norm, LAYER_NORM_EPS)
