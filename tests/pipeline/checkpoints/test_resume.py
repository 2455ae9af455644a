"""Checkpoints are used with nothing but what they belong to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.pipeline.ranks import train

pytestmark = pytest.mark.slow


def test_checkpoints_of_another_vocabulary_are_refused(
    tiny_recipe: Path, six_steps: Path, command: Command
) -> None:
    run_dir = six_steps.with_name("foreign")
    shutil.copytree(six_steps, run_dir)
    arguments = ["--config", tiny_recipe, "--run_dir", run_dir, "--data.vocabulary.size", "310"]
    prepared = command("pipeline.prepare", *arguments)
    assert prepared.returncode == 0
    assert "belongs to another vocabulary" in prepared.stderr
    for module in (["pipeline.train", "--steps_left"], ["pipeline.evaluate"], ["pipeline.export"]):
        done = command(*module, *arguments)
        assert done.returncode == 1
        assert "belongs to another vocabulary" in done.stderr
        assert "Traceback" not in done.stderr
    codes, said = train(tiny_recipe, run_dir, *arguments[4:], max_steps=9)
    assert codes == [1]
    assert "belongs to another vocabulary" in said
    assert not (run_dir / "evaluation").exists()
