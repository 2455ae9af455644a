"""Timing side by side: every round runs every system once, and ratios are taken within a round."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def device_of(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads of {_processor()}, torch {torch.__version__}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measure(
    systems: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each system in each round; round 0 warms up (and compiles).

    :param clock: `time.process_time` counts what the process did, not what its neighbours did;
        with one thread only, for threads that wait for each other count too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            started = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(clock() - started)
        print(f"round {number} of {rounds}", end="\r", file=sys.stderr, flush=True)
    return seconds


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median (min–max)."""
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def report(
    title: str,
    seconds: Mapping[str, list[float]],
    reference: str,
    work: float | Mapping[str, float],
    unit: str,
) -> None:
    """A Markdown table: median time, rate, and time over that of `reference`: median (min–max).

    :param work: units done in one run, of each system if they differ; then times are per unit.
    """
    amount = work if isinstance(work, Mapping) else dict.fromkeys(seconds, work)
    print(f"\n### {title}\n\n| system | first, s | s | {unit}/s | time over {reference} |")
    print("|---|---|---|---|---|")
    for name, (first, *times) in seconds.items():
        ratios = [
            (own / amount[name]) / (theirs / amount[reference])
            for own, theirs in zip(times, seconds[reference][1:], strict=True)
        ]
        median = statistics.median(times)
        print(
            f"| {name} | {first:.3g} | {median:.3g} | {amount[name] / median:,.0f} | "
            f"{spread(ratios)} |"
        )
    sys.stdout.flush()
