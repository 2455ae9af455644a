"""DeepSpeed's JSON and the recipe: each value has one owner.

The JSON owns ZeRO, precision, offload and communication. The recipe owns batch sizes, optimizer,
schedule and clipping; the JSON leaves those out or says "auto". Activation checkpointing may be set
in either.

DeepSpeed itself ignores keys that it does not know, and takes many seconds to be imported. So the
keys are checked here, against a list of what its config models have.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ActivationCheckpointing, LayersConfig
from pipeline.recipe import ROOT, TrainingConfig, UsageError

ON_CPU, ON_GPU = (ROOT / "ds_configs" / f"{name}.json" for name in ("zero1", "zero2_bf16"))
"""What is taken where no JSON is named."""

KNOWN_KEYS = Path(__file__).with_name("deepspeed_keys.json")  # from DeepSpeed's config models

# DeepSpeed's keys that may be set, besides those of KNOWN_KEYS, and what they may be.
PLAIN_KEYS: dict[str, Any] = {
    "communication_data_type": ["bf16", "fp16", "fp32"],
    "data_types": {"grad_accum_dtype": ["bf16", "fp16", "fp32"]},
    "disable_python_gc": "true or false",
    "dump_state": "true or false",
    "gradient_allreduce_op": ["mean"],
    "gradient_predivide_factor": [1, 1.0],  # ZeRO 3 would divide twice
    "log_level": "text",
    "memory_breakdown": "true or false",
    "prescale_gradients": [False],
    "steps_per_print": "an integer > 0",
    "wall_clock_breakdown": "true or false",
    "zero_allow_untested_optimizer": "true or false",
    "zero_force_ds_cpu_optimizer": "true or false",
}

# DeepSpeed's keys that cannot work here, and why.
MODELS, BATCHES = "it is for other models", "the recipe and the batch plan decide what a step sees"
FILES, TOOLS = "checkpoints are written in one way here", "it is not supported here"
CANNOT_WORK = {
    "aio": "offloading to NVMe is not supported here",
    "amp": "Apex is not installed; use `bf16` or `fp16`",
    "autotuning": TOOLS,
    "bfloat16": "its name is `bf16` now",
    "checkpoint": FILES,
    "comet": TOOLS,
    "compile": TOOLS,
    "compression_training": MODELS,
    "curriculum_learning": BATCHES,
    "data_efficiency": BATCHES,
    "dataloader_drop_last": BATCHES,
    "datastates_ckpt": FILES,
    "disable_allgather": TOOLS,
    "eigenvalue": TOOLS,
    "elasticity": BATCHES,
    "expert_parallel": MODELS,
    "flops_profiler": "use torch.profiler",
    "graph_harvesting": TOOLS,
    "hybrid_engine": MODELS,
    "load_universal_checkpoint": FILES,
    "managed_gradient_accumulation": BATCHES,
    "nebula": FILES,
    "pipeline": MODELS,
    "progressive_layer_drop": "the models take no such arguments",
    "quantize_training": MODELS,
    "seq_parallel_communication_data_type": MODELS,
    "sparse_attention": MODELS,
    "sparse_gradients": "no gradient here is sparse",
    "tensor_parallel": MODELS,
    "timers": TOOLS,
    "torch_autocast": "use `bf16` or `fp16`",
    "use_data_before_expert_parallelism": MODELS,
    "weight_quantization": MODELS,
    "zero_optimization.elastic_checkpoint": FILES,
    "zero_optimization.leaf_module": MODELS,
    "zero_optimization.legacy_stage1": TOOLS,
    "zero_optimization.offload_optimizer.super_offload": TOOLS,
    "zero_optimization.zenflow": TOOLS,
    "zero_optimization.zero_hpz_partition_size": TOOLS,
    "zero_optimization.zero_quantized_gradients": TOOLS,
    "zero_optimization.zero_quantized_nontrainable_weights": TOOLS,
    "zero_optimization.zero_quantized_weights": TOOLS,
    "bf16.bf16_master_weights_and_grads": "master weights are float32 here",
    "bf16.bf16_optimizer_states": "the optimizer's state is float32 here",
    "fp16.auto_cast": "batches hold integers only",
    "fp16.fp16_master_weights_and_grads": "master weights are float32 here",
}

# Keys of the JSON's `activation_checkpointing` that have no meaning here, and why.
REFUSED = {
    "partition_activations": "there is no model parallelism to partition activations over",
    "contiguous_memory_optimization": "torch's allocator places what is kept",
    "synchronize_checkpoint_boundary": "nothing here needs the device to be idle",
    "profile": "use torch.profiler",
}

DEFAULT_BUCKET_SIZE = 500_000_000  # DeepSpeed's, elements


# What the recipe owns, and which key of its `training`.
OWNED = {
    "train_micro_batch_size_per_gpu": "{training.micro_batch_key}",
    "gradient_accumulation_steps": "{training.batch_key}",
    "train_batch_size": "{training.batch_key}",
    "gradient_clipping": "clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}


def json_of(training: TrainingConfig) -> Path:
    """Return `training.deepspeed_config`, or else what suits the device: on GPUs that compute in
    bf16 ZeRO stage 2, which sums gradients in float32; stage 1 in float32 on others and on CPUs."""
    if training.deepspeed_config is not None:
        return training.deepspeed_config
    if _may_have_gpu():
        import torch  # takes seconds

        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
            return ON_GPU
    return ON_CPU


def deepspeed_config(training: TrainingConfig, accumulation_steps: int) -> dict[str, Any]:
    """Return the JSON of `training` with the recipe's values filled in.

    :raises UsageError: unreadable JSON, a value that the recipe owns, or a combination that cannot
        work.
    """
    path = json_of(training)
    config = _read(path)
    _refuse_what_cannot_work(path, training, config)
    if precision(config) == "bf16":  # where its 8 bits of mantissa would lose small gradients
        config.setdefault("communication_data_type", "fp32")
        if zero_stage(config) > 1:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    offload = offloads(config, "optimizer")
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": training.clip_norm,
        "optimizer": _optimizer(training, offload),
    }
    for key, owner in OWNED.items():
        if config.pop(key, "auto") not in ("auto", values.get(key, "auto")):
            raise UsageError(
                f"{path}: `{key}` is set there, but the recipe owns it (training."
                f"{owner.format(training=training)}); "
                f'remove it or say "auto"'
            )
    return {**config, **values}


def activation_checkpointing(
    training: TrainingConfig, model: LayersConfig
) -> ActivationCheckpointing:
    """Return what the recipe says, or else the JSON's `activation_checkpointing`.

    :raises UsageError: they disagree, or the JSON asks for what cannot be.
    """
    path, ours = json_of(training), training.activation_checkpointing
    num_levels = model.deepest
    block = _read(path).get("activation_checkpointing", {})
    if not isinstance(block, dict):
        raise UsageError(f"{path}: `activation_checkpointing` must be an object, not {_say(block)}")
    for key, value in block.items():
        where = f"{path}: `activation_checkpointing.{key}`"
        if key in REFUSED and value:
            raise UsageError(f"{where} cannot be {json.dumps(value)}: {REFUSED[key]}")
        if key not in (*REFUSED, "number_checkpoints", "cpu_checkpointing"):
            raise UsageError(f"{where} is not a key that DeepSpeed has")
    number, offload = block.get("number_checkpoints"), block.get("cpu_checkpointing", False)
    if not isinstance(offload, bool):
        raise UsageError(
            f"{path}: `activation_checkpointing.cpu_checkpointing` must be true or false, "
            f"not {_say(offload)}"
        )
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
    return _offload_device(config, what) != "none"


def _offload_device(config: dict[str, Any], what: str) -> str:
    section = config.get("zero_optimization", {}).get(f"offload_{what}", {})
    return str(section.get("device") or "none")


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage that the JSON says."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


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
    return next(
        (key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True), "fp32"
    )


def _refuse_what_cannot_work(path: Path, training: TrainingConfig, config: dict[str, Any]) -> None:
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    accumulates_in = config.get("data_types", {}).get("grad_accum_dtype")
    reason = None
    if all(config.get(key, {}).get("enabled") is True for key in ("bf16", "fp16")):
        reason = "`bf16` and `fp16` are both enabled; choose one"
    elif precision(config) != "fp32" and stage == 0:
        reason = (
            f"{precision(config)} at ZeRO stage 0 takes DeepSpeed's other optimizer, whose first "
            "update is off; use stage 1 or more"
        )
    elif precision(config) == "bf16" and stage == 1 and accumulates_in == "fp32":
        reason = (
            "`data_types.grad_accum_dtype` fp32 at ZeRO stage 1 takes DeepSpeed's other optimizer, "
            "whose checkpoints cannot be evaluated; use stage 2"
        )
    elif accumulates_in not in (None, "fp32", precision(config)):
        reason = f"`data_types.grad_accum_dtype` {accumulates_in} goes with `{accumulates_in}`"
    elif not config.get("bf16", {}).get("check_grad_overflow", True):
        reason = "`bf16.check_grad_overflow` must be true: training.on_nonfinite needs it"
    elif not zero.get("compute_grad_norm", True):
        reason = "`compute_grad_norm` must be true: clipping and training.on_nonfinite need it"
    elif "nvme" in (_offload_device(config, "optimizer"), _offload_device(config, "param")):
        reason = "offloading to `nvme` is not supported here; use `cpu`"
    elif offloads(config, "optimizer") and stage == 0:
        reason = "`offload_optimizer` needs ZeRO stage 1 or more"
    elif zero.get("offload_optimizer", {}).get("ratio", 1) != 1:
        reason = (
            "`offload_optimizer.ratio` must be 1: DeepSpeed updates the rest by an optimizer that "
            "follows no schedule and is in no checkpoint"
        )
    elif not zero.get("load_from_fp32_weights", True):
        reason = "`load_from_fp32_weights` must be true: training goes on with the same bits"
    elif offloads(config, "param") and stage < 3:
        reason = "`offload_param` needs ZeRO stage 3"
    elif training.ema_decay and stage == 3:
        reason = (
            "training.ema_decay needs the whole weights on every rank, which ZeRO stage 3 has not; "
            "use stage 2, or evaluation.average_checkpoints"
        )
    if reason:
        raise UsageError(f"{path}: {reason}")


def check_precision_of_machine(training: TrainingConfig) -> str | None:
    """Check that this machine can compute in the JSON's precision.

    :returns: a sentence where it can, but slowly.
    :raises UsageError: it cannot.
    """
    path = json_of(training)
    kind = precision(_read(path))
    if kind == "fp32" or os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        return None
    import torch  # takes seconds; DeepSpeed, which asks the same, many

    if _may_have_gpu() and torch.cuda.is_available():
        return None
    if kind == "fp16":
        if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            raise UsageError(f"{path}: `fp16` cannot be computed by this machine's CPU; use `bf16`")
    elif platform.machine() in ("x86_64", "AMD64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return (
            f"{path}: this machine's CPU has no instructions for bf16, and is faster in float32: "
            f"--deepspeed_config {ON_CPU.relative_to(ROOT)}"
        )
    return None


def _may_have_gpu() -> bool:
    """Tell whether DeepSpeed may take a GPU: what DS_ACCELERATOR names, or else what it finds."""
    drivers = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
    found = "cuda" if any(driver.exists() for driver in drivers) else "cpu"
    return os.environ.get("DS_ACCELERATOR", found) == "cuda"


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> dict[str, Any]:
    """Read DeepSpeed's JSON.

    :raises UsageError: it cannot be read, has a key that DeepSpeed does not, or a value of another
        type than DeepSpeed's.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UsageError(f"training.deepspeed_config: cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object")
    known = {**json.loads(KNOWN_KEYS.read_text(encoding="utf-8")), **PLAIN_KEYS}
    checked_elsewhere = dict.fromkeys([*OWNED, "activation_checkpointing"], "anything")
    if problem := _problem(config, {**known, **checked_elsewhere}):
        raise UsageError(f"{path}: {problem}")
    return {key: _without_auto(value) for key, value in config.items()}


