"""The door to training has exit codes, stops at signals, and refuses what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep.files import only_command_in
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import run_process
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
