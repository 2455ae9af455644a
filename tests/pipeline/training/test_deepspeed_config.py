"""DeepSpeed's JSON gets the recipe's values, and is refused where the two disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.config import ActivationCheckpointing, ModelConfig
from pipeline.recipe import ROOT, UsageError
from pipeline.training.deepspeed_config import (
    activation_checkpointing,
    deepspeed_config,
    json_of,
    precision,
    reduce_bucket_size,
    zero_stage,
)
from pipeline.translation_recipe import TranslationTraining


def test_auto_is_deepspeeds_default(tmp_path: Path) -> None:
    """As in the JSONs that Hugging Face's documentation has."""
    path = tmp_path / "ds.json"
    zero = {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}}
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    config = deepspeed_config(TranslationTraining(deepspeed_config=path), accumulation_steps=1)
    assert config["zero_optimization"] == {"stage": 2, "offload_optimizer": {}}
    assert reduce_bucket_size(config, 1000) == 1000
    assert precision(config) == "fp32"


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "has_bf16", "expected"),
    [
        ("cuda", True, True, ("bf16", 2)),
        ("cuda", True, False, ("fp32", 1)),  # before Ampere
        ("cuda", False, False, ("fp32", 1)),  # a driver, and no GPU for this process
        ("cpu", True, True, ("fp32", 1)),
    ],
)
def test_without_a_json_the_device_decides(
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str, has_gpu: bool, has_bf16: bool, expected: tuple[str, int],
) -> None:  # fmt: skip
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    config = deepspeed_config(TranslationTraining(), accumulation_steps=1)
    assert (precision(config), zero_stage(config)) == expected
    named = TranslationTraining(deepspeed_config=ROOT / "ds_configs" / "zero3.json")
    assert json_of(named).name == "zero3.json"


KEEP_ATTENTION = ActivationCheckpointing(levels=1, keep_attention=True)


@pytest.mark.parametrize(
    ("block", "recipe", "expected"),
    [
        ({}, KEEP_ATTENTION, KEEP_ATTENTION),
        ({"number_checkpoints": 3}, None, ActivationCheckpointing(levels=2)),
        ({"number_checkpoints": 4}, None, ActivationCheckpointing(levels=2)),
        (
            {"number_checkpoints": 6, "cpu_checkpointing": True, "profile": False},
            None,
            ActivationCheckpointing(levels=1, cpu_offload=True),
        ),
        (
            {"cpu_checkpointing": True},
            KEEP_ATTENTION,
            KEEP_ATTENTION.model_copy(update={"cpu_offload": True}),
        ),
        ({"cpu_checkpointing": True}, None, "nothing to offload"),
        ({"number_checkpoints": 7}, None, "from 1 to the 6 levels"),
        ({"number_checkpoints": 3}, KEEP_ATTENTION, "differ"),
        ({"partition_activations": True}, None, "`activation_checkpointing.partition_activations`"),
        ({"contiguous_memory_optimization": True}, None, "cannot be true"),
        ({"synchronize_checkpoint_boundary": True}, None, "cannot be true"),
        ({"profile": True}, None, "torch.profiler"),
        ({"levels": 1}, None, "not a key that DeepSpeed has"),
    ],
)
def test_deepspeeds_activation_checkpointing_is_honoured_or_refused(
    tmp_path: Path,
    block: dict[str, object],
    recipe: ActivationCheckpointing | None,
    expected: ActivationCheckpointing | str,
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"activation_checkpointing": block}))
    config = TranslationTraining(
        deepspeed_config=path, activation_checkpointing=recipe or ActivationCheckpointing()
    )
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected) as caught:
            activation_checkpointing(config, ModelConfig(num_levels=6))
        assert str(path) in str(caught.value)
    else:
        assert activation_checkpointing(config, ModelConfig(num_levels=6)) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_configs_leave_the_recipe_its_values(path: Path) -> None:
    config = deepspeed_config(TranslationTraining(deepspeed_config=path), accumulation_steps=4)
    assert config["gradient_clipping"] == 1.0
    assert config["gradient_accumulation_steps"] == 4
    offload = "offload_optimizer" in config["zero_optimization"]
    assert config["optimizer"]["params"].get("torch_adam", False) != offload
