"""Ratios that do not flatter: how the benchmarks say them, and the pages with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch

from benchmarks.rounds import ENOUGH_ROUNDS, ratios
from benchmarks.run_all import PAGE, page_of, read_results
from benchmarks.sections import BENCHMARKS, Benchmark
from benchmarks.train_step import adamw
from models.config import ModelConfig
from models.factory import create_model
from pipeline.recipe import ROOT
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.translation_recipe import TranslationTraining

RATIO = re.compile(r"(\d+\.\d{3}) \((\d+\.\d{3})–(\d+\.\d{3})[;)]")


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([0.9, 0.95, 0.97, 0.98, 0.99], "0.970 (0.900–0.990)"),
        ([0.9, 0.95, 0.97, 0.98, 1.01], "equal (0.900–1.010)"),
        ([0.9, 0.95, 0.97, 0.98, 1.0], "equal (0.900–1.000)"),
        ([1.1, 1.2, 1.3, 1.4, 1.5], "1.300 (1.100–1.500)"),
        ([0.5, 0.6], "0.550 (0.500–0.600; 2 rounds)"),
        ([1.5], "1.500 (1.500–1.500; 1 round)"),
        ([0.5, 1.5], "equal (0.500–1.500; 2 rounds)"),
        ([1.0] * 5, "1"),
    ],
)
def test_a_range_that_holds_1_is_equal(ours: Sequence[float], expected: str) -> None:
    assert ratios(ours, [1.0] * len(ours)) == expected


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: str(benchmark.name))
def test_the_page_is_made_of_enough_rounds(benchmark: Benchmark) -> None:
    for arguments in (benchmark.cpu, benchmark.gpu):
        if arguments is not None:
            (rounds,) = re.findall(r"--rounds (\d+)", arguments)
            assert int(rounds) >= ENOUGH_ROUNDS


@pytest.mark.parametrize("name", ["benchmarks.md", "experiments.md", "results.md"])
def test_no_page_flatters(name: str) -> None:
    found = RATIO.findall((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert found
    assert [each for each in found if float(each[1]) <= 1 <= float(each[2])] == []


def test_the_page_has_the_prose_of_its_programs() -> None:
    page = ROOT / PAGE
    assert page.read_text(encoding="utf-8") == page_of(read_results(page))


def test_the_optimizer_that_is_timed_is_the_one_that_trains() -> None:
    config = ModelConfig(model_dim=64, num_heads=1, ffn_inner_dim=64, num_levels=1)
    timed = adamw(create_model(config, (8, 8), 0))
    asked = deepspeed_config(TranslationTraining(), accumulation_steps=1)["optimizer"]
    assert (type(timed), asked["type"]) == (torch.optim.AdamW, "AdamW")
    assert asked["params"]["torch_adam"]
    assert asked["params"]["fused"]
    ours = {key: timed.defaults[key] for key in asked["params"].keys() & timed.defaults.keys()}
    assert ours == {key: asked["params"][key] for key in ours}
    assert ours["fused"]
