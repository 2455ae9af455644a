"""Training with the real `deepspeed` launcher, on one and two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from data_prep.stage import only_command_in
from pipeline.checkpoint import average_weights, list_checkpoints, load_weights
from pipeline.config import ROOT, Recipe, TrainingConfig, UsageError
from pipeline.deepspeed_config import deepspeed_config
from pipeline.engine import learning_rate_factor
from tests.conftest import Command, launch, launcher

pytestmark = pytest.mark.slow


def train(
    recipe: Path, run_dir: Path, *arguments: str, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "pipeline" / "train.py"), "--config", str(recipe), "--run_dir"]
    return launch([*script, str(run_dir), *arguments], ranks)


def copy_of(prepared: Recipe, name: str) -> Path:
    """A new run_dir beside the prepared one, with its shards."""
    run_dir = prepared.run_dir.parent / name
    shutil.copytree(prepared.run_dir / "shards", run_dir / "shards")
    return run_dir


def losses(run_dir: Path) -> dict[int, float]:
    return tracked(run_dir, "train_loss")


def tracked(run_dir: Path, key: str) -> dict[int, float]:
    """A metric by step; of a step done twice the second."""
    lines = (run_dir / "tracking" / "journal.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "metrics"]
    return {r["step"]: r["metrics"][key] for r in records if key in r["metrics"]}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_weights(list_checkpoints(run_dir / "checkpoints")[-1])


@pytest.fixture(scope="module")
def undisturbed(prepared: Recipe, tiny_recipe: Path) -> Path:
    """The run_dir of six steps with dropout, one rank, ZeRO stage 1."""
    run_dir = copy_of(prepared, "undisturbed")
    done = train(tiny_recipe, run_dir, "--training.log_every", "1")
    assert done.returncode == 0, done.stderr
    return run_dir


# Ranks draw their own dropout masks, so runs on different numbers of them compare without.
NO_DROPOUT = ["--model.dropout", "0", "--training.log_every", "1"]


@pytest.fixture(scope="module")
def one_rank(prepared: Recipe, tiny_recipe: Path) -> Path:
    """The run_dir of six steps of 1 rank × 4 micro-batches, ZeRO stage 0."""
    run_dir = copy_of(prepared, "one_rank")
    stage_0 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero0.json")]
    done = train(tiny_recipe, run_dir, *NO_DROPOUT, *stage_0)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_progress_and_checkpoints(undisturbed: Path) -> None:
    assert sorted(losses(undisturbed)) == [1, 2, 3, 4, 5, 6]
    assert losses(undisturbed)[6] < losses(undisturbed)[1]
    checkpoints = list_checkpoints(undisturbed / "checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    assert (undisturbed / "checkpoints" / "latest").read_text() == checkpoints[-1].tag
    averaged = average_weights(checkpoints)
    one, two = (load_weights(checkpoint) for checkpoint in checkpoints)
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


@pytest.mark.parametrize(("stage", "checkpoint_levels"), [(2, 0), (3, 1)])
def test_ranks_accumulation_zero_and_checkpointing_change_nothing(
    prepared: Recipe,
    tiny_recipe: Path,
    one_rank: Path,
    tmp_path: Path,
    stage: int,
    checkpoint_levels: int,
) -> None:
    """2 ranks × 2 micro-batches at a higher ZeRO stage against 1 × 4 at stage 0."""
    zero = {"stage": stage}
    if stage == 3:  # else DeepSpeed keeps all of so small a model whole
        zero["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run_dir = copy_of(prepared, f"two_ranks_zero{stage}")
    options = [
        "--deepspeed_config", str(tmp_path / "ds.json"),
        "--training.activation_checkpointing.levels", str(checkpoint_levels),
    ]  # fmt: skip
    done = train(tiny_recipe, run_dir, *NO_DROPOUT, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == pytest.approx(losses(one_rank), rel=1e-5)
    for name, tensor in weights(one_rank).items():
        torch.testing.assert_close(weights(run_dir)[name], tensor, rtol=1e-4, atol=1e-5)


def test_resume_is_bit_identical(tiny_recipe: Path, undisturbed: Path) -> None:
    run_dir = undisturbed.with_name("resumed")
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    (run_dir / "checkpoints" / "latest").write_text("step-00000003")
    done = train(tiny_recipe, run_dir, "--training.log_every", "1")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert losses(run_dir) == losses(undisturbed)
    expected = weights(undisturbed)
    for name, tensor in weights(run_dir).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_resumed_run_takes_the_recipes_learning_rate(
    tiny_recipe: Path, undisturbed: Path
) -> None:
    run_dir = undisturbed.with_name("slower")
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    done = train(
        tiny_recipe, run_dir, "--training.log_every", "1", "--training.learning_rate", "1e-3"
    )
    assert done.returncode == 0, done.stderr
    rates = tracked(run_dir, "learning_rate")
    assert rates[4] == pytest.approx(tracked(undisturbed, "learning_rate")[4] / 5)
    assert losses(run_dir)[4] == losses(undisturbed)[4]  # of the weights before the step
    assert losses(run_dir)[5] != losses(undisturbed)[5]


def test_sigterm_saves_and_says_how_to_go_on(prepared: Recipe, tiny_recipe: Path) -> None:
    """To the whole process group, as a terminal's Ctrl-C and most schedulers send it."""
    run_dir = copy_of(prepared, "stopped")
    script = [str(ROOT / "pipeline" / "train.py"), "--config", str(tiny_recipe)]
    options = ["--run_dir", str(run_dir), "--training.max_steps", "100000"]
    process = subprocess.Popen(
        [*launcher(2), *script, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "step 4/" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    output += process.stdout.read()
    process.wait()
    assert process.returncode == 75, output
    (stopped,) = list_checkpoints(run_dir / "checkpoints")[-1:]
    assert f"stopped by a signal at step {stopped.step}; run the same command again" in output
    assert "Traceback" not in output


def test_one_training_at_a_time(prepared: Recipe, tiny_recipe: Path) -> None:
    run_dir = copy_of(prepared, "taken")
    with only_command_in(run_dir):
        done = train(tiny_recipe, run_dir)
    assert done.returncode == 1
    assert "another command is at work here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conflicting_deepspeed_config_exits_2(
    prepared: Recipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3.0}')
    run_dir = copy_of(prepared, "conflict")
    arguments = ["--deepspeed_config", str(tmp_path / "ds.json")]
    done = train(tiny_recipe, run_dir, *arguments)
    assert done.returncode == 2, done.stderr
    assert "ds.json: `gradient_clipping` is set there" in done.stderr
    assert "training.clip_norm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"optimizer": {"type": "Lamb"}}', "`optimizer` is set there"),
        ('{"train_batch_size": 8}', "`train_batch_size` is set there"),
        ('{"activation_checkpointing": {"number_checkpoints": 2}}', "training.checkpoint_levels"),
        ('{"bf16": {"enabled": true}}', "use stage 1 or more"),
        ("{nonsense", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_deepspeed_json_is_checked(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=expected) as caught:
        deepspeed_config(TrainingConfig(deepspeed_config=path), accumulation_steps=1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_deepspeed_configs_leave_the_recipe_its_values(path: Path) -> None:
    config = deepspeed_config(TrainingConfig(deepspeed_config=path), accumulation_steps=4)
    assert config["gradient_clipping"] == 1.0
    assert config["gradient_accumulation_steps"] == 4
    offload = "offload_optimizer" in config["zero_optimization"]
    assert config["optimizer"]["params"]["torch_adam"] != offload


def test_checkpoints_of_another_vocabulary_are_refused(
    tiny_recipe: Path, undisturbed: Path, command: Command
) -> None:
    run_dir = undisturbed.with_name("foreign")
    shutil.copytree(undisturbed, run_dir)
    arguments = ["--config", tiny_recipe, "--run_dir", run_dir, "--data.vocabulary.size", "310"]
    assert command("data_prep.prepare", *arguments).returncode == 0
    for module in ("pipeline.checkpoint", "pipeline.evaluate", "pipeline.export"):
        done = command(module, *arguments)
        assert done.returncode == 1
        assert "belongs to another vocabulary" in done.stderr
        assert "Traceback" not in done.stderr
    done = train(tiny_recipe, run_dir, *map(str, arguments[4:]), "--training.max_steps", "9")
    assert done.returncode == 1
    assert "belongs to another vocabulary" in done.stderr
    assert not (run_dir / "evaluation").exists()


def test_learning_rate_schedules() -> None:
    config = TrainingConfig(max_steps=110, warmup_steps=10)
    factors = [learning_rate_factor(config, step, 512) for step in range(111)]
    assert factors[0] == 0.1
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    rooted = config.model_copy(update={"schedule": "inverse_sqrt"})
    assert learning_rate_factor(rooted, 39, 512) == pytest.approx(0.5)
