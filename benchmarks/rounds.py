"""What the benchmark programs share: options, timing side by side, and Markdown tables.

Every round runs every system once, and ratios are taken within a round, so that a neighbour on the
machine disturbs them less than it disturbs seconds. Tables go to stdout as docs/benchmarks.md shows
them, progress to stderr.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

Seconds = Mapping[str, Sequence[float]]  # of each system in each round


def options(description: str | None, rounds: int = 5) -> ArgumentParser:
    parser = ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="after one that warms up")
    return parser


def add_device(parser: ArgumentParser) -> None:
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--device", type=torch.device, default=best, help="cpu or cuda [%(default)s]"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="[%(default)s]"
    )


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def progress(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def measure(
    systems: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each system in each round; round 0 warms up (and compiles)."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            seconds[name].append(seconds_of(run, device))
        progress(
            f"round {number} of {rounds}: {sum(times[-1] for times in seconds.values()):.1f} s"
        )
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device | None = None) -> float:
    started = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of one round each, as `spread`."""
    return spread([own / other for own, other in zip(ours, theirs, strict=True)], 3)


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Median (min–max). :param digits: behind the point; None means three that count."""
    low, middle, high = (
        figure(value) if digits is None else f"{value:,.{digits}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table below a line that says what was measured."""
    print(f"{caption}:\n")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def report(
    caption: str,
    seconds: Seconds,
    references: Sequence[str],
    work: float,
    unit: str,
    *,
    first: bool = False,
) -> None:
    """A table of what `measure` found: median time, rate, and time over that of each reference.

    :param work: units done in one run.
    :param first: show the seconds of round 0 too.
    """
    references = [name for name in references if name in seconds]
    header = ["system", *(["first, s"] if first else []), "s", f"{unit}/s"]
    rows = []
    for name, (warming_up, *times) in seconds.items():
        middle = statistics.median(times)
        row = [
            name,
            *([figure(warming_up)] if first else []),
            figure(middle),
            figure(work / middle),
        ]
        over = ["1" if name == other else ratios(times, seconds[other][1:]) for other in references]
        rows.append([*row, *over])
    table(caption, [*header, *(f"time over {name}" for name in references)], rows)
