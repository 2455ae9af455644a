"""RingFormer with its level signals applied to the tokens, to compare with folding them.

It has the parameters and the result of `models.ringformer`; but the FFN's input is x + Aᵀ(B x), and
with `fold_qkv` off q is W x + Aᵀ(B x), likewise k and v.
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
from models.ringformer.stack import Level
from models.seq2seq import TranslationModel


class FactoredLevel(Level):
    """A level whose FFN weights, and without `fold_qkv` those of q, k and v, all levels share."""

    qkv_signal: Signal | None = None  # where it is not folded: [3, r, d]
    ffn_signal: Signal  # [r, d]


class FactoredRing(Ring):
    """The levels of a RingFormer with all level signals, which are applied to the tokens."""

    fold_qkv = False

    def folded_qkv(self) -> Sequence[Tensor]:
        if self.fold_qkv:
            return super().folded_qkv()
        return self.per_level(self.self_attn_qkv.flatten(0, 1), False)

    def folded_ffn_up(self) -> Sequence[Tensor | None]:
        return self.per_level(self.ffn_up, False)

    def make_levels(self) -> list[Level]:
        levels = [FactoredLevel(*level) for level in super().make_levels()]
        if not self.fold_qkv:
            for level, a, b in zip(levels, *self._signal_of("qkv"), strict=True):
                level.qkv_signal = Signal(a, b)
        for level, a, b in zip(levels, *self._signal_of("ffn"), strict=True):
            level.ffn_signal = Signal(a, b)
        return [*levels]

    def _signal_of(self, part: str) -> Sequence[Tensor]:
        return getattr(self, f"{part}_signal_a"), getattr(self, f"{part}_signal_b")

    def qkv(self, x: Tensor, level: Level) -> tuple[Tensor, ...]:
        assert isinstance(level, FactoredLevel)
        if level.qkv_signal is None:
            return super().qkv(x, level)
        return self.heads(F.linear(x, level.qkv) + apply(x, level.qkv_signal), 3)

    def feed_forward(self, x: Tensor, level: Level) -> Tensor:
        assert isinstance(level, FactoredLevel)
        return super().feed_forward(x + apply(x, level.ffn_signal), level)


def apply(x: Tensor, signal: Signal) -> Tensor:
    """Return M x = Aᵀ(B x).

    :param x: `[B, S, d]`.
    :param signal: of k projections, `[k, r, d]`, or of one, `[r, d]`.
    :returns: `[B, S, k·d]`.
    """
    low = F.linear(x, signal.b.flatten(0, -2))  # [B, S, k·r]
    if signal.a.dim() == 2:
        return low @ signal.a
    low = low.view(*x.shape[:2], *signal.a.shape[:2])
    return torch.einsum("bskr,krd->bskd", low, signal.a).flatten(2)


class FactoredEncoder(FactoredRing, RingEncoder):
    """The encoder of such a RingFormer."""


class FactoredDecoder(FactoredRing, RingDecoder):
    """The decoder of such a RingFormer."""


class FactoredModel(TranslationModel):
    """Such a RingFormer; with `fold_qkv` only the FFN's signals are applied to the tokens."""

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
