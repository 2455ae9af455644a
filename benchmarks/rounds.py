"""What the benchmark programs share: options, timing systems in turns, and Markdown tables.

Every round runs every system once, and ratios are taken within a round, so that other work on the
machine disturbs them less than it disturbs seconds. Tables go to stdout as docs/benchmarks.md shows
them, progress to stderr.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import statistics
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.markdown import markdown_table

CORES = len(os.sched_getaffinity(0))
ENOUGH_ROUNDS = 5  # for a ratio on the page

Seconds = Mapping[str, Sequence[float]]  # of each system in each round

Cells = dict[str, Any]
"""What a row of a table says, by the heads of its columns; lists are not for the table."""


def create_parser(description: str | None, rounds: int = ENOUGH_ROUNDS) -> ArgumentParser:
    """Return a parser with the option --rounds, which all benchmarks have."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="after one that warms up")
    return parser


def add_device_options(parser: ArgumentParser) -> None:
    """Add --device and --dtype."""
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--device", type=torch.device, default=best, help="cpu or cuda [%(default)s]"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="[%(default)s]"
    )


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that --dtype names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def machine() -> str:
    """Return what this machine is called on the page: its GPUs and its CPU."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)]
    return ", ".join([*names, f"{CORES} cores of {cpu}"])


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def failure(error: BaseException) -> Cells:
    """Return the cells of a row that could not be measured."""
    text = " ".join(str(error).split())
    said = f"failed: {type(error).__name__}: {text[:200]}"
    return {"note": said, "traceback": traceback.format_exception(error)}


def free_memory() -> None:
    """Give back the memory of what nobody refers to, a GPU's too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def progress(message: str) -> None:
    """Print a line to stderr."""
    print(f"  {message}", file=sys.stderr, flush=True)


def measure(
    systems: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each system in each round.

    :returns: for each system its seconds in each round; round 0 warms up (and compiles).
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            seconds[name].append(seconds_of(run, device))
        progress(
            f"round {number} of {rounds}: {sum(times[-1] for times in seconds.values()):.1f} s"
        )
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Return how many seconds `run` takes, kernels on `device` included."""
    started = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the ratios of ours to theirs, round by round, in the form of `spread`.

    Where some rounds say more than 1 and others less, "equal" stands in place of the median: they
    show no difference. Of fewer than `ENOUGH_ROUNDS` the number is said.
    """
    if ours == theirs:
        return "1"
    found = [own / other for own, other in zip(ours, theirs, strict=True)]
    text = spread(found, 3)
    if min(found) <= 1 <= max(found):
        text = f"equal {text.partition(' ')[2]}"
    if len(found) < ENOUGH_ROUNDS:
        rounds = "1 round" if len(found) == 1 else f"{len(found)} rounds"
        text = f"{text.removesuffix(')')}; {rounds})"
    return text


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Return the median, and in brackets minimum and maximum.

    :param digits: behind the decimal point; None: three significant digits.
    """
    low, middle, high = (
        three_digits(value) if digits is None else f"{value:,.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def three_digits(value: float) -> str:
    """Return `value` with three significant digits; from 100 on, as a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table below a line that says what was measured."""
    return f"{caption}:\n\n{markdown_table(header, rows)}\n"


def print_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print what `table` returns."""
    print(table(caption, header, rows), flush=True)


def print_report(
    caption: str,
    seconds: Seconds,
    references: Sequence[str],
    tokens: float,
    *,
    first: bool = False,
) -> None:
    """Print what `measure` returned: median time, rate, and time over that of each reference.

    :param tokens: of the target side, in one run.
    :param first: show the seconds of round 0 too.
    """
    references = [name for name in references if name in seconds]
    header = ["system", *(["first, s"] if first else []), "s", "target tokens/s"]
    rows = []
    for name, (warming_up, *times) in seconds.items():
        middle = statistics.median(times)
        row = [
            name,
            *([three_digits(warming_up)] if first else []),
            three_digits(middle),
            three_digits(tokens / middle),
        ]
        over = ["1" if name == other else ratios(times, seconds[other][1:]) for other in references]
        rows.append([*row, *over])
    print_table(caption, [*header, *(f"time over {name}" for name in references)], rows)
