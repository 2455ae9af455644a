"""`python -m benchmarks.run_all` makes docs/benchmarks.md; here it does so at toy sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Command

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
