"""RingFormer's encoder and decoder are a ring each; this module runs them over a batch.

- The encoder output is the same at every level and cross-attention has no level signal, so its keys
  and values are computed once, not N times, and are cached once while decoding.
- Sequences are padded on the right, so causal self-attention never sees padding and needs no mask.
- While decoding, the hypotheses of a sentence share its cache (`decoder_state.py`).
"""

from __future__ import annotations

from functools import partial

from fairseq2.models.transformer import TransformerDecoder, TransformerEncoder
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelConfig
from models.padding import padding_bias
from models.ringformer.decoder_state import DecoderState
from models.ringformer.ring import Ring
from models.ringformer.ring_stack import INIT_OUTPUT, INIT_QKV
from models.ringformer.weights import CrossAttention


class RingEncoder(Ring, TransformerEncoder):
    """The encoder computes x ← LN_i(x + SelfAttention_i(x)); x ← LN_i(x + FFN_i(x)), i = 1…N."""

    causal = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.encoder_levels)

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        """Encode a batch.

        :param seqs: embedded source `[B, S, d]`.
        :returns: the encoder output, same shape.
        """
        levels, positions = self.levels(seqs), range(seqs.size(1))
        mask = padding_bias(seqs_layout, seqs.dtype, always=self.compiled)

        def at_level(i: int, x: Tensor) -> Tensor:
            return self.prepared_layer(self.add_encodings(x, i, positions), levels[i], mask, None)

        return self.run(seqs, at_level)


class RingDecoder(Ring, TransformerDecoder):
    """The decoder is causal, and has x ← LN_i(x + CrossAttention(x, encoder output)) in between."""

    causal = True

    def __init__(self, config: ModelConfig) -> None:
        has_ffn = config.architecture != "one_wide_ffn"
        super().__init__(config, config.decoder_levels, has_ffn=has_ffn)
        dim, (owned, own_norms) = config.model_dim, self.owned
        self.cross_attn_q = self.matrices(INIT_QKV, dim, dim, owned=owned)
        self.cross_attn_kv = self.matrices(INIT_QKV, 2, dim, dim, owned=owned)
        self.cross_attn_output = self.matrices(INIT_OUTPUT, dim, dim, owned=owned, residual=True)
        self.cross_attn_layer_norm = self.layer_norms(dim, owned=own_norms)

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
        num_levels: int | None = None,
    ) -> Tensor:
        """Decode a batch, all positions at once or incrementally.

        :param seqs: embedded target `[B, T, d]`; with a `state_bag`, its positions from
            `state_bag.step_nr` on (after the first call one at a time).
        :param encoder_output: `[B, S, d]`; with a `state_bag`, read in the first call only.
        :param num_levels: run only so many of the N levels, without a `state_bag`; None: all.
        :returns: same shape as `seqs`.
        """
        if state_bag is not None:
            return self._decode_step(seqs, encoder_output, encoder_output_layout, state_bag)
        levels, cross = self.levels(seqs), self.cross(encoder_output, encoder_output_layout)
        positions = range(seqs.size(1))

        def at_level(i: int, x: Tensor) -> Tensor:
            x = self.add_encodings(x, i, positions)
            return self.prepared_layer(x, levels[i], None, cross[i])

        return self.run(seqs, at_level, num_levels)

    def _decode_step(
        self,
        seqs: Tensor,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        state_bag: IncrementalStateBag,
    ) -> Tensor:
        """Decode the positions from `state_bag.step_nr` on."""
        state = state_bag.maybe_get_state(self, DecoderState)
        if state is None:
            state = DecoderState(self.cross(encoder_output, encoder_output_layout))
            state_bag.set_state(self, state)
        levels, cross = self.levels(seqs), state.cross
        x, mask = state.begin_step(seqs)
        appends = [partial(cache.append, end=mask.size(3)) for cache in state.caches]
        positions = range(state_bag.step_nr, state_bag.step_nr + seqs.size(1))

        def at_level(i: int, x: Tensor) -> Tensor:
            x = self.add_encodings(x, i, positions)
            return self.layer(x, levels[i], mask, cross[i], appends[i])

        return self.run(x, at_level).reshape(seqs.shape)

    def cross(self, encoder_output: Tensor, layout: BatchLayout) -> list[CrossAttention]:
        """Return what every level's cross-attention works with.

        Keys and values are computed once where the levels share the projection.
        """
        owned = self.owned.attention
        mask = padding_bias(layout, encoder_output.dtype, always=self.compiled)
        weights = self.per_level(self.cross_attn_kv.flatten(-3, -2), owned)
        if owned:
            keys_values = [self._keys_values(encoder_output, weight) for weight in weights]
        else:
            keys_values = [self._keys_values(encoder_output, weights[0])] * self.num_levels
        columns = zip(
            self.per_level(self.cross_attn_q, owned),
            keys_values,
            self.per_level(self.cross_attn_output, owned),
            self.norm_per_level(self.cross_attn_layer_norm, self.owned.layer_norms),
            strict=True,
        )
        return [CrossAttention(q, k, v, mask, out, norm) for q, (k, v), out, norm in columns]

    def _keys_values(self, encoder_output: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.heads(F.linear(encoder_output, weight), 2)
        return k, v
