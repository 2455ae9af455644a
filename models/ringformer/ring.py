"""RingFormer's encoder and decoder: ONE layer each, run for levels i = 1…N (arXiv 2502.13181).

How it differs from a plain post-LN Transformer:
- every projection is shared by all levels; each level owns its LayerNorms and level signals;
- q, k and v of a level are one matmul with weights folded once per forward (`level_signal.py`);
- cross-attention has no level signal and the encoder output is the same at every level, so its
  keys and values are computed once, not N times, and are cached once while decoding;
- sequences are padded on the right, so causal self-attention never sees padding and needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from fairseq2.models.transformer import TransformerDecoder, TransformerEncoder
from fairseq2.nn import (
    BatchLayout,
    IncrementalState,
    IncrementalStateBag,
    Linear,
    StandardLayerNorm,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.config import ModelConfig
from models.ringformer.level_signal import LevelFeedForward, LevelProjection

LAYER_NORM_EPS = 1e-5
CACHE_INCREMENT = 16  # positions by which the key/value cache grows


def _layer_norms(config: ModelConfig) -> nn.ModuleList:
    return nn.ModuleList(
        StandardLayerNorm(config.model_dim, bias=True, eps=LAYER_NORM_EPS)
        for _ in range(config.num_levels)
    )


def _linear(config: ModelConfig) -> Linear:
    linear = Linear(config.model_dim, config.model_dim, bias=False)
    nn.init.xavier_uniform_(linear.weight)
    return linear


def padding_mask(layout: BatchLayout) -> Tensor | None:
    """True where a key may be attended to, `[B, 1, 1, S]`; None when nothing is padded."""
    return (layout.position_indices >= 0)[:, None, None] if layout.padded else None


class _Ring(nn.Module):
    """Attention by heads, and the loop over levels with activation checkpointing."""

    segment_length: int
    """Recompute activations in segments of that many levels in backward; 0 keeps them all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        self.num_heads = config.num_heads
        self.segment_length = 0
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn_qkv = LevelProjection(config.model_dim, 3, config.num_levels, config.rank)
        self.self_attn_output = _linear(config)
        self.self_attn_layer_norms = _layer_norms(config)
        self.ffn = LevelFeedForward(
            config.model_dim, config.ffn_inner_dim, config.num_levels, config.rank, config.dropout
        )
        self.ffn_layer_norms = _layer_norms(config)

    def split_heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """`[B, S, count·d]` → count × `[B, H, S, d/H]`."""
        batch, length, _ = x.shape
        return x.view(batch, length, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()

    def run(self, level: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply `level(i, x)` for i = 0…N-1."""
        if not (self.segment_length and self.training):
            return _run_levels(level, range(self.num_levels), x)
        for first in range(0, self.num_levels, self.segment_length):
            levels = range(first, min(first + self.segment_length, self.num_levels))
            # Only torch's non-reentrant form works with every ZeRO stage when layers are shared.
            x = checkpoint(_run_levels, level, levels, x, use_reentrant=False)
        return x


def _run_levels(level: Callable[[int, Tensor], Tensor], levels: range, x: Tensor) -> Tensor:
    for i in levels:
        x = level(i, x)
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Heads `[B, H, S, d/H]` → `[B, S, d]`."""
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return heads.transpose(1, 2).flatten(2)


class RingEncoder(_Ring, TransformerEncoder):
    """x ← LN_i(x + SelfAttention_i(x)); x ← LN_i(x + FFN_i(x)), i = 1…N."""

    def __init__(self, config: ModelConfig) -> None:
        TransformerEncoder.__init__(self)
        _Ring.__init__(self, config)

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        """:param seqs: embedded source `[B, S, d]`. :returns: same shape."""
        mask = padding_mask(seqs_layout)
        qkv = self.self_attn_qkv()
        return self.run(partial(self._level, qkv=qkv, mask=mask), seqs)

    def _level(self, i: int, x: Tensor, *, qkv: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.split_heads(F.linear(x, qkv[i]), 3)
        attention = self.self_attn_output(_attend(q, k, v, mask))
        x = self.self_attn_layer_norms[i](x + self.dropout(attention))
        return self.ffn_layer_norms[i](x + self.dropout(self.ffn(x, i)))  # type: ignore[no-any-return]


class RingDecoder(_Ring, TransformerDecoder):
    """As the encoder, causal, with x ← LN_i(x + CrossAttention(x, encoder output)) in between."""

    def __init__(self, config: ModelConfig) -> None:
        TransformerDecoder.__init__(self)
        _Ring.__init__(self, config)
        self.cross_attn_q = _linear(config)
        self.cross_attn_k = _linear(config)
        self.cross_attn_v = _linear(config)
        self.cross_attn_output = _linear(config)
        self.cross_attn_layer_norms = _layer_norms(config)

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
        :param encoder_output: `[B, S, d]`.
        :returns: same shape as `seqs`.
        """
        state = state_bag.maybe_get_state(self, _RingState) if state_bag else None
        if state is None:
            (k,) = self.split_heads(self.cross_attn_k(encoder_output), 1)
            (v,) = self.split_heads(self.cross_attn_v(encoder_output), 1)
            mask = padding_mask(encoder_output_layout)
            state = _RingState(self.self_attn_qkv(), k, v, mask, incremental=state_bag is not None)
            if state_bag is not None:
                state_bag.set_state(self, state)
        return self.run(partial(self._level, state=state), seqs)

    def _level(self, i: int, x: Tensor, *, state: _RingState) -> Tensor:
        q, k, v = self.split_heads(F.linear(x, state.qkv[i]), 3)
        causal = x.size(1) > 1
        if state.incremental:
            k, v = state.append(i, self.num_levels, k, v)
            if causal and k.size(2) > x.size(1):
                raise ValueError("After the first call, decode one position at a time.")
        attention = self.self_attn_output(_attend(q, k, v, None, causal))
        x = self.self_attn_layer_norms[i](x + self.dropout(attention))

        (q,) = self.split_heads(self.cross_attn_q(x), 1)
        attention = self.cross_attn_output(_attend(q, state.cross_k, state.cross_v, state.mask))
        x = self.cross_attn_layer_norms[i](x + self.dropout(attention))
        return self.ffn_layer_norms[i](x + self.dropout(self.ffn(x, i)))  # type: ignore[no-any-return]


class _RingState(IncrementalState):
    """What the levels of one forward share and, while decoding, the key/value cache per level.

    The folded weights live here too: folded once for a batch, however many tokens it decodes, and
    never stale, since the state dies with the batch.
    """

    def __init__(
        self, qkv: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, incremental: bool
    ) -> None:
        self.qkv, self.cross_k, self.cross_v, self.mask = qkv, k, v, mask
        self.incremental = incremental
        self._cache: Tensor | None = None  # [N, 2, B, H, capacity, d/H]
        self._lengths: list[int] = []

    def append(self, level: int, num_levels: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values `[B, H, t, d/H]` of a level; returns all so far."""
        batch, heads, added, head_dim = k.shape
        if self._cache is None:
            self._cache = k.new_empty(num_levels, 2, batch, heads, 0, head_dim)
            self._lengths = [0] * num_levels
        begin = self._lengths[level]
        end = self._lengths[level] = begin + added
        if end > self._cache.size(4):
            room = -(-end // CACHE_INCREMENT) * CACHE_INCREMENT - self._cache.size(4)
            self._cache = torch.cat(
                [self._cache, k.new_empty(num_levels, 2, batch, heads, room, head_dim)], dim=4
            )
        self._cache[level, 0, :, :, begin:end] = k
        self._cache[level, 1, :, :, begin:end] = v
        return self._cache[level, 0, :, :, :end], self._cache[level, 1, :, :, :end]

    def reorder(self, new_order: Tensor) -> None:
        self.cross_k = self.cross_k.index_select(0, new_order)
        self.cross_v = self.cross_v.index_select(0, new_order)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, new_order)
        if self._cache is not None:
            self._cache = self._cache.index_select(2, new_order)

    def size_bytes(self) -> int:
        return self.capacity_bytes()

    def capacity_bytes(self) -> int:
        cache = 0 if self._cache is None else self._cache.nbytes
        return self.cross_k.nbytes + self.cross_v.nbytes + cache
