"""This module makes the weights of a ring that encodes images and says what they are at each level.

Unlike a translation ring's (`weights.py`) its projections have biases, and its LayerNorms come
before the sublayers. That leaves nothing to fold: M_i reads what W does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from models.config import VisionConfig
from models.ringformer.level_signal import Signal
from models.ringformer.ring_stack import INIT_OUTPUT, INIT_QKV, RingStack
from models.stack import LayerNorm

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


class VisionRingWeights(RingStack[[Level, int | None]]):
    """A ring's weights are those of self-attention and of the feed-forward network."""

    def __init__(self, config: VisionConfig, num_positions: int) -> None:
        """Make them.

        :param num_positions: S: the class token's, and one for each patch.
        """
        super().__init__(config, config.num_levels)
        dim, inner_dim = config.model_dim, config.ffn_inner_dim
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
        self.tell_levels_apart(config, config.attention_rank, config.ffn_rank, num_positions)

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
            self.signal_per_level(self.qkv_signals),
            strict=True,
        )
        return [SelfAttention(*weights) for weights in columns]

    def ffn_of_levels(self) -> Sequence[FeedForward]:
        """Return each level's feed-forward network."""
        shared = (self.ffn_up, self.ffn_up_bias, self.ffn_down, self.ffn_down_bias)
        columns = zip(
            self.norm_per_level(self.ffn_layer_norm, self.owned.layer_norms),
            self.bias_per_level(self.ffn_signal),
            self.signal_per_level(self.ffn_signals),
            strict=True,
        )
        return [FeedForward(norm, *shared, static, signal) for norm, static, signal in columns]
