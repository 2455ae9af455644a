"""An exponential moving average of the weights, kept while they are trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoints.folder import EMA_FILE


class MovingAverage:
    """Keeps θ_ema ← decay · θ_ema + (1 - decay) · θ, in float32.

    In bf16 and fp16 θ are the weights that the model computes with, which are rounded. In the n-th
    step the decay is at most (1 + n) / (10 + n), so that the weights of the beginning are soon
    forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = model
        self._averages = [p.detach().float().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of another step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach().float() for parameter in self.model.parameters()]
        torch._foreach_lerp_(self._averages, current, 1 - decay)

    def save(self, folder: Path) -> None:
        """Write the averages, under the model's own names, into a checkpoint."""
        averages = dict(zip(self.model.parameters(), self._averages, strict=True))
        # Tied parameters under all their names, and buffers as they are.
        state = self.model.state_dict(keep_vars=True)
        weights = {name: averages.get(tensor, tensor) for name, tensor in state.items()}
        torch.save({"weights": weights, "updates": self.updates}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Go on from the averages in a checkpoint, or from its weights if it has none."""
        if not (folder / EMA_FILE).exists():
            self._averages = [p.detach().float().clone() for p in self.model.parameters()]
            return
        saved = torch.load(folder / EMA_FILE, map_location="cpu", weights_only=True)
        self.updates = saved["updates"]
        for (name, _), average in zip(self.model.named_parameters(), self._averages, strict=True):
            average.copy_(saved["weights"][name])
