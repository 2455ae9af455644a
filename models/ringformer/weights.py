"""This module makes the weights of a ring and says what they are at each level.

The rivals that differ in what a level owns (`ring_stack.py`) are this same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from models.config import ModelConfig
from models.ringformer import level_signal
from models.ringformer.level_signal import Signal
from models.ringformer.ring_stack import INIT_OUTPUT, INIT_QKV, RingStack
from models.stack import LayerNorm

# As fairseq2 initialises the feed-forward network of a Transformer.
INIT_FFN = partial(nn.init.kaiming_uniform_, a=5**0.5)


class SelfAttention(NamedTuple):
    """A level's self-attention works with these weights."""

    qkv: Tensor  # [3d, d]
    qkv_bias: Tensor | None  # static signals b_i, [3d]
    output: Tensor  # [d, d]
    layer_norm: LayerNorm
    signal: Signal | None = None  # of q, k and v; None: there is none, or it is folded


class CrossAttention(NamedTuple):
    """A level's encoder-decoder attention works with these weights, and with the encoder output."""

    q: Tensor  # [d, d]
    k: Tensor  # projected encoder output, [B, H, S, d/H]
    v: Tensor
    mask: Tensor | None  # 0, or -inf where the encoder output is padding, [B, 1, 1, S]
    output: Tensor  # [d, d]
    layer_norm: LayerNorm


class FeedForward(NamedTuple):
    """A level's feed-forward network works with these weights."""

    up: Tensor  # [m, d]
    up_bias: Tensor | None  # static signal: W_up b_i of W_up (x + b_i), [m]
    down: Tensor  # [d, m]
    layer_norm: LayerNorm
    signal: Signal | None = None  # None: there is none, or it is folded


class Level(NamedTuple):
    """At one level the layer works with these weights; shared ones are the same at each level."""

    self_attn: SelfAttention
    ffn: FeedForward | None  # None in the decoder of `one_wide_ffn`


FOLD_OVER = 23  # positions; measured (docs/design.md)


class RingWeights(RingStack[Level, Tensor | None, CrossAttention | None]):
    """A ring's weights are those of self-attention and of the feed-forward network."""

    def __init__(self, config: ModelConfig, num_levels: int, *, has_ffn: bool = True) -> None:
        super().__init__(config, num_levels, config.residual_scale)
        dim, inner_dim = config.model_dim, config.ffn_inner_dim
        owned, own_norms = self.owned
        # The order below is that of torch's random numbers and of the parameters: keep it.
        self.self_attn_qkv = self.matrices(INIT_QKV, 3, dim, dim, owned=owned)
        self.self_attn_output = self.matrices(INIT_OUTPUT, dim, dim, owned=owned, residual=True)
        self.self_attn_layer_norm = self.layer_norms(dim, owned=own_norms)
        self.ffn_up = self.ffn_down = self.ffn_layer_norm = None
        if has_ffn:
            self.ffn_up = self.matrices(INIT_FFN, inner_dim, dim)
            self.ffn_down = self.matrices(INIT_FFN, dim, inner_dim, residual=True)
            self.ffn_layer_norm = self.layer_norms(dim, owned=own_norms)
        self.tell_levels_apart(config, config.rank, config.rank, config.max_seq_len)
        self.fold_over: float = FOLD_OVER
        self._levels: dict[bool, list[Level]] = {}  # by whether signals are folded
        self._made_of: tuple[object, ...] = ()

    def levels(self, x: Tensor) -> list[Level]:
        """Return every level's weights, to run over `x`.

        Unless gradients may flow, they are kept until a parameter changes. If they may, signals are
        folded however few the positions are: with other operations gradients would be ready in
        another order, in which DeepSpeed adds up those of all ranks.

        A write through `.data` is seen after the next call of `train` or `eval`.

        :param x: `[B, S, d]`; over `fold_over` positions level signals are folded, as they always
            are where the layer is compiled.
        """
        trains = self.training or torch.is_grad_enabled()
        positions = math.inf if trains else x.size(0) * x.size(1)
        fold = self.compiled or positions > self.fold_over
        if trains:
            return self.make_levels(fold)
        device = self.self_attn_qkv.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        made_of = (autocast, *((p.data_ptr(), p._version, p.dtype) for p in self.parameters()))
        if made_of != self._made_of:
            self._levels, self._made_of = {}, made_of
        if fold not in self._levels:
            self._levels[fold] = self.make_levels(fold)
        return self._levels[fold]

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode, and forget the weights that were kept."""
        self._levels, self._made_of = {}, ()
        return super().train(mode)

    def make_levels(self, fold: bool) -> list[Level]:
        """Make every level's weights from the parameters.

        :param fold: fold input-dependent level signals into them.
        """
        parts = zip(self.self_attn_of_levels(fold), self.ffn_of_levels(fold), strict=True)
        return [Level(self_attn, ffn) for self_attn, ffn in parts]

    def self_attn_of_levels(self, fold: bool) -> Sequence[SelfAttention]:
        """Return each level's self-attention, folded with W + A_iᵀ B_i of q, k and v."""
        weight: Tensor = self.self_attn_qkv
        signals, owned = self.qkv_signals, self.owned.attention
        if fold and signals is not None:
            weight, owned, signals = level_signal.fold(weight, signals), True, None
        columns = zip(
            self.per_level(weight.flatten(-3, -2), owned),
            self.bias_per_level(self.qkv_signal),
            self.per_level(self.self_attn_output, self.owned.attention),
            self.norm_per_level(self.self_attn_layer_norm, self.owned.layer_norms),
            self.signal_per_level(signals),
            strict=True,
        )
        return [SelfAttention(*weights) for weights in columns]

    def ffn_of_levels(self, fold: bool) -> Sequence[FeedForward | None]:
        """Return each level's feed-forward network, folded with W_up (I + A_iᵀ B_i)."""
        static, signals, owned = self.ffn_signal, self.ffn_signals, False
        if self.ffn_up is None or self.ffn_down is None or self.ffn_layer_norm is None:
            return [None] * self.num_levels
        up: Tensor = self.ffn_up
        biases = self.bias_per_level(None if static is None else F.linear(static, up))
        if fold and signals is not None:
            up, owned, signals = level_signal.fold_into_input(up, signals), True, None
        columns = zip(
            self.per_level(up, owned),
            biases,
            self.per_level(self.ffn_down, False),
            self.norm_per_level(self.ffn_layer_norm, self.owned.layer_norms),
            self.signal_per_level(signals),
            strict=True,
        )
        return [FeedForward(*weights) for weights in columns]
