"""The rings of both tasks have this in common: what a level owns, and what tells levels apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.config import Architecture, LayersConfig
from models.positions import InterleavedSinusoids
from models.ringformer import level_signal
from models.ringformer.level_signal import Signal
from models.stack import P, Stack

# As fairseq2 initialises the attention of a Transformer.
INIT_QKV = partial(nn.init.xavier_uniform_, gain=2**-0.5)
INIT_OUTPUT = nn.init.xavier_uniform_


class Owned(NamedTuple):
    """A level owns these weights; the others are one for all levels."""

    attention: bool = False
    layer_norms: bool = False


OWNED_BY_LEVELS: dict[Architecture, Owned] = {
    "ringformer": Owned(layer_norms=True),
    "universal": Owned(),  # arXiv 1807.03819
    "one_wide_ffn": Owned(attention=True, layer_norms=True),  # arXiv 2309.01826
}


class RingStack(Stack[P]):
    """A ring is a stack with level signals; a subclass brings the weights that they add to."""

    qkv_signal: Tensor | None
    """Static signals of q, k and v, `[N, 3d]`."""

    ffn_signal: Tensor | None
    """Static signals of the FFN, `[N, d]`."""

    def __init__(self, config: LayersConfig, num_levels: int, residual_scale: float = 1.0) -> None:
        super().__init__(
            num_levels, config.model_dim, config.num_heads, config.dropout, residual_scale
        )
        self.owned = OWNED_BY_LEVELS[config.architecture]

    def tell_levels_apart(
        self, config: LayersConfig, attention_rank: int, ffn_rank: int, num_positions: int
    ) -> None:
        """Make level signals, after what they add to, or a Universal Transformer's encodings.

        :param num_positions: of the longest sequence.
        """
        dim, num_levels = config.model_dim, self.num_levels
        signals = config.level_signals if config.architecture == "ringformer" else "none"
        self.qkv_signal_a = self.qkv_signal_b = self.ffn_signal_a = self.ffn_signal_b = None
        if signals in ("all", "attention"):
            self.qkv_signal_a, self.qkv_signal_b = level_signal.parameters(
                num_levels, 3, attention_rank, dim
            )
        if signals in ("all", "ffn"):
            self.ffn_signal_a, self.ffn_signal_b = level_signal.parameters(
                num_levels, ffn_rank, dim
            )
        static = signals == "static"
        self.qkv_signal = nn.Parameter(torch.zeros(num_levels, 3 * dim)) if static else None
        self.ffn_signal = nn.Parameter(torch.zeros(num_levels, dim)) if static else None
        if config.architecture == "universal":  # of positions, and of levels
            length = max(num_positions, num_levels)
            self.encodings = InterleavedSinusoids(dim, length, persistent=False)

    @property
    def qkv_signals(self) -> Signal | None:
        """Return the input-dependent signals of q, k and v at all levels: `[N, 3, r, d]`."""
        a, b = self.qkv_signal_a, self.qkv_signal_b
        return None if a is None or b is None else Signal(a, b)

    @property
    def ffn_signals(self) -> Signal | None:
        """Return the input-dependent signals of the FFN at all levels: `[N, r, d]`."""
        a, b = self.ffn_signal_a, self.ffn_signal_b
        return None if a is None or b is None else Signal(a, b)

    def signal_per_level(self, signals: Signal | None) -> Sequence[Signal | None]:
        """Return the signal of each level; None for each if there are none."""
        return [None] * self.num_levels if signals is None else level_signal.of_levels(signals)

    def bias_per_level(self, biases: Tensor | None) -> Sequence[Tensor | None]:
        """Return what static signals add at each level; None for each if there are none."""
        return [None] * self.num_levels if biases is None else biases.unbind()
