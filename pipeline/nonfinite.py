"""What to look at when a gradient is not finite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from data_prep.stage import write_json
from pipeline.batches import Indices


def dump(
    path: Path,
    model: nn.Module,
    *,
    step: int,
    learning_rate: float,
    micro_batches: list[Indices],
    losses: list[torch.Tensor],
) -> None:
    """Write one rank's view of a step: its sentences, their losses, and the state of the weights.

    :param micro_batches: sentence numbers in the training shards.
    :param losses: of each micro-batch, summed over its target tokens.
    """
    path.parent.mkdir(exist_ok=True)
    work = [
        {"loss": str(float(loss)), "sentences": indices.tolist()}
        for indices, loss in zip(micro_batches, losses, strict=True)
    ]
    weights = {
        name: {
            "norm": str(float(parameter.detach().float().norm())),
            "not finite": int((~parameter.detach().isfinite()).sum()),
        }
        for name, parameter in model.named_parameters()
    }
    content = {
        "step": step,
        "learning_rate": learning_rate,
        "micro_batches": work,
        "weights": weights,
    }
    write_json(path, content)
