"""These are the equations of a ring that encodes images: ONE layer runs for levels i = 1…N.

The layer differs from a plain pre-LN Transformer's, a ViT's:
- all levels share every projection; each level owns its LayerNorms and level signals;
- level signals read the level's input before its LayerNorm, and so cannot be folded into weights.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.config import LAYER_NORM_EPS
from models.ringformer.level_signal import apply
from models.ringformer.vision_weights import FeedForward, Level, SelfAttention, VisionRingWeights
from models.stack import LayerNorm


class VisionRing(VisionRingWeights):
    """Level i of a ring computes x ← x + Attention_i(x); x ← x + dropout(FFN_i(x))."""

    def forward(self, x: Tensor, read: int | None = None) -> Tensor:
        """Encode a batch.

        :param x: embedded class token and patches, `[B, S, d]`.
        :param read: how many positions, from the first on, the last level computes; None: all.
        :returns: the encoder output, before the final LayerNorm, `[B, read, d]`.
        """
        levels, positions = self.levels(), range(x.size(1))
        reads = [None] * (self.num_levels - 1) + [read]

        def at_level(i: int, x: Tensor) -> Tensor:
            return self.prepared_layer(self.add_encodings(x, i, positions), levels[i], reads[i])

        return self.run(x, at_level)

    def layer(self, x: Tensor, level: Level, read: int | None = None) -> Tensor:
        """Run one level: self-attention and feed-forward network.

        :param read: how many positions, from the first on, are computed; None: all.
        """
        x = x[:, :read] + self.self_attention(x, level.self_attn, read)
        return x + self.dropout(self.feed_forward(x, level.ffn))

    def self_attention(self, x: Tensor, own: SelfAttention, read: int | None = None) -> Tensor:
        """Return W_o · softmax(q_i k_iᵀ / √(d/H)) v_i + b_o, `[B, read, d]`."""
        q, k, v = self.qkv(x, own)
        return F.linear(self.attend(q[:, :, :read], k, v), own.output, own.output_bias)

    def qkv(self, x: Tensor, own: SelfAttention) -> tuple[Tensor, ...]:
        """Return q_i = W_q LN_i(x) + b_q + A_iᵀ B_i x, and k_i and v_i alike."""
        y = F.linear(self.norm(x, own.layer_norm), own.qkv, own.qkv_bias)
        if own.signal is not None:
            y = y + apply(x, own.signal)
        return self.heads(y, 3)

    def feed_forward(self, x: Tensor, own: FeedForward) -> Tensor:
        """Return FFN_i(x) = W_down · dropout(gelu(W_up LN_i(x + A_iᵀ B_i x) + b_up)) + b_down."""
        if own.static is not None:
            x = x + own.static
        if own.signal is not None:
            x = x + apply(x, own.signal)
        y = F.gelu(F.linear(self.norm(x, own.layer_norm), own.up, own.up_bias))
        return F.linear(self.dropout(y), own.down, own.down_bias)

    def norm(self, x: Tensor, layer_norm: LayerNorm) -> Tensor:
        """Return LN_i(x)."""
        return F.layer_norm(x, x.shape[-1:], *layer_norm, LAYER_NORM_EPS)
