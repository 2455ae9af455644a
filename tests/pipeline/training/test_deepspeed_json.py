"""DeepSpeed's JSON is checked before anything starts, as DeepSpeed itself would have to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.recipe import ROOT, UsageError
from pipeline.training.deepspeed_config import (
    CANNOT_WORK,
    KNOWN_KEYS,
    OWNED,
    PLAIN_KEYS,
    deepspeed_config,
)
from pipeline.translation_recipe import TranslationTraining
from tests.conftest import Command


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"zero_optimisation": {"stage": 2}}', "`zero_optimisation`.*mean `zero_optimization`"),
        ('{"zero_optimization": {"stage": true}}', "`zero_optimization.stage` must be 0 or 1 or"),
        ('{"zero_optimization": {"stage": "2"}}', 'must be 0 or 1 or 2 or 3, not "2"'),
        ('{"zero_optimization": {"stage": 1.5}}', "must be 0 or 1 or 2 or 3, not 1.5"),
        ('{"zero_optimization": null}', "`zero_optimization` must be an object, not null"),
        ('{"zero_optimization": []}', "must be an object"),
        ('{"zero_optimization": {"stage": 1, "stagee": 1}}', "`zero_optimization.stagee` is not a"),
        ('{"zero_optimization": {"offload_optimizer": null}}', "offload_optimizer` must be an obj"),
        (
            '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
            "mean `zero_optimization.offload_optimizer.device`",
        ),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "CPU"}}}',
            '"cpu" or "none" or "nvme", not "CPU"',
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "`nvme` is not supported",
        ),
        ('{"zero_optimization": {"reduce_bucket_size": 0}}', "an integer > 0, not 0"),
        ('{"zero_optimization": {"reduce_bucket_size": 0.5}}', "an integer > 0, not 0.5"),
        ('{"zero_optimization": {"overlap_comm": "yes"}}', 'true or false, not "yes"'),
        ('{"zero_optimization": {"cpu_offload": true}}', "not a key that DeepSpeed has"),
        ('{"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}', "zenflow` cannot be used"),
        ('{"bf16": true}', "`bf16` must be an object, not true"),
        ('{"bf16": {"enabled": 1}}', "`bf16.enabled` must be true or false, not 1"),
        ('{"fp16": {"loss_scale": -1}}', "a number >= 0, not -1"),
        ('{"fp16": {"loss_scale": NaN}}', "a number >= 0, not NaN"),
        ('{"data_types": {"grad_accum_dtype": "fp8"}}', '"fp32", not "fp8"'),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "goes with `bf16`"),
        (
            '{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}, '
            '"data_types": {"grad_accum_dtype": "fp32"}}',
            "checkpoints cannot be evaluated; use stage 2",
        ),
        ('{"communication_data_type": null}', "`communication_data_type` must be"),
        ('{"elasticity": {"enabled": true}}', "`elasticity` cannot be used: the recipe"),
        ('{"progressive_layer_drop": {"enabled": true}}', "`progressive_layer_drop` cannot be"),
        ('{"gradient_allreduce_op": "sum"}', 'must be "mean"'),
        ('{"activation_checkpointing": {}, "activation_checkpointing": {}}', "is there twice"),
        ('{"optimizer": {"type": "Lamb"}}', "`optimizer` is set there"),
        ('{"train_batch_size": 8}', "`train_batch_size` is set there"),
        ('{"bf16": {"enabled": true}}', "use stage 1 or more"),
        ('{"fp16": {"enabled": true}}', "use stage 1 or more"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "both enabled"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "needs ZeRO stage 1"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "needs ZeRO stage 3",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}',
            "`offload_optimizer.ratio` must be 1",
        ),
        (
            '{"zero_optimization": {"stage": 2, "load_from_fp32_weights": false}}',
            "`load_from_fp32_weights` must be true",
        ),
        ('{"gradient_predivide_factor": 2.0}', "`gradient_predivide_factor` must be 1"),
        ('{"prescale_gradients": true}', "`prescale_gradients` must be false"),
        ("{nonsense", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_deepspeeds_json(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=expected) as caught:
        deepspeed_config(TranslationTraining(deepspeed_config=path), accumulation_steps=1)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": "auto"}},
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1000}},
        {"elasticity": {"enabled": False}, "amp": False, "train_batch_size": "auto"},
        {"tensorboard": {"enabled": True, "output_path": "x"}, "fp16": {"enabled": "auto"}},
    ],
    ids=str,
)
def test_what_is_right(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    deepspeed_config(TranslationTraining(deepspeed_config=path), accumulation_steps=1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_summed_in_float32(stage: int) -> None:
    """At stage 1 by the ranks only: within one DeepSpeed would take another optimizer."""
    path = ROOT / "ds_configs" / f"zero{stage}_bf16.json"
    config = deepspeed_config(TranslationTraining(deepspeed_config=path), accumulation_steps=4)
    assert config["communication_data_type"] == "fp32"
    expected = {"grad_accum_dtype": "fp32"} if stage > 1 else None
    assert config.get("data_types") == expected


@pytest.mark.slow
def test_a_wrong_json_is_told_before_the_launcher_starts(
    tiny_recipe: Path, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimisation": {"stage": 2}}')
    arguments = ["--config", tiny_recipe, "--deepspeed_config", path]
    done = command("pipeline.train", "--steps_left", *arguments)
    assert done.returncode == 2
    assert f"{path}: `zero_optimisation` is not a key that DeepSpeed has" in done.stderr


@pytest.mark.slow
def test_the_keys_are_those_of_the_installed_deepspeed() -> None:
    from tests.pipeline.training.deepspeed_keys import keys_of_deepspeed, keys_that_deepspeed_reads

    known = json.loads(KNOWN_KEYS.read_text(encoding="utf-8"))
    assert known == keys_of_deepspeed()
    assert keys_that_deepspeed_reads() <= {*known, *PLAIN_KEYS, *CANNOT_WORK, *OWNED}
