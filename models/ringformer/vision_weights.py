"""This module makes the weights of a ring that encodes images and says what they are at each level.

Unlike a translation ring's (`weights.py`) its projections have biases, and its LayerNorms come
before the sublayers. That leaves nothing to fold: M_i reads what W does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import VisionConfig
from models.positions import InterleavedSinusoids
from models.ringformer import level_signal
from models.ringformer.level_signal import Signal
from models.ringformer.weights import INIT_OUTPUT, INIT_QKV, OWNED_BY_LEVELS
from models.stack import LayerNorm, Stack

# As the authors initialise the feed-forward network.
INIT_FFN = nn.init.xavier_uniform_
INIT_FFN_BIAS = partial(nn.init.normal_, std=1e-6)


class SelfAttention(NamedTuple):
    """A level's self-attention works with these weights."""

    layer_norm: LayerNorm
    qkv: Tensor  # [3d, d]
    qkv_bias: Tensor  # with the level's static signals, [3d]
    output: Tensor  # [d, d]
    output_bias: Tensor  # [d]
    signal: Signal | None  # of q, k and v


class FeedForward(NamedTuple):
    """A level's feed-forward network works with these weights."""

    layer_norm: LayerNorm
    up: Tensor  # [m, d]
    up_bias: Tensor  # [m]
    down: Tensor  # [d, m]
    down_bias: Tensor  # [d]
    static: Tensor | None  # static signal, [d]
    signal: Signal | None


class Level(NamedTuple):
    """At one level the layer works with these weights; shared ones are the same at each level."""

    self_attn: SelfAttention
    ffn: FeedForward


class VisionRingWeights(Stack[[Level, int | None]]):
    """A ring's weights are those of self-attention and of the feed-forward network."""

    def __init__(self, config: VisionConfig, num_positions: int) -> None:
        """Make them.

        :param num_positions: S: the class token's, and one for each patch.
        """
        num_levels = config.num_levels
        super().__init__(num_levels, config.model_dim, config.num_heads, config.dropout)
        dim, inner_dim = config.model_dim, config.ffn_inner_dim
        self.owned = OWNED_BY_LEVELS[config.architecture]
        owned, own_norms = self.owned
        # The order below is that of torch's random numbers and of the parameters: keep it.
        self.self_attn_layer_norm = self.layer_norms(dim, owned=own_norms)
        self.self_attn_qkv = self.matrices(INIT_QKV, 3, dim, dim, owned=owned)
        self.self_attn_qkv_bias = self.biases(nn.init.zeros_, 3 * dim, owned=owned)
        self.self_attn_output = self.matrices(INIT_OUTPUT, dim, dim, owned=owned, residual=True)
        self.self_attn_output_bias = self.biases(nn.init.zeros_, dim, owned=owned)
        self.ffn_layer_norm = self.layer_norms(dim, owned=own_norms)
        self.ffn_up = self.matrices(INIT_FFN, inner_dim, dim)
        self.ffn_up_bias = self.biases(INIT_FFN_BIAS, inner_dim)
        self.ffn_down = self.matrices(INIT_FFN, dim, inner_dim, residual=True)
        self.ffn_down_bias = self.biases(INIT_FFN_BIAS, dim)

        signals = config.level_signals if config.architecture == "ringformer" else "none"
        self.qkv_signal_a = self.qkv_signal_b = self.ffn_signal_a = self.ffn_signal_b = None
        if signals in ("all", "attention"):
            self.qkv_signal_a, self.qkv_signal_b = level_signal.parameters(
                num_levels, 3, config.attention_rank, dim
            )
        if signals in ("all", "ffn"):
            self.ffn_signal_a, self.ffn_signal_b = level_signal.parameters(
                num_levels, config.ffn_rank, dim
            )
        static = signals == "static"
        self.qkv_signal = nn.Parameter(torch.zeros(num_levels, 3 * dim)) if static else None
        self.ffn_signal = nn.Parameter(torch.zeros(num_levels, dim)) if static else None
        if config.architecture == "universal":
            length = max(num_positions, num_levels)
            self.encodings = InterleavedSinusoids(dim, length, persistent=False)

    def levels(self) -> list[Level]:
        """Return every level's weights."""
        parts = zip(self.self_attn_of_levels(), self.ffn_of_levels(), strict=True)
        return [Level(self_attn, ffn) for self_attn, ffn in parts]

    def self_attn_of_levels(self) -> Sequence[SelfAttention]:
        """Return each level's self-attention."""
        owned, bias, static = self.owned.attention, self.self_attn_qkv_bias, self.qkv_signal
        columns = zip(
            self.norm_per_level(self.self_attn_layer_norm, self.owned.layer_norms),
            self.per_level(self.self_attn_qkv.flatten(-3, -2), owned),
            self.per_level(bias, owned) if static is None else (bias + static).unbind(),
            self.per_level(self.self_attn_output, owned),
            self.per_level(self.self_attn_output_bias, owned),
            self._signals(self.qkv_signal_a, self.qkv_signal_b),
            strict=True,
        )
        return [SelfAttention(*weights) for weights in columns]

    def ffn_of_levels(self) -> Sequence[FeedForward]:
        """Return each level's feed-forward network."""
        statics = self.ffn_signal
        shared = (self.ffn_up, self.ffn_up_bias, self.ffn_down, self.ffn_down_bias)
        columns = zip(
            self.norm_per_level(self.ffn_layer_norm, self.owned.layer_norms),
            [None] * self.num_levels if statics is None else statics.unbind(),
            self._signals(self.ffn_signal_a, self.ffn_signal_b),
            strict=True,
        )
        return [FeedForward(norm, *shared, static, signal) for norm, static, signal in columns]

    def _signals(self, a: Tensor | None, b: Tensor | None) -> Sequence[Signal | None]:
        if a is None or b is None:
            return [None] * self.num_levels
        return level_signal.of_levels(Signal(a, b))
