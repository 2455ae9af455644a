"""RingFormer's encoder and decoder: ONE layer each, run for levels i = 1…N (arXiv 2502.13181).

How it differs from a plain post-LN Transformer:
- every projection is shared by all levels; each level owns its LayerNorms and level signals;
- level signals are folded into the weights once per forward pass (`stack.py`, which has all that
  is not in the equations); q, k and v are one product;
- cross-attention has no level signal and the encoder output is the same at every level, so its
  keys and values are computed once, not N times, and are cached once while decoding;
- sequences are padded on the right, so causal self-attention never sees padding and needs no mask;
- while decoding, the hypotheses of a sentence share its cache (`decoder_state.py`).

The rivals that differ in what a level owns are this same code: `OWNED_BY_LEVELS`.
"""

from __future__ import annotations

from fairseq2.models.transformer import TransformerDecoder, TransformerEncoder
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import functional as F

from models.config import LAYER_NORM_EPS
from models.positions import padding_mask
from models.ringformer.decoder_state import Append, decode_step
from models.ringformer.stack import Cross, DecoderStack, Level, Stack


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √(d/H)) v, head by head: `[B, H, S, d/H]` → `[B, S, d]`."""
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return heads.transpose(1, 2).flatten(2)


class Ring(Stack):
    """The ring, and the equations of its level i, which alone owns A_i, B_i and LN_i."""

    def qkv(self, x: Tensor, level: Level) -> tuple[Tensor, ...]:
        """q_i = (W_q + A_iᵀ B_i) x, and k_i and v_i alike."""
        return self.heads(F.linear(x, level.qkv, level.qkv_bias), 3)

    def self_attention(
        self, x: Tensor, level: Level, mask: Tensor | None, *, causal: bool = False,
        append: Append | None = None,
    ) -> Tensor:  # fmt: skip
        """W_o · softmax(q_i k_iᵀ / √(d/H)) v_i. :param append: puts k_i and v_i behind the past."""
        q, k, v = self.qkv(x, level)
        if append is not None:
            k, v = append(k, v)
        return F.linear(attend(q, k, v, mask, causal), level.self_attn_output)

    def cross_attention(self, x: Tensor, cross: Cross, mask: Tensor | None) -> Tensor:
        """W_o · softmax(q kᵀ / √(d/H)) v, where k and v are of the encoder output."""
        (q,) = self.heads(F.linear(x, cross.q), 1)
        return F.linear(attend(q, cross.k, cross.v, mask), cross.output)

    def feed_forward(self, x: Tensor, level: Level) -> Tensor:
        """FFN_i(x) = W_down · dropout(gelu(W_up (x + A_iᵀ B_i x)))."""
        hidden = self.dropout(F.gelu(F.linear(x, level.ffn_up, level.ffn_up_bias)))
        return F.linear(hidden, level.ffn_down)

    def add_norm(self, x: Tensor, y: Tensor, layer_norm: Tensor) -> Tensor:
        """LN_i(x + dropout(y))."""
        weight, bias = layer_norm.unbind()
        return F.layer_norm(x + self.dropout(y), weight.shape, weight, bias, LAYER_NORM_EPS)


class RingEncoder(Ring, TransformerEncoder):
    """x ← LN_i(x + SelfAttention_i(x)); x ← LN_i(x + FFN_i(x)), i = 1…N."""

    def layer(self, x: Tensor, level: Level, mask: Tensor | None) -> Tensor:
        x = self.add_norm(x, self.self_attention(x, level, mask), level.self_attn_layer_norm)
        return self.add_norm(x, self.feed_forward(x, level), level.ffn_layer_norm)

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        """:param seqs: embedded source `[B, S, d]`. :returns: same shape."""
        levels, mask = self.levels(), padding_mask(seqs_layout)
        positions = range(seqs.size(1))
        return self.run(seqs, lambda i, x: self.prepared_layer(x, levels[i], mask), positions)


class RingDecoder(Ring, DecoderStack, TransformerDecoder):
    """As the encoder, causal, with x ← LN_i(x + CrossAttention(x, encoder output)) in between."""

    def layer(
        self, x: Tensor, level: Level, cross: Cross, cross_mask: Tensor | None,
        self_mask: Tensor | None = None, append: Append | None = None,
    ) -> Tensor:  # fmt: skip
        """:param self_mask, append: while decoding; without them causal over all of `x`."""
        causal = append is None
        y = self.self_attention(x, level, self_mask, causal=causal, append=append)
        x = self.add_norm(x, y, level.self_attn_layer_norm)
        x = self.add_norm(x, self.cross_attention(x, cross, cross_mask), cross.layer_norm)
        if self.ffn_up is None:
            return x
        return self.add_norm(x, self.feed_forward(x, level), level.ffn_layer_norm)

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """
        :param seqs: embedded target `[B, T, d]`; with a `state_bag`, its positions from
            `state_bag.step_nr` on (after the first call one at a time).
        :param encoder_output: `[B, S, d]`; with a `state_bag`, read in the first call only.
        :returns: same shape as `seqs`.
        """
        if state_bag is not None:
            return decode_step(self, seqs, encoder_output, encoder_output_layout, state_bag)
        levels, cross = self.levels(), self.cross(encoder_output)
        mask, positions = padding_mask(encoder_output_layout), range(seqs.size(1))
        return self.run(
            seqs, lambda i, x: self.prepared_layer(x, levels[i], cross[i], mask), positions
        )
