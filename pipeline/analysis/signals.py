"""How much a ring's level signals say, beside what all levels share.

An input-dependent signal adds M_i x to what a projection W gives of x, with M_i = A_iᵀ B_i: to W x
itself (q, k, v), or to the x that goes into it (the feed-forward network's W_up). A static one adds
b_i instead. Its size is told relative to x, and relative to W x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ringformer import level_signal
from models.ringformer.level_signal import Signal
from models.ringformer.weights import RingWeights
from pipeline.analysis.recording import StackRecording

PROJECTIONS = ("q", "k", "v", "ffn")


class Share(NamedTuple):
    """A signal's size at each level, averaged over tokens, `[N]`."""

    of_input: Tensor
    """‖M_i x‖ / ‖x‖, or ‖b_i‖ / ‖x‖."""

    of_projection: Tensor
    """‖M_i x‖ / ‖W x‖ for q, k and v, ‖W M_i x‖ / ‖W x‖ for the feed-forward network; or with b_i
    instead of M_i x."""


class SignalSizes:
    """The mean over all tokens of all batches, for each projection that has signals."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    @torch.no_grad()
    def add(self, ring: RingWeights, recorded: StackRecording, real: Tensor) -> None:
        """Take a batch in.

        :param ring: the stack, of `recorded`.
        :param real: False where a position is padding, `[B, S]`.
        """
        for projection, ratios in _ratios(ring, recorded, real):
            self._sums[projection] = self._sums.get(projection, torch.zeros(())) + ratios
        self._tokens += int(real.sum())

    def value(self) -> dict[str, Share]:
        """Return the sizes by projection; none where the stack has no signals."""
        means = {
            name: self._sums[name] / self._tokens for name in PROJECTIONS if name in self._sums
        }
        return {name: Share(*mean) for name, mean in means.items()}


def _ratios(
    ring: RingWeights, recorded: StackRecording, real: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield projections with what a level's signal is relative to x and to W x, summed over tokens.

    :returns: for each projection that has signals `[2, N]`, float64.
    """
    columns: dict[str, list[Tensor]] = {}
    for i, (attention, ffn) in enumerate(ring.make_levels(fold=False)):
        x = recorded.states[i][real]
        shared = F.linear(x, attention.qkv).chunk(3, -1)
        added = _added(x, attention.signal, attention.qkv_bias)
        for name, signal, wx in zip("qkv", added, shared, strict=False):
            columns.setdefault(name, []).append(_sizes(signal, x, signal, wx))
        if ffn is None or recorded.ffn_inputs is None:
            continue
        x = recorded.ffn_inputs[i][real]
        static = None if ring.ffn_signal is None else ring.ffn_signal[i]
        for signal in _added(x, ffn.signal, static):
            wx, ws = F.linear(x, ffn.up), F.linear(signal, ffn.up)
            columns.setdefault("ffn", []).append(_sizes(signal, x, ws, wx))
    for name, levels in columns.items():
        yield name, torch.stack(levels, dim=1)


def _added(x: Tensor, signal: Signal | None, static: Tensor | None) -> tuple[Tensor, ...]:
    """Return what is added to each projection of x; nothing where there are no signals."""
    if signal is None and static is None:
        return ()
    added = static if signal is None else level_signal.apply(x, signal)
    assert added is not None
    return added.chunk(added.size(-1) // x.size(-1), -1)


def _sizes(signal: Tensor, x: Tensor, projected: Tensor, wx: Tensor) -> Tensor:
    """Return ‖signal‖ / ‖x‖ and ‖projected‖ / ‖W x‖, summed over tokens, `[2]`.

    :param signal, projected: `[tokens, …]`, or `[…]`, the same for all tokens.
    """
    pairs = ((signal, x), (projected, wx))
    return torch.stack([(a.norm(dim=-1) / b.norm(dim=-1)).double().sum() for a, b in pairs])
