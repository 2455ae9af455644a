"""Training goes on exactly, on other ranks and at other ZeRO stages than it began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.checkpoints.relayout_runs import main
from tests.pipeline.ranks import finish, start_ranks

pytestmark = pytest.mark.slow

CUT = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else a small model stays whole
CPU = {"device": "cpu"}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": CUT},
    "offload": {"zero_optimization": {**CUT, "offload_optimizer": CPU, "offload_param": CPU}},
    "bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


class Layout(NamedTuple):
    """Says how a training is cut up: DeepSpeed's configuration, and the number of ranks."""

    deepspeed: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.deepspeed}x{self.ranks}"


PAIRS = [
    (Layout("zero0", 1), Layout("zero1", 1)),
    (Layout("zero1", 1), Layout("zero0", 1)),
    (Layout("zero1", 1), Layout("zero1", 2)),
    (Layout("zero1", 2), Layout("zero1", 1)),
    (Layout("zero0", 1), Layout("zero3", 2)),
    (Layout("zero2", 2), Layout("zero3", 2)),
    (Layout("zero3", 2), Layout("zero3", 1)),
    (Layout("zero3", 2), Layout("zero1", 2)),
    (Layout("zero3", 2), Layout("offload", 2)),
    (Layout("zero1", 1), Layout("offload", 2)),
    (Layout("offload", 1), Layout("zero1", 1)),
    (Layout("bf16", 1), Layout("bf16", 2)),
    (Layout("bf16", 1), Layout("zero1", 1)),
    (Layout("zero1", 1), Layout("bf16", 1)),
]


@pytest.fixture(scope="module")
def runs(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    """Return the folder of all runs: one of every layout, and those that go on from its step 3."""
    folder = prepared.run_dir.parent / "relayout"
    folder.mkdir()
    for name, config in DEEPSPEED.items():
        (folder / f"{name}.json").write_text(json.dumps(config))

    def job(layout: Layout, name: str, source: str | None = None) -> dict[str, Any]:
        shutil.copytree(prepared.run_dir / "shards", folder / name / "shards")
        if source:  # as a crash leaves it
            crashed = folder / name / "checkpoints" / ".step-00000003.universal"
            (crashed / "state" / "zero" / "stale").mkdir(parents=True)
        return {
            "recipe": str(tiny_recipe),
            "checkpoint": source and str(folder / source / "checkpoints" / "step-00000003"),
            "options": [
                ("run_dir", str(folder / name)),
                ("model.dropout", "0"),
                ("training.deepspeed_config", str(folder / f"{layout.deepspeed}.json")),
            ],
        }

    def begin(ranks: int) -> list[dict[str, Any]]:
        sources = {source for source, _ in PAIRS if source.ranks == ranks}
        return [job(layout, str(layout)) for layout in sorted(sources)]

    def go_on(sources: set[int], ranks: int) -> list[dict[str, Any]]:
        return [
            job(target, f"{source}_{target}", str(source))
            for source, target in PAIRS
            if source.ranks in sources and target.ranks == ranks
        ]

    train(1, [*begin(1), *go_on({1}, 1)], folder)
    damaged = folder / "damaged" / "checkpoints" / "step-00000003"
    shutil.copytree(folder / "zero1x1" / "checkpoints" / "step-00000003", damaged)
    states = damaged / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({}, states)  # a whole file without what is needed
    info = json.loads((damaged / "checkpoint.json").read_text())
    info["bytes"][states.name], info["parts"] = states.stat().st_size, {}
    (damaged / "checkpoint.json").write_text(json.dumps(info))
    refused = job(Layout("zero1", 2), "refused", "damaged")
    train(2, [*begin(2), *go_on({1, 2}, 2), refused], folder)
    train(1, go_on({2}, 1), folder)
    return folder


def train(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do these jobs on so many ranks."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    log = folder / "log"
    processes = start_ranks(main, [str(folder / "jobs.json")], log, ranks)
    assert finish(processes, 300) == [0] * ranks, log.read_text()


def result(run: Path) -> dict[str, Any]:
    """Return what a job has found."""
    found: dict[str, Any] = torch.load(run / "result.pt", weights_only=True)
    return found


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all weights, relative to their norm."""
    names = [name for name in one if "/" not in name]
    a, b = (torch.cat([state[name].flatten().double() for name in names]) for state in (one, two))
    return float((a - b).norm() / b.norm())


pairs = pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)


@pairs
def test_weights_moments_and_counters_arrive_as_they_were(
    runs: Path, source: Layout, target: Layout
) -> None:
    saved = result(runs / str(source))["step 3"]
    arrived = result(runs / f"{source}_{target}")["start"]
    assert saved["/step"] == 3
    assert arrived.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(arrived[name], tensor), name


@pairs
def test_training_goes_on_as_if_nothing_had_happened(
    runs: Path, source: Layout, target: Layout
) -> None:
    undisturbed = result(runs / str(source))
    run_dir = runs / f"{source}_{target}"
    resumed = result(run_dir)
    rounding = 1e-3 if "bf16" in (source.deepspeed, target.deepspeed) else 1e-5
    assert list(resumed["losses"]) == [4, 5, 6]
    expected = {step: undisturbed["losses"][step] for step in (4, 5, 6)}
    assert resumed["losses"] == pytest.approx(expected, rel=rounding)
    assert difference(resumed["step 6"], undisturbed["step 6"]) < rounding
    assert not list(run_dir.rglob("*universal*"))


def test_the_log_says_what_has_changed(runs: Path) -> None:
    log = (runs / "log").read_text()
    assert "(written by 2 ranks at ZeRO stage 3, fp32; now 1 rank at ZeRO stage 3, fp32)" in log
    assert (
        "(written by 1 rank at ZeRO stage 1, fp32; now 2 ranks at ZeRO stage 3, fp32, offload)"
        in log
    )


def test_every_rank_refuses_what_rank_0_cannot_read(runs: Path) -> None:
    for rank in (0, 1):
        message = (runs / "refused" / f"refused-{rank}").read_text()
        assert "step-00000003 cannot be changed to this run's ranks and ZeRO stage" in message
        assert "remove it to go on from the one before" in message
    assert not list((runs / "refused" / "checkpoints").glob("*universal*"))
