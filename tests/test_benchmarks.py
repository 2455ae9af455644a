"""`python -m benchmarks.run_all` makes docs/benchmarks.md; here it does so at toy sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import image_architectures
from benchmarks.frontier import CLAIMS, COMMON, RECIPE, REFERENCE, SYSTEMS, Trainings
from benchmarks.frontier_report import report, report_claims
from benchmarks.gpu import DRY, FULL, SECTIONS, plan
from benchmarks.record import GivenUp, Record, Settings, Training
from benchmarks.run_all import read_results
from benchmarks.runs import Run
from models.config import ModelConfig
from models.count import Lengths, count_translation
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import ROOT, Command
from tests.pipeline.conftest import save_checkpoint

MEASURED = re.compile(
    r"### (?P<machine>.+)\n\n"
    r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, \d+ GiB of memory, torch \S+:\n\n"
    r"```sh\n(?P<commands>(?:python -m .+\n)+)```\n\n"
    r".+:\n\n\| .+ \|\n\|(---\|)+\n\| "
)


def section(page: Path, title: str) -> str:
    """Return the one section of a page with this title."""
    parts = [part for part in page.read_text().split("\n## ") if part.startswith(f"{title}\n")]
    assert len(parts) == 1
    return parts[0]


OTHER = """# Benchmarks

## Training on real sentences

### Another machine

2026-01-01 00:00 UTC, 8 GiB of memory, torch 2.9.1:

```sh
python -m benchmarks.real_batches
```

Of 2 rounds:

