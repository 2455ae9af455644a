"""`./run.sh` takes real corpora through all stages, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.shards import read_shards_manifest
from pipeline.recipe import ROOT
from tests.conftest import Command, run_process

RUN = str(ROOT / "run.sh")


@pytest.mark.slow
def test_real_data_on_two_ranks_with_zero_2(shared: Path, tmp_path: Path, command: Command) -> None:
    arguments = [
        "--config", "recipes/multi30k_de_en.yaml", "--data.root", str(shared / "data"),
        "--run_dir", str(tmp_path / "m30k"), "--deepspeed_config", "ds_configs/zero2.json",
        "--training.max_steps", "2", "--model.model_dim", "32", "--model.ffn_inner_dim", "64",
        "--model.num_heads", "2", "--model.num_levels", "2", "--evaluation.beam_size", "1",
        "--evaluation.max_length_ratio", "0.3",
    ]  # fmt: skip
    done = run_process([RUN, *arguments], DEEPSPEED_ARGS="--num_accelerators 2")
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) × 1 micro-batch(es) a step, ZeRO stage 2" in done.stderr
    folder = tmp_path / "m30k" / "evaluation" / "test_2016_flickr"
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["sentences"], scores["ranks"]) == (1000, 2)
    both = (folder / "hypotheses.txt").read_text()
    assert len({*both.splitlines()}) > 50  # others would show if they were put together wrongly
    sources = (tmp_path / "m30k" / "clean" / "test.de").read_text()
    alone = command("pipeline.translate", *arguments, stdin=sources)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == both
    totals = read_shards_manifest(tmp_path / "m30k" / "shards").totals
    assert (totals["valid"].pairs, totals["test"].pairs) == (1014, 1000)
    assert 28900 < totals["train"].pairs <= 29000
