"""Measure on one GPU, within minutes and from nothing but this checkout: speed, memory, agreement.

    python -m benchmarks.gpu [--minutes 8] [--output build/gpu] [--only SECTION...]
    python -m benchmarks.gpu --dry       # every row at toy size, also without a GPU

Rows are measured in the order of their worth. One that fails says why, and the others are measured
all the same; one for which no time is left says so. FOLDER gets, after each entry of the plan,
`gpu.json` with all that was found and `gpu.md`, which is for docs/benchmarks.md.

This file imports torch and what is ours and needs nothing else; `gpu_speed.py` and `gpu_engine.py`
have the sections, and are imported when one is measured: a package that is missing costs rows.
fairseq2's native library is not needed: a module `fairseq2n` in its place will do, with
`__version__` and `DOC_MODE = True`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.rounds import Cells, failure, free_memory, machine, progress, table, three_digits
from data_prep.files import write_atomically

NO_TIME = "no time left"
SYSTEMS = ("RingFormer", "Transformer")
POLICIES = (  # of `train_step.POLICIES`
    "none", "every level", "every level, attention kept", "every level, on the host",
    "every 2 levels",
)  # fmt: skip


class Sizes(NamedTuple):
    """How large everything is."""

    widths: tuple[int, int]
    levels: int
    """Of the encoder and of the decoder."""

    tokens: tuple[int, int, int]
    """Positions a side in a training step."""

    vocab_size: int
    rounds: int
    matrix: int
    """Side of the matrices that show what the GPU can do."""

    batches: tuple[int, int, int]
    """Sentences that are decoded together."""

    steps: int
    """Of the quickstart."""

    compiler: str


FULL = Sizes(
    widths=(512, 1024), levels=6, tokens=(8192, 32768, 65536), vocab_size=32000, rounds=10,
    matrix=8192, batches=(1, 64, 512), steps=200, compiler="inductor",
)  # fmt: skip
DRY = Sizes(
    widths=(64, 128), levels=2, tokens=(64, 96, 128), vocab_size=300, rounds=1,
    matrix=64, batches=(1, 2, 4), steps=5, compiler="eager",
)  # fmt: skip


class Bench(NamedTuple):
    """What every section is given."""

    device: torch.device
    sizes: Sizes
    scratch: Path
    """A folder for files that nobody needs afterwards."""


class Entry(NamedTuple):
    """An entry of the plan: rows that are measured together."""

    section: str
    function: str
    """`MODULE.NAME` of a function of (bench, rows); it yields the name of a row and its cells."""

    rows: dict[str, tuple[Any, ...]]
    """The names of the rows, and what the function is to measure for each."""

    seconds: float = 60
    """So long it may take."""


class OutOfTime(BaseException):
    """The time for an entry is over. No `except Exception` of a library's keeps it."""


SECTIONS = {
    "device": "What the GPU can do: the products and copies that others are measured against",
    "step": "Training step in bfloat16 (forward, backward, fused AdamW; 6 + 6 levels, FFN 4d)",
    "equality": "Training through DeepSpeed beside torch alone, float32: relative differences",
    "quickstart": "The quickstart's first steps: mean loss of the last tenth of them",
    "loss": "The loss (forward and backward) of the decoder's output",
    "attention": "Attention over padded sequences in bfloat16 (forward and backward), by kernel",
    "checkpoints": "RingFormer's training step in bfloat16 by what is kept for the backward pass",
    "zero": "Optimizer step of the trainer in bfloat16: DeepSpeed's engine, one rank",
    "profile": "One training step in bfloat16, by torch.profiler",
    "decode": "Decoding, beam 4: our search, each sentence to the length of its source",
}


