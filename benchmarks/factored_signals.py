"""This RingFormer applies its level signals to the tokens, to measure against folding them.

The same parameters and the same result as `models.ringformer`; but the FFN's input is x + Aᵀ(B x),
and with `fold_qkv` off q is W x + Aᵀ(B x), and k and v alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelConfig
from models.ringformer import RingDecoder, RingEncoder
from models.ringformer.level_signal import Signal
from models.ringformer.ring import Ring
from models.ringformer.weights import FeedForward, SelfAttention
from models.seq2seq import TranslationModel


class FactoredSelfAttention(SelfAttention):
    """A level's self-attention has the projections that all levels share, and its signal."""

    signal: Signal  # [3, r, d]


class FactoredFeedForward(FeedForward):
    """A level's feed-forward network has the projections that all levels share, and its signal."""

    signal: Signal  # [r, d]


class FactoredRing(Ring):
    """The ring is that of a RingFormer with all level signals."""

    fold_qkv = False

    def self_attn_of_levels(self) -> Sequence[SelfAttention]:
        if self.fold_qkv:
            return super().self_attn_of_levels()
        own = []
        norms = self.self_attn_layer_norm.unbind()
        for norm, signal in zip(norms, self._signals("qkv"), strict=True):
            qkv, output = self.self_attn_qkv.flatten(0, 1), self.self_attn_output
            own.append(FactoredSelfAttention(qkv, None, output, norm))
            own[-1].signal = signal
        return own

    def ffn_of_levels(self) -> Sequence[FeedForward]:
        own = []
        up, down = self.get_parameter("ffn_up"), self.get_parameter("ffn_down")
        norms = self.get_parameter("ffn_layer_norm").unbind()
        for norm, signal in zip(norms, self._signals("ffn"), strict=True):
            own.append(FactoredFeedForward(up, None, down, norm))
            own[-1].signal = signal
        return own

    def _signals(self, part: str) -> list[Signal]:
        a, b = self.get_parameter(f"{part}_signal_a"), self.get_parameter(f"{part}_signal_b")
        return [Signal(*own) for own in zip(a, b, strict=True)]

    def qkv(self, x: Tensor, own: SelfAttention) -> tuple[Tensor, ...]:
        if not isinstance(own, FactoredSelfAttention):
            return super().qkv(x, own)
        return self.heads(F.linear(x, own.qkv) + apply(x, own.signal), 3)

    def feed_forward(self, x: Tensor, own: FeedForward) -> Tensor:
        assert isinstance(own, FactoredFeedForward)
        return super().feed_forward(x + apply(x, own.signal), own)


def apply(x: Tensor, signal: Signal) -> Tensor:
    """Return M x = Aᵀ(B x).

    :param x: `[B, S, d]`.
    :param signal: of one projection `[r, d]`, or of k projections `[k, r, d]`.
    :returns: `[B, S, k·d]`.
    """
    low = F.linear(x, signal.b.flatten(0, -2))  # [B, S, k·r]
    if signal.a.dim() == 2:
        return low @ signal.a
    low = low.view(*x.shape[:2], *signal.a.shape[:2])
    return torch.einsum("bskr,krd->bskd", low, signal.a).flatten(2)


class FactoredEncoder(FactoredRing, RingEncoder):
    """The encoder has these equations."""


class FactoredDecoder(FactoredRing, RingDecoder):
    """The decoder has these equations."""


class FactoredModel(TranslationModel):
    """The model has these equations in both stacks."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_sizes: tuple[int, int],
        pad_idx: int,
        *,
        fold_qkv: bool = False,
    ) -> None:
        encoder, decoder = FactoredEncoder(config), FactoredDecoder(config)
        encoder.fold_qkv = decoder.fold_qkv = fold_qkv
        super().__init__(config, vocab_sizes, pad_idx, encoder, decoder)
