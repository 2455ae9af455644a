"""How much a ring's level signals say, beside what all levels share.

An input-dependent signal is M_i x with M_i = A_iᵀ B_i, a static one b_i. It is added to what the
projections of q, k and v give, and to what the feed-forward network reads. Its size is told
relative to x; and what it changes in the output of the projection, relative to that output without
it. (In a ring that encodes images, LayerNorms come before the projections.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.recording import StackRecording
from models.ringformer import RingDecoder, RingEncoder, VisionRing, level_signal
from models.ringformer.level_signal import Signal
from models.ringformer.vision_weights import Level as VisionLevel
from models.ringformer.weights import Level
from models.stack import LayerNorm

PROJECTIONS = ("q", "k", "v", "ffn")

Ring = RingEncoder | RingDecoder | VisionRing


class Sizes(NamedTuple):
    """A signal's size at each level, averaged over tokens, `[N]`."""

    of_input: Tensor
    """‖signal‖ / ‖x‖."""

    of_projection: Tensor
    """‖signal‖ / ‖W x‖ for q, k and v, ‖W (x + signal) - W x‖ / ‖W x‖ for the feed-forward network;
    where LayerNorms come before the sublayers, with W LN_i(…)."""


class SignalSizes:
    """The mean over all tokens of all batches, for each projection that has signals."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    @torch.no_grad()
    def add(self, ring: Ring, recorded: StackRecording, real: Tensor) -> None:
        """Take a batch in.

        :param ring: the stack, of `recorded`.
        :param real: False where a position is padding, `[B, S]`.
        """
        for projection, ratios in _ratios(ring, recorded, real):
            self._sums[projection] = self._sums.get(projection, torch.zeros(())) + ratios
        self._tokens += int(real.sum())

    def value(self) -> dict[str, Sizes]:
        """Return the sizes by projection; none where the stack has no signals."""
        means = {
            name: self._sums[name] / self._tokens for name in PROJECTIONS if name in self._sums
        }
        return {name: Sizes(*mean) for name, mean in means.items()}


def _ratios(ring: Ring, recorded: StackRecording, real: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield projections with what a level's signal is relative to x and to W x, summed over tokens.

    :returns: for each projection that has signals `[2, N]`, float64.
    """
    columns: dict[str, list[Tensor]] = {}
    for i, (attention, ffn) in enumerate(_levels(ring)):
        x = recorded.states[i][real]
        shared = F.linear(_read(ring, x, attention.layer_norm), attention.qkv).chunk(3, -1)
        added = _added(x, attention.signal, ring.qkv_signal, i)
        for name, signal, output in zip("qkv", added, shared, strict=False):
            columns.setdefault(name, []).append(_sizes(signal, x, signal, output))
        if ffn is None or recorded.ffn_inputs is None:
            continue
        x = recorded.ffn_inputs[i][real]
        for signal in _added(x, ffn.signal, ring.ffn_signal, i):
            output, changed = (
                F.linear(_read(ring, each, ffn.layer_norm), ffn.up) for each in (x, x + signal)
            )
            columns.setdefault("ffn", []).append(_sizes(signal, x, changed - output, output))
    for name, sizes in columns.items():
        yield name, torch.stack(sizes, dim=1)


def _levels(ring: Ring) -> Sequence[Level | VisionLevel]:
    if isinstance(ring, VisionRing):
        return ring.levels()
    return ring.make_levels(fold=False)


def _read(ring: Ring, x: Tensor, layer_norm: LayerNorm) -> Tensor:
    """Return what a projection reads of x."""
    return ring.norm(x, layer_norm) if isinstance(ring, VisionRing) else x


def _added(
    x: Tensor, signal: Signal | None, static: Tensor | None, level: int
) -> tuple[Tensor, ...]:
    """Return what is added to each projection of x; nothing where there are no signals.

    :param signal: of this level.
    :param static: of all levels, `[N, …]`.
    """
    if signal is not None:
        added = level_signal.apply(x, signal)
    elif static is not None:
        added = static[level]
    else:
        return ()
    return added.chunk(added.size(-1) // x.size(-1), -1)


def _sizes(signal: Tensor, x: Tensor, change: Tensor, output: Tensor) -> Tensor:
    """Return ‖signal‖ / ‖x‖ and ‖change‖ / ‖output‖, summed over tokens, `[2]`.

    :param signal, change: `[tokens, …]`, or `[…]`, the same for all tokens.
    """
    pairs = ((signal, x), (change, output))
    return torch.stack([(a.norm(dim=-1) / b.norm(dim=-1)).double().sum() for a, b in pairs])
