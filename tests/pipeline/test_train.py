"""The door to training has exit codes, stops at signals, and refuses what cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.files import only_command_in
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import ROOT
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import free_port, run_process
from tests.pipeline.ranks import new_run, train

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # now it cannot be imported
runpy.run_module("pipeline.train", run_name="__main__", alter_sys=True)
"""


def steps_left(recipe: Path, run_dir: Path, *keys: str) -> tuple[int, str]:
    """Ask whether there are steps left to train, where torch cannot be imported.

    :returns: the exit code, and what was said.
    """
    options = ["--config", str(recipe), "--run_dir", str(run_dir), *keys, "--steps_left"]
    done = run_process([sys.executable, "-c", WITHOUT_TORCH, *options])
    return done.returncode, done.stderr


def test_steps_are_left_before_training(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    assert steps_left(tiny_recipe, new_run(prepared, "untrained")) == (3, "")


@pytest.mark.slow
def test_no_steps_are_left_after_training(tiny_recipe: Path, six_steps: Path) -> None:
    code, said = steps_left(tiny_recipe, six_steps)
    assert code == 0, said
    assert said.startswith("train: finished: step 6 of 6 ")


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    """The whole process group gets it, as from a terminal's Ctrl-C and most schedulers."""
    run_dir = new_run(prepared, "stopped")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    ranks = ["--num_accelerators", "2", "--master_port", str(free_port())]
    script = [str(ROOT / "pipeline" / "train.py"), "--config", str(tiny_recipe)]
    options = ["--run_dir", str(run_dir), "--training.max_steps", "100000"]
    process = subprocess.Popen(
        [launcher, *ranks, *script, *options],
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
    assert steps_left(tiny_recipe, run_dir, *options[2:]) == (3, "")
    assert "Traceback" not in output


@pytest.mark.slow
def test_one_training_at_a_time(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    run_dir = new_run(prepared, "taken")
    with only_command_in(run_dir):
        codes, said = train(tiny_recipe, run_dir, ranks=2)
    assert codes == [1, 1]
    assert said.count("another command is at work here") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_conflicting_deepspeed_config_exits_2(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 3.0}')
    run_dir = new_run(prepared, "conflict")
    codes, said = train(tiny_recipe, run_dir, "--deepspeed_config", tmp_path / "ds.json")
    assert codes == [2]
    assert "ds.json: `gradient_clipping` is set there" in said
    assert "training.clip_norm" in said
    assert "Traceback" not in said
