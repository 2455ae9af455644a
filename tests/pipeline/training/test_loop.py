"""The training loop tells how it goes, saves, and goes on with what the recipe says now."""

from __future__ import annotations

import os
import re
import shutil
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.weights import average_weights, load_weights
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import free_port
from tests.pipeline.ranks import finish, new_run, options, start, tracked, train

pytestmark = pytest.mark.slow


def test_progress_and_checkpoints(six_steps: Path) -> None:
    losses = tracked(six_steps, "train_loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    checkpoints = list_checkpoints(six_steps / "checkpoints")
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    assert (six_steps / "checkpoints" / "latest").read_text() == checkpoints[-1].tag
    averaged = average_weights(checkpoints)
    one, two = (load_weights(checkpoint) for checkpoint in checkpoints)
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


def test_what_a_log_tells(six_steps: Path) -> None:
    log = (six_steps / "log").read_text()
    assert "preflight: 600 training pairs" in log
    assert re.search(r"preflight: the largest micro-batch \(\d+ × \d+ \+ \d+ tokens\) fits", log)
    parts = r"epoch .* loss .* ppl .* lr .* grad norm .* tokens/s .* padding .*% .* wait .*% .*"
    assert re.search(rf"step 6/6 \| {parts} GiB \| ETA 0:00:00", log)
    assert re.search(r"step 6 \| valid loss .* \| ppl .* \| best so far", log)


def test_a_bar_on_a_terminal(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    run_dir = new_run(prepared, "terminal")
    screen, terminal = os.openpty()
    ranks = start(options(tiny_recipe, run_dir), Path(os.ttyname(terminal)), 1, TERM="xterm")
    said = b""
    while screen in wait([screen, ranks[0].sentinel]):
        said += os.read(screen, 4096)
    os.close(screen)
    os.close(terminal)
    assert finish(ranks) == [0], said.decode()
    assert "━" in said.decode()
    assert "6/6" in said.decode()


def test_a_resumed_run_takes_the_recipes_learning_rate(tiny_recipe: Path, six_steps: Path) -> None:
    run_dir = six_steps.with_name("slower")
    shutil.copytree(six_steps, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    away = ["--tracking.uri", f"http://127.0.0.1:{free_port()}"]  # which holds up no training
    codes, said = train(tiny_recipe, run_dir, *away, log_every=1, learning_rate=1e-3)
    assert codes == [0], said
    assert "could not be sent" in said
    assert "until now it was trained with other values of training.learning_rate\n" in said
    now, before = tracked(run_dir, "learning_rate"), tracked(six_steps, "learning_rate")
    assert now[4] == pytest.approx(before[4] / 5)
    now, before = tracked(run_dir, "train_loss"), tracked(six_steps, "train_loss")
    assert now[4] == before[4]  # of the weights before the step
    assert now[5] != before[5]