| batches | time |
|---|---|
| RingFormer | 1 s |
"""


@pytest.mark.slow
def test_sections_are_made_one_at_a_time_and_those_of_other_machines_kept(
    tmp_path: Path, command: Command
) -> None:
    page, build = tmp_path / "page.md", tmp_path / "build"
    page.write_text(OTHER)

    def run_all(*options: object, build: Path = build) -> tuple[int, str]:
        done = command("benchmarks.run_all", "--toy", "--page", page, "--build", build, *options)
        assert done.stdout == ""
        return done.returncode, done.stderr

    code, said = run_all("--only", "real", "latency")
    assert code == 0, said
    assert "2 of 2: latency" in said
    real = section(page, "Training on real sentences")
    latency = section(page, "Serving on a CPU")
    for text, row in (
        (real, "| RingFormer, padded to 50 | "),
        (latency, "| RingFormer 6-2, ONNX Runtime | "),
    ):
        assert MEASURED.search(text), text
        assert row in text
    assert f"pipeline.prepare --config recipes/quickstart.yaml --run_dir {build}/toy " in real
    assert "Not measured yet." in section(page, "Decoding")
    (machine,) = (each["machine"] for each in MEASURED.finditer(latency))
    machines = sorted([machine, "Another machine"])
    assert [each["machine"] for each in MEASURED.finditer(real)] == machines
    assert OTHER.partition("### ")[2].strip() in real

    # Nothing can be prepared in a folder whose name a file has.
    before = page.read_text()
    build_is_damaged = tmp_path / "damaged"
    build_is_damaged.mkdir()
    (build_is_damaged / "toy").write_text("")
    code, said = run_all("--only", "real", build=build_is_damaged)
    assert code == 1
    assert "real: failed, its section stays as it was: python -m pipeline.prepare " in said
    assert page.read_text() == before


def test_benchmarks_are_listed(command: Command) -> None:
    listed = command("benchmarks.run_all", "--list")
    assert "decode       Decoding\n" in listed.stdout
    unknown = command("benchmarks.run_all", "--only", "decoding")
    assert unknown.returncode == 2
    assert "decoding" in unknown.stderr


def trained(system: str, seed: int, rate: str, loss: float) -> Training:
    """Return what a training might have come to."""
    return Training(
        system=system, model=dict(SYSTEMS[system].keys), seed=seed, learning_rate=rate,
        core_parameters=1, parameters=2,
        valid_losses={100: loss + 1, 200: loss}, bleu=30.0, chrf=50.0, minutes=1.0, memory_gib=1.0,
    )  # fmt: skip


def test_two_programs_can_add_to_a_record(tmp_path: Path) -> None:
    settings = Settings(recipe="a.yaml", overrides={})
    ours, theirs = (Record(tmp_path / "record.jsonl", settings) for _ in range(2))
    mine, other = (trained(name, 1, "2e-3", 2.0) for name in ("RingFormer 96", "Transformer 56"))
    ours.add(mine)
    theirs.add(other)
    assert ours.all(Training) == [mine]
    assert theirs.all(Training) == [mine, other]
    assert Record(tmp_path / "record.jsonl").lines == theirs.lines


def test_a_frontiers_models_have_the_learning_rate_that_validates_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"training.max_steps": "600", "training.warmup_steps": "100"}
    record_file = tmp_path / "frontier.jsonl"
    trainings = Trainings(RECIPE, tmp_path, [7, 8], given, record_file)
    for line in (
        trained("RingFormer 96", 7, "2e-3", 2.0),
        trained("RingFormer 96", 7, "4e-3", 2.1),
        trained("Transformer 56", 7, "2e-3", 2.0),
    ):
        trainings.record.add(line)
    # A stand-in for run.sh, which trains at 1e-3 as badly as never ends.
    script = """#!/bin/bash
    while [ $1 != --run_dir ]; do shift; done
    mkdir -p $2/tracking
    echo '{"kind": "metrics", "time_ms": 0, "step": 200, "metrics": {"valid_loss": 2.6}}' \
        > $2/tracking/journal.jsonl
    exec sleep 60
    """
    (tmp_path / "run.sh").write_text(script.replace("\n    ", "\n"))
    (tmp_path / "run.sh").chmod(0o755)
    monkeypatch.setattr("benchmarks.runs.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.runs.ASK_EVERY", 0.1)
    trainings.find_rate("RingFormer 96")
    (given_up,) = trainings.record.all(GivenUp)
    assert (given_up.learning_rate, given_up.step, given_up.valid_loss) == ("1e-3", 200, 2.6)

    again = Trainings(RECIPE, tmp_path, [7, 8], given, record_file)
    again.find_rate("RingFormer 96")  # nothing is tried again
    monkeypatch.setitem(SYSTEMS, "Transformer 56", SYSTEMS["Transformer 108"])
    with pytest.raises(SystemExit, match=r"Transformer 56 was \{'model.model_dim': '56'.*'108'"):
        again.find_rate("Transformer 56")
    assert again.record.lines == trainings.record.lines
    of_claims, of_none = (
        again.runs(system) for system in ("RingFormer 96, taught", "RingFormer 96, 6-1, taught")
    )
    assert [run.recipe.training.seed for run in of_claims] == [7, 8]
    for run in (*of_claims, *of_none):
        assert run.recipe.training.learning_rate == 2e-3
        assert run.recipe.training.max_steps == 600
        assert isinstance(run.recipe, TranslationRecipe)
        (corpus,) = run.recipe.data.train
        assert corpus.target == str(trainings.lesson)
    assert len(of_none) == 1


def test_a_frontiers_learning_rates_can_be_those_of_another_record(tmp_path: Path) -> None:
    known, record_file = tmp_path / "known.jsonl", tmp_path / "frontier.jsonl"
    elsewhere = Record(known, Settings(recipe="another.yaml", overrides={}))
    elsewhere.add(trained("RingFormer 96", 1, "2e-3", 2.1))
    elsewhere.add(trained("RingFormer 96", 1, "5e-4", 2.0))
    trainings = Trainings(RECIPE, tmp_path, [7, 8], {}, record_file, rates_of=Record(known))
    trainings.record.add(trained("RingFormer 96", 7, "5e-4", 3.0))
    trainings.find_rate("RingFormer 96")  # has been trained at it: nothing is tried beside it
    runs = trainings.runs("RingFormer 96")
    assert [run.recipe.training.learning_rate for run in runs] == [5e-4, 5e-4]
    with pytest.raises(SystemExit, match=r"known\.jsonl: no training of Transformer 56"):
        trainings.find_rate("Transformer 56")
    with pytest.raises(SystemExit, match=r"none\.jsonl: there is no such record"):
        Record(tmp_path / "none.jsonl")


def test_a_frontiers_record_is_of_one_setting(tmp_path: Path) -> None:
    record_file = tmp_path / "frontier.jsonl"
    settings = Settings(recipe="a.yaml", overrides={"training.max_steps": "600"})
    Record(record_file, settings).add(trained("RingFormer 96", 1, "2e-3", 2.0))
    other = Settings(recipe="a.yaml", overrides={"training.max_steps": "900"})
    with pytest.raises(SystemExit, match=r"line 1: measured with other settings"):
        Record(record_file, other)
    with record_file.open("a") as file:
        file.write('{"kind": "training"}\n')
    with pytest.raises(SystemExit, match=r"frontier\.jsonl, line 3: "):
        Record(record_file, settings)


TATOEBA = {
    "data.train": "[{name: tatoeba, source: mine/train.de, target: mine/train.en}]",
    "data.valid.name": "tatoeba-valid",
    "data.valid.source": "mine/valid.de",
    "data.valid.target": "mine/valid.en",
    "data.test.name": "tatoeba-test",
    "data.test.source": "mine/test.de",
    "data.test.target": "mine/test.en",
    "data.downloads": "[]",
}


@pytest.mark.parametrize(("name", "text"), [("frontier", {}), ("frontier_tatoeba", TATOEBA)])
def test_the_page_says_what_the_frontiers_records_say(
    name: str, text: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "docs" / f"{name}.jsonl"
    record = Record(file, Settings(recipe=RECIPE.name, overrides={**COMMON, **text}))
    report(record, SYSTEMS, REFERENCE)
    report_claims(record, CLAIMS)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert [row for row in rows if row not in page] == []


def test_the_page_says_what_the_record_of_images_says(capsys: pytest.CaptureFixture[str]) -> None:
    image_architectures.report(Record(ROOT / "docs" / "images.jsonl"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert [row for row in rows if row not in page] == []


def run_gpu(folder: Path, *options: str, **modules: str) -> tuple[list[dict[str, Any]], str]:
    """Run `python -m benchmarks.gpu` on the CPU.

    :param modules: the text of modules that it finds instead of those that are installed.
    :returns: the rows, and what it said on stderr.
    """
    for name, text in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    output = folder / "output"
    given = ["--dry", "--device", "cpu", "--minutes", "18", "--output", str(output), *options]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *given],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((output / "gpu.json").read_text())["rows"]
    return rows, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_row_for_a_gpu_can_be_measured_without_fairseq2s_native_library(
    tmp_path: Path,
) -> None:
    """Of `equality` there are too many rows; `test_zero_matrix.py` has them on CPUs, and the zero
    rows come by the same engine."""
    sections = [section for section in SECTIONS if section != "equality"]
    mark = tmp_path / "imported"
    stub = f"__version__, DOC_MODE = '0.8.1', True\nopen({str(mark)!r}, 'w').close()\n"
    rows, said = run_gpu(tmp_path, "--only", *sections, fairseq2n=stub)
    assert mark.exists()
    assert [row for row in rows if "note" in row] == [], said
    dry, full = (
        [(e.section, name) for e in plan(sizes) if e.section in sections for name in e.rows]
        for sizes in (DRY, FULL)
    )
    assert sorted((row["section"], row["row"]) for row in rows) == sorted(dry)
    assert len(dry) == len(full)

    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n## One GPU\n\n{(tmp_path / 'output' / 'gpu.md').read_text()}")
    assert MEASURED.search(page.read_text())
    ((_, body),) = read_results(page)["One GPU"].items()
    assert all(f"| {name} | " in body for _, name in dry)


@pytest.mark.slow
def test_rows_that_fail_or_come_too_late_say_so(tmp_path: Path) -> None:
    only = ["--only", "device", "zero"]
    rows, said = run_gpu(tmp_path, *only, deepspeed="raise ImportError('no such thing')\n")
    notes = {row["section"]: row.get("note") for row in rows}
    assert notes == {"device": None, "zero": "failed: ImportError: no such thing"}
    assert "6 rows, 0 without time, 4 failed" in said
    rows, said = run_gpu(tmp_path, *only, "--minutes", "0")
    assert {row["note"] for row in rows} == {"no time left"}
    assert "6 rows, 6 without time, 0 failed" in said


def test_the_operations_of_a_step_are_counted_as_the_docs_say() -> None:
    d, n, s, v = 64, 3, 32, 100
    sizes = {"model_dim": d, "num_heads": 4, "ffn_inner_dim": 4 * d, "num_levels": n}
    encoder, decoder = 24 * d * d * s + 4 * d * s * s, 32 * d * d * s + 8 * d * s * s
    transformer = n * (encoder + decoder) + 2 * d * v * s
    for architecture, flops in (
        ("transformer", transformer),
        ("ringformer", transformer - (n - 1) * 4 * d * d * s),
    ):
        config = ModelConfig.model_validate({**sizes, "architecture": architecture})
        assert count_translation(config, (v, v), Lengths(s, s)).flops == flops


def test_another_learning_rate_is_not_told_of_what_was_trained_before(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "a-1"
    run = Run("A", 1, tiny_recipe, run_dir, {"training.learning_rate": "1e-3"}, "bleu")
    run.refuse_other_keys()  # nothing is there
    save_checkpoint(torch.nn.Linear(1, 1), run.recipe, identity={})
    run.refuse_other_keys()
    with pytest.raises(SystemExit, match="other values of learning_rate; move it away"):
        replace(run, overrides={"training.learning_rate": "3e-2"}).refuse_other_keys()
