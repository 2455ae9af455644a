"""Training: progress, checkpoints, signals, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.files import only_command_in
from models.config import ActivationCheckpointing, ModelConfig
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.weights import average_weights, load_weights
from pipeline.recipe import ROOT, Recipe, TrainingConfig, UsageError
from pipeline.training.deepspeed_config import activation_checkpointing, deepspeed_config
from pipeline.training.learning_rate import learning_rate_factor
from tests.conftest import Command, free_port, launcher, run_process
from tests.pipeline.ranks import new_run, tracked, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(prepared: Recipe, tiny_recipe: Path) -> Path:
    """The run_dir of six steps with dropout, one rank, ZeRO stage 1."""
    run_dir = new_run(prepared, "undisturbed")
    codes, said = train(tiny_recipe, run_dir, log_every=1)
    assert codes == [0], said
    return run_dir


def test_progress_and_checkpoints(undisturbed: Path) -> None:
    losses = tracked(undisturbed, "train_loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    checkpoints = list_checkpoints(undisturbed / "checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    assert (undisturbed / "checkpoints" / "latest").read_text() == checkpoints[-1].tag
    averaged = average_weights(checkpoints)
    one, two = (load_weights(checkpoint) for checkpoint in checkpoints)
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


def test_what_a_log_tells(undisturbed: Path) -> None:
    log = (undisturbed / "log").read_text()
    assert "preflight: 600 training pairs" in log
    assert re.search(r"preflight: the largest micro-batch \(\d+ × \d+ \+ \d+ tokens\) fits", log)
    parts = r"epoch .* loss .* ppl .* lr .* grad norm .* tokens/s .* padding .*% .* wait .*% .*"
    assert re.search(rf"step 6/6 \| {parts} GiB \| ETA 0:00:00", log)
    assert re.search(r"step 6 \| valid loss .* \| ppl .* \| best so far", log)


def test_a_bar_on_a_terminal(prepared: Recipe, tiny_recipe: Path) -> None:
    run_dir = new_run(prepared, "terminal")
    script = [str(ROOT / "pipeline" / "train.py"), "--config", str(tiny_recipe)]
    command = shlex.join([sys.executable, *script, "--run_dir", str(run_dir)])
    one_rank = ["RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "LOCAL_SIZE=1"]
    meeting = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={free_port()}"]
    # `script` gives it a terminal, and exits with its code.
    terminal = ["script", "-qec", command, "/dev/null"]
    done = run_process(["env", "TERM=xterm", *one_rank, *meeting, *terminal])
    assert done.returncode == 0, done.stdout
    assert "━" in done.stdout
    assert "6/6" in done.stdout


def test_a_resumed_run_takes_the_recipes_learning_rate(
    tiny_recipe: Path, undisturbed: Path
) -> None:
    run_dir = undisturbed.with_name("slower")
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    codes, said = train(tiny_recipe, run_dir, log_every=1, learning_rate=1e-3)
    assert codes == [0], said
    now, before = tracked(run_dir, "learning_rate"), tracked(undisturbed, "learning_rate")
    assert now[4] == pytest.approx(before[4] / 5)
    now, before = tracked(run_dir, "train_loss"), tracked(undisturbed, "train_loss")
    assert now[4] == before[4]  # of the weights before the step
    assert now[5] != before[5]


def test_sigterm_saves_and_says_how_to_go_on(prepared: Recipe, tiny_recipe: Path) -> None:
    """To the whole process group, as a terminal's Ctrl-C and most schedulers send it."""
    run_dir = new_run(prepared, "stopped")
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
    assert process.returncode != 0, output  # the launcher has a code of its own for a signal
    (stopped,) = list_checkpoints(run_dir / "checkpoints")[-1:]
    assert f"stopped by a signal at step {stopped.step}; run the same command again" in output
    assert "Traceback" not in output


def test_one_training_at_a_time(prepared: Recipe, tiny_recipe: Path) -> None:
    run_dir = new_run(prepared, "taken")
    with only_command_in(run_dir):
        codes, said = train(tiny_recipe, run_dir, ranks=2)
    assert codes == [1, 1]
    assert said.count("another command is at work here") == 1
    assert "Traceback" not in said


def test_a_conflicting_deepspeed_config_exits_2(
    prepared: Recipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3.0}')
    run_dir = new_run(prepared, "conflict")
    codes, said = train(tiny_recipe, run_dir, "--deepspeed_config", tmp_path / "ds.json")
    assert codes == [2]
    assert "ds.json: `gradient_clipping` is set there" in said
    assert "training.clip_norm" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"optimizer": {"type": "Lamb"}}', "`optimizer` is set there"),
        ('{"train_batch_size": 8}', "`train_batch_size` is set there"),
        ('{"bf16": {"enabled": true}}', "use stage 1 or more"),
        ('{"fp16": {"enabled": true}}', "use stage 1 or more"),
        ('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}', "both enabled"),
        ('{"zero_optimization": {"stage": 4}}', "must be 0 or 1 or 2 or 3, not 4"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "needs ZeRO stage 1"),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "needs ZeRO stage 3",
        ),
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
    config = TrainingConfig(
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
    config = deepspeed_config(TrainingConfig(deepspeed_config=path), accumulation_steps=4)
    assert config["gradient_clipping"] == 1.0
    assert config["gradient_accumulation_steps"] == 4
    offload = "offload_optimizer" in config["zero_optimization"]
    assert config["optimizer"]["params"].get("torch_adam", False) != offload


def test_checkpoints_of_another_vocabulary_are_refused(
    tiny_recipe: Path, undisturbed: Path, command: Command
) -> None:
    run_dir = undisturbed.with_name("foreign")
    shutil.copytree(undisturbed, run_dir)
    arguments = ["--config", tiny_recipe, "--run_dir", run_dir, "--data.vocabulary.size", "310"]
    assert command("pipeline.prepare", *arguments).returncode == 0
    for module in (["pipeline.train", "--steps_left"], ["pipeline.evaluate"], ["pipeline.export"]):
        done = command(*module, *arguments)
        assert done.returncode == 1
        assert "belongs to another vocabulary" in done.stderr
        assert "Traceback" not in done.stderr
    codes, said = train(tiny_recipe, run_dir, *arguments[4:], max_steps=9)
    assert codes == [1]
    assert "belongs to another vocabulary" in said
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
    noam = config.model_copy(update={"schedule": "noam"})
    peak = 512**-0.5 * 10**-0.5
    assert learning_rate_factor(noam, 9, 512) == pytest.approx(peak)
    assert learning_rate_factor(noam, 4, 512) == pytest.approx(peak / 2)
    assert learning_rate_factor(noam, 39, 512) == pytest.approx(peak / 2)
