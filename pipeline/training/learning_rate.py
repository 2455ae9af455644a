"""The learning rate of each step."""

from __future__ import annotations

import math

from pipeline.recipe import TrainingConfig


def learning_rate_factor(
    training: TrainingConfig, step: int, model_dim: int, last_step: int
) -> float:
    """Return what the learning rate is multiplied with in step 0, 1, …: linear warm-up, then decay.

    :param model_dim: the width of the model, for the schedule `noam` (arXiv 1706.03762).
    :param last_step: where training ends, and with it the schedule `cosine`.
    """
    warmup_steps = training.warmup_steps
    if training.schedule == "noam":
        return float(model_dim**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup_steps**-1.5))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if training.schedule == "inverse_sqrt":
        return math.sqrt(max(1, warmup_steps) / (step + 1))
    decay_steps = max(1, last_step - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
