"""What to look at when a gradient is not finite."""

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
    sentences: list[Indices],
    losses: list[torch.Tensor],
) -> None:
    """Write one rank's view of a step: its sentences, their losses, and the state of `weights`.

    :param sentences: of each micro-batch, their numbers in the training shards.
    :param losses: of each micro-batch, summed over its target tokens.
    """
    path.parent.mkdir(exist_ok=True)
    work = [
        {"loss": str(float(loss)), "sentences": indices.tolist()}
        for indices, loss in zip(sentences, losses, strict=True)
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