def plan(sizes: Sizes) -> list[Entry]:
    """Return everything to measure, in the order of its worth."""
    narrow, wide = sizes.widths
    few, some, many = sizes.tokens

    def steps(width: int, way: str, seconds: float) -> Entry:
        rows = {
            f"{system}, d {width}, {tokens:,} tokens, {way}": (system, width, tokens, way)
            for tokens, system in product(sizes.tokens, SYSTEMS)
        }
        return Entry("step", "gpu_speed.training_steps", rows, seconds)

    def decoding(dtype: str, batch: int) -> Entry:
        rows = {f"{system}, {dtype}, batch {batch}": (system, dtype, batch) for system in SYSTEMS}
        return Entry("decode", "gpu_speed.decoding", rows, 40)

    products = {"bfloat16 matrix product": ("product",), "copy on the device": ("copy",)}
    losses = {
        f"{way}, {tokens:,} tokens": (way, tokens)
        for tokens, way in product(
            (few, many), ("ours", "ours, chunks 8 times as large", "logits and F.cross_entropy")
        )
    }
    attentions = {
        f"{kernel}, {length} tokens": (kernel, length)
        for length, kernel in product((32, 64, 128), ("ours", "cuDNN", "memory-efficient"))
    }
    profiled = {f"{s}, {w}": (s, w) for w, s in product(("torch alone", "zero1_bf16"), SYSTEMS)}
    policies = {f"checkpoints: {policy}": (policy,) for policy in POLICIES}
    matrix = {
        f"ZeRO {stage}, checkpoints: {policy}": (stage, policy)
        for stage, policy in product((0, 1, 2, 3), POLICIES)
    }
    quickstart = {
        "float32 on the CPU, torch alone": ("cpu", "zero1"),
        "bfloat16, ZeRO 1": ("device", "zero1_bf16"),
        "float32, ZeRO 1": ("device", "zero1"),
    }
    return [
        Entry("device", "gpu_speed.device", products),
        steps(narrow, "eager", 60),
        steps(wide, "eager", 60),
        Entry("equality", "gpu_engine.equality", matrix, 120),
        Entry("quickstart", "gpu_engine.quickstart", quickstart, 120),
        Entry("loss", "gpu_speed.losses", losses, 40),
        Entry("attention", "gpu_speed.attentions", attentions, 40),
        Entry("checkpoints", "gpu_speed.checkpointing", policies, 40),
        *(
            Entry(
                "zero", "gpu_engine.zero", {f"{s}, ZeRO {stage}": (s, stage, some) for s in SYSTEMS}
            )
            for stage in (1, 3)
        ),
        Entry("profile", "gpu_speed.profiles", profiled),
        *(decoding(dtype, n) for dtype, n in product(("float32", "bfloat16"), sizes.batches)),
        steps(narrow, "compiled", 120),
        steps(wide, "compiled", 120),
    ]


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer.

    :raises OutOfTime: it does. What swallows that gets it again, every five seconds.
    """

    def interrupt(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(entry: Entry, bench: Bench, seconds: float) -> dict[str, Cells]:
    """Measure an entry of the plan.

    :param seconds: what is left of the time.
    :returns: for each of its rows the cells, whatever happened.
    """
    found: dict[str, Cells] = {}
    missing: Cells = {"note": "failed: not measured"}
    if seconds <= 0:
        missing = {"note": NO_TIME}
    else:
        try:
            with at_most(min(seconds, entry.seconds)):
                module, _, name = entry.function.partition(".")
                section = getattr(import_module(f"benchmarks.{module}"), name)
                for row, cells in section(bench, entry.rows):
                    found[row] = cells
                    progress(f"{row}: {cells.get('note', 'measured')}")
        except OutOfTime:
            said = f"failed: took longer than {entry.seconds:.0f} s"
            missing = {"note": NO_TIME if seconds < entry.seconds else said}
        except Exception as error:
            missing = failure(error)
            traceback.print_exc()
    free_memory()
    return {row: found.get(row, missing) for row in entry.rows}


# ── Telling ─────────────────────────────────────────────────────────────────────────────────────


def cell(value: object) -> str:
    """Return a cell as the table has it."""
    if isinstance(value, float):
        return three_digits(value) if math.isfinite(value) else "not a number"
    return f"{value:,}" if isinstance(value, int) else str(value)


def tables(title: str, rows: dict[str, Cells]) -> str:
    """Return the table of a section, and below it one of each list of records in its cells."""
    heads = dict.fromkeys(
        head for cells in rows.values() for head, value in cells.items() if type(value) is not list
    )
    if "note" in heads:  # at the end
        heads = {**{head: None for head in heads if head != "note"}, "note": None}
    body = [[name, *(cell(cells.get(h, "")) for h in heads)] for name, cells in rows.items()]
    parts = [table(title, ["", *heads], body)]
    for name, cells in rows.items():
        for head, records in cells.items():
            if isinstance(records, list) and records and isinstance(records[0], dict):
                lines = [[cell(value) for value in record.values()] for record in records]
                parts.append(table(f"{name}: {head}", [*records[0]], lines))
    return "\n".join(parts)


def write(folder: Path, facts: Cells, found: dict[str, dict[str, Cells]]) -> str:
    """Write JSON and Markdown.

    :param found: by section and row.
    :returns: the tables.
    """
    rows = [
        {"section": section, "row": name, **cells}
        for section, of_section in found.items()
        for name, cells in of_section.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "rows": rows}, indent=1, ensure_ascii=False)
    write_atomically(folder / "gpu.json", text + "\n")
    made = "\n".join(tables(SECTIONS[section], rows) for section, rows in found.items())
    head = f"{facts['date']}, {facts['memory']}, torch {facts['torch']}:"
    command = f"```sh\n{facts['command']}\n```"
    write_atomically(
        folder / "gpu.md", f"### {facts['device']}\n\n{head}\n\n{command}\n\n{made.strip()}\n"
    )
    return made


def facts_of(device: torch.device) -> Cells:
    """Return what was measured where, when and by which command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts: Cells = {
        "device": machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "memory": f"{memory:.0f} GiB of memory",
        "command": f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}".strip(),
    }
    if device.type == "cuda":
        facts["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def main() -> None:
    """Measure the plan, or the sections of it that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="after those that warm up [10, dry 1]")
    parser.add_argument("--minutes", type=float, default=8, help="what there is [%(default)g]")
    parser.add_argument(
        "--output", type=Path, default=Path("build/gpu"), metavar="FOLDER", help="[%(default)s]"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="[all]")
    parser.add_argument("--dry", action="store_true", help="toy sizes, to see that all rows work")
    parser.add_argument("--device", type=torch.device, default=best, help="[%(default)s]")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    if device.type != "cuda" and not arguments.dry:
        parser.error("there is no GPU here; --dry runs every row at toy size without one")
    if device.type != "cuda":
        os.environ["DS_ACCELERATOR"] = "cpu"
    started = time.monotonic()
    facts, found = facts_of(device), dict[str, dict[str, Cells]]()
    sizes = DRY if arguments.dry else FULL
    sizes = sizes._replace(rounds=arguments.rounds or sizes.rounds)
    bench = Bench(device, sizes, arguments.output / "scratch")
    entries = [entry for entry in plan(sizes) if entry.section in arguments.only]
    for entry in entries:
        progress(f"{time.monotonic() - started:.0f} s: {entry.section}, {next(iter(entry.rows))} …")
        if arguments.dry:
            entry = entry._replace(seconds=math.inf)
        left = 60 * arguments.minutes - (time.monotonic() - started)
        found.setdefault(entry.section, {}).update(measure(entry, bench, left))
        made = write(arguments.output, facts, found)
    print(made)
    notes = [cells["note"] for rows in found.values() for cells in rows.values() if "note" in cells]
    progress(
        f"{time.monotonic() - started:.0f} s; {sum(map(len, found.values()))} rows, "
        f"{notes.count(NO_TIME)} without time, {len(notes) - notes.count(NO_TIME)} failed: "
        f"{arguments.output}/gpu.json and gpu.md"
    )


if __name__ == "__main__":
    main()
