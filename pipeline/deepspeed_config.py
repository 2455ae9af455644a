"""DeepSpeed's JSON and the recipe: each value has one owner.

The JSON owns ZeRO, precision, offload and communication. The recipe owns batch sizes, optimizer,
schedule, clipping and activation checkpointing; the JSON leaves those out or says "auto".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import TrainingConfig, UsageError


def deepspeed_config(training: TrainingConfig, accumulation_steps: int) -> dict[str, Any]:
    """The JSON of `training.deepspeed_config` with the recipe's values filled in.

    :raises UsageError: unreadable JSON, or a value that the recipe owns.
    """
    path = training.deepspeed_config
    config = _read(path)
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if config.get("bf16", {}).get("enabled") and stage == 0:
        raise UsageError(
            f"{path}: bf16 at ZeRO stage 0 takes DeepSpeed's other optimizer, whose first update "
            "is off; use stage 1 or more"
        )
    owned = {
        "train_micro_batch_size_per_gpu": ("training.micro_batch_tokens", 1),
        "gradient_accumulation_steps": ("training.max_tokens", accumulation_steps),
        "train_batch_size": ("training.max_tokens", "auto"),
        "gradient_clipping": ("training.clip_norm", training.clip_norm),
        "optimizer": ("training.learning_rate and training.adam_*", _optimizer(training, offload)),
        "scheduler": ("training.schedule", "auto"),
        "activation_checkpointing": ("training.checkpoint_levels", "auto"),
    }
    for key, (owner, value) in owned.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UsageError(
                f"{path}: `{key}` is set there, but the recipe owns it ({owner}); "
                f'remove it or say "auto"'
            )
        config.pop(key, None)
        if value != "auto":
            config[key] = value
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"training.deepspeed_config: cannot read {path}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return config


def _optimizer(training: TrainingConfig, offload: bool) -> dict[str, Any]:
    """DeepSpeed's optimizer block; torch's AdamW, or DeepSpeed's CPU Adam when offloaded."""
    return {
        "type": "AdamW",
        "params": {
            "lr": training.learning_rate,
            "betas": list(training.adam_betas),
            "eps": training.adam_eps,
            "weight_decay": training.weight_decay,
            "torch_adam": not offload,
        },
    }
