"""The file to look at when a gradient was not finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from data_prep.batch_plan import Indices
from data_prep.files import write_json


def dump(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    step: int,
    learning_rate: float,
    examples: list[Indices],
    losses: list[torch.Tensor],
) -> None:
    """Write one rank's view of a step: its examples, their losses, and the state of `weights`.

    :param examples: the numbers of each micro-batch's examples in the training data.
    :param losses: the loss of each micro-batch, summed over its targets.
    """
    path.parent.mkdir(exist_ok=True)
    work = [
        {"loss": str(float(loss)), "examples": indices.tolist()}
        for indices, loss in zip(examples, losses, strict=True)
    ]
    state = {
        name: {
            "norm": str(float(weight.float().norm())),
            "not finite": int((~weight.isfinite()).sum()),
        }
        for name, weight in weights.items()
    }
    content = {
        "step": step,
        "learning_rate": learning_rate,
        "micro_batches": work,
        "weights": state,
    }
    write_json(path, content)