def _without_auto(value: Any) -> Any:
    """Return a section without the keys that are "auto": DeepSpeed's default, as if not there."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(item) for key, item in value.items() if item != "auto"}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.

    :raises ValueError: it has a key twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice}` is there twice")
    return found


def _problem(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return what is wrong with a section; None if nothing is.

    :param known: by key, what it may be; see KNOWN_KEYS.
    :param prefix: of the keys, with a dot at its end.
    """
    for name, value in section.items():
        key = f"{prefix}{name}"
        if reason := CANNOT_WORK.get(key):
            if value not in (False, {}) and not (
                isinstance(value, dict) and value.get("enabled") is False
            ):
                return f"`{key}` cannot be used: {reason}"
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{prefix}{near[0]}`?" if near else ""
            return f"`{key}` is not a key that DeepSpeed has{hint}"
        elif isinstance(known[name], dict):
            if not isinstance(value, dict):
                return f"`{key}` must be an object, not {_say(value)}"
            if problem := _problem(value, known[name], f"{key}."):
                return problem
        elif not _fits(value, known[name], auto=bool(prefix)):
            expected = known[name]
            if isinstance(expected, list):
                expected = " or ".join(map(json.dumps, expected))
            return f"`{key}` must be {expected}, not {_say(value)}"
    return None


def _fits(value: Any, expected: str | list[Any], *, auto: bool) -> bool:
    """Tell whether a value is as expected; `"auto"` is DeepSpeed's default where `auto` says so."""
    if expected == "anything" or (auto and value == "auto"):
        return True
    if isinstance(expected, list):
        return any(type(value) is type(one) and value == one for one in expected)
    kind, _, limit = expected.partition(" >")
    if kind == "text" or kind == "a list":
        return isinstance(value, str if kind == "text" else list)
    if kind == "true or false":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if kind == "an integer" and value != int(value):  # 5e8 is one
        return False
    least = float(limit.removeprefix("=")) if limit else -math.inf
    return value >= least if limit.startswith("=") or not limit else value > least


def _say(value: Any) -> str:
    """Return a value as JSON has it, shortened."""
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}…"


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
