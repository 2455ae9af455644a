"""`python -m benchmarks.run_all` makes docs/benchmarks.md; here it does so at toy sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frontier import RATES, RECIPE, Trainings
from benchmarks.gpu import DRY, FULL, SECTIONS, plan
from benchmarks.run_all import read_results
from models.config import ModelConfig
from models.count import Lengths, count_translation
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import ROOT, Command

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

    code, said = run_all("--only", "systems", "real", "latency")
    assert code == 0, said
    assert "3 of 3: latency" in said
    steps, real = section(page, "Training step"), section(page, "Training on real sentences")
    latency = section(page, "Serving on a CPU")
    for text, row in (
        (steps, "| One-Wide-FFN | "),
        (real, "| RingFormer, padded to 50 | "),
        (latency, "| RingFormer 6-2, ONNX Runtime | "),
    ):
        assert MEASURED.search(text), text
        assert row in text
    assert "python -m benchmarks.train_step --parts systems " in steps
    assert f"pipeline.prepare --config recipes/quickstart.yaml --run_dir {build}/toy " in real
    assert "Not measured yet." in section(page, "Decoding")
    (machine,) = (each["machine"] for each in MEASURED.finditer(steps))
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


def test_a_frontiers_models_have_the_learning_rate_that_validates_best(tmp_path: Path) -> None:
    trainings = Trainings(RECIPE, tmp_path, [7, 8], {"training.max_steps": "600"})
    trials = trainings.trials("RingFormer 96")
    for trial, losses in zip(trials[:3], [[3, 4], [5, 2], [4]], strict=True):  # one is not tried
        assert trial.recipe.training.max_steps == 200
        journal = trial.run_dir / "tracking" / "journal.jsonl"
        journal.parent.mkdir(parents=True)
        for step, loss in enumerate(losses):
            record = {"kind": "metrics", "time_ms": 0, "metrics": {"valid_loss": loss}}
            with journal.open("a") as file:
                file.write(json.dumps({**record, "step": step}) + "\n")

    of_claims, of_none = (
        trainings.runs(system) for system in ("RingFormer 96, taught", "RingFormer 96, 6-1, taught")
    )
    assert [run.recipe.training.seed for run in of_claims] == [7, 8]
    for run in (*of_claims, *of_none):
        assert run.recipe.training.learning_rate == float(RATES[1])
        assert run.recipe.training.max_steps == 600
        assert isinstance(run.recipe, TranslationRecipe)
        (corpus,) = run.recipe.data.train
        assert corpus.target == str(trainings.lesson)
    assert len(of_none) == 1


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
