"""DeepSpeed's JSON and the recipe: each value has one owner.

The JSON owns ZeRO, precision, offload and communication. The recipe owns batch sizes, optimizer,
schedule and clipping; the JSON leaves those out or says "auto". Activation checkpointing may be set
in either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.config import ActivationCheckpointing, ModelConfig
from pipeline.recipe import TrainingConfig, UsageError

# Keys of the JSON's `activation_checkpointing` that have no meaning here, and why.
REFUSED = {
    "partition_activations": "there is no model parallelism to partition activations over",
    "contiguous_memory_optimization": "torch's allocator places what is kept",
    "synchronize_checkpoint_boundary": "nothing here needs the device to be idle",
    "profile": "use torch.profiler",
}

DEFAULT_BUCKET_SIZE = 500_000_000  # DeepSpeed's, elements


def deepspeed_config(training: TrainingConfig, accumulation_steps: int) -> dict[str, Any]:
    """Return the JSON of `training.deepspeed_config` with the recipe's values filled in.

    :raises UsageError: unreadable JSON, a value that the recipe owns, or a combination that cannot
        work.
    """
    path = training.deepspeed_config
    config = _read(path)
    _refuse_what_cannot_work(training, config)
    offload = offloads(config, "optimizer")
    owned = {
        "train_micro_batch_size_per_gpu": ("training.micro_batch_tokens", 1),
        "gradient_accumulation_steps": ("training.max_tokens", accumulation_steps),
        "train_batch_size": ("training.max_tokens", "auto"),
        "gradient_clipping": ("training.clip_norm", training.clip_norm),
        "optimizer": ("training.optimizer", _optimizer(training, offload)),
        "scheduler": ("training.schedule", "auto"),
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


def activation_checkpointing(
    training: TrainingConfig, model: ModelConfig
) -> ActivationCheckpointing:
    """Return what the recipe says, or else the JSON's `activation_checkpointing`.

    :raises UsageError: they disagree, or the JSON asks for what cannot be.
    """
    path, ours = training.deepspeed_config, training.activation_checkpointing
    num_levels = model.num_levels
    block = _read(path).get("activation_checkpointing", {})
    for key, value in block.items():
        where = f"{path}: `activation_checkpointing.{key}`"
        if key in REFUSED and value:
            raise UsageError(f"{where} cannot be {json.dumps(value)}: {REFUSED[key]}")
        if key not in (*REFUSED, "number_checkpoints", "cpu_checkpointing"):
            raise UsageError(f"{where} is not a key that DeepSpeed has")
    number, offload = block.get("number_checkpoints"), block.get("cpu_checkpointing", False)
    theirs = ours
    if number is not None and model.architecture == "transformer":
        raise UsageError(
            f"{path}: `activation_checkpointing.number_checkpoints`: model.architecture "
            "transformer has no activation checkpointing"
        )
    if number is not None:
        if type(number) is not int or not 1 <= number <= num_levels:
            raise UsageError(
                f"{path}: `activation_checkpointing.number_checkpoints` must be from 1 to the "
                f"{num_levels} levels of the model, not {json.dumps(number)}"
            )
        theirs = ActivationCheckpointing(levels=-(-num_levels // number), cpu_offload=offload)
    elif offload and not ours.levels:
        raise UsageError(
            f"{path}: `activation_checkpointing.cpu_checkpointing` has nothing to offload: set "
            "number_checkpoints beside it, or training.activation_checkpointing.levels"
        )
    elif offload:
        theirs = ours.model_copy(update={"cpu_offload": True})
    if ours.levels and theirs.model_copy(update={"cpu_offload": ours.cpu_offload}) != ours:
        raise UsageError(
            f"{path}: `activation_checkpointing` and training.activation_checkpointing of the "
            "recipe differ; set one of them"
        )
    return theirs


def offloads(config: dict[str, Any], what: str) -> bool:
    """Tell whether the JSON moves something to the host.

    :param what: `optimizer` or `param`.
    """
    section = config.get("zero_optimization", {}).get(f"offload_{what}", {})
    return bool(section.get("device", "none") != "none")


def zero_stage(config: dict[str, Any]) -> Any:
    """Return the ZeRO stage as the JSON says it."""
    return config.get("zero_optimization", {}).get("stage", 0)


def reduce_bucket_size(config: dict[str, Any], parameters: int) -> int:
    """Return the elements of the buffer in which DeepSpeed collects gradients before it reduces
    them: what the JSON says, or else what all gradients fit in.

    DeepSpeed allocates it whole, and by default takes half a thousand million, whatever the model.
    Its other buckets are limits to what it does at once; it allocates nothing for them.

    :param parameters: how many are trained.
    """
    size = config.get("zero_optimization", {}).get("reduce_bucket_size")
    return int(size or min(parameters, DEFAULT_BUCKET_SIZE))


def precision(config: dict[str, Any]) -> str:
    """Return `bf16`, `fp16` or `fp32`."""
    return next((key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled")), "fp32")


def _refuse_what_cannot_work(training: TrainingConfig, config: dict[str, Any]) -> None:
    path = training.deepspeed_config
    stage = zero_stage(config)
    reason = None
    if stage not in (0, 1, 2, 3):
        reason = f"`zero_optimization.stage` is {json.dumps(stage)}; there are 0, 1, 2 and 3"
    elif all(config.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        reason = "`bf16` and `fp16` are both enabled; choose one"
    elif precision(config) != "fp32" and stage == 0:
        reason = (
            f"{precision(config)} at ZeRO stage 0 takes DeepSpeed's other optimizer, whose first "
            "update is off; use stage 1 or more"
        )
    elif not config.get("bf16", {}).get("check_grad_overflow", True):
        reason = "`bf16.check_grad_overflow` must be true: training.on_nonfinite needs it"
    elif not config.get("zero_optimization", {}).get("compute_grad_norm", True):
        reason = "`compute_grad_norm` must be true: clipping and training.on_nonfinite need it"
    elif offloads(config, "optimizer") and stage == 0:
        reason = "`offload_optimizer` needs ZeRO stage 1 or more"
    elif offloads(config, "param") and stage < 3:
        reason = "`offload_param` needs ZeRO stage 3"
    elif training.ema_decay and stage == 3:
        reason = (
            "training.ema_decay needs the whole weights on every rank, which ZeRO stage 3 has not; "
            "use stage 2, or evaluation.average_checkpoints"
        )
    if reason:
        raise UsageError(f"{path}: {reason}")


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
    """Return DeepSpeed's optimizer block: torch's Adam, or DeepSpeed's CPU Adam when offloaded."""
    adamw = training.optimizer == "adamw"
    return {
        "type": "AdamW" if adamw else "Adam",
        "params": {
            "lr": training.learning_rate,
            "betas": list(training.adam_betas),
            "eps": training.adam_eps,
            "weight_decay": training.weight_decay,
            "adam_w_mode": adamw,
            **({} if offload else {"torch_adam": True, "fused": True}),
        },
    }
