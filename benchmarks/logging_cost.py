"""What logging to MLflow costs training: with and without, in turns, over the same kind of steps.

    ./run.sh prepare --config recipes/multi30k_de_en.yaml
    python -m benchmarks.logging_cost --config recipes/multi30k_de_en.yaml [--rounds 5] [--steps 20]
        [--SECTION.KEY VALUE]...

With: progress metrics every training.log_every steps, system metrics every 10 s, journal on disk,
a thread that sends to MLflow (sqlite). Neighbours on the machine disturb the ratio of wall times by
more than logging costs; the share of CPU time that its threads take, and the time that the training
thread itself spends in logging calls, are exact.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from deepspeed import comm as dist

from benchmarks.rounds import describe, spread
from benchmarks.train_loop import endless
from pipeline.engine import Training
from pipeline.ranks import init_distributed
from pipeline.system_metrics import SystemMetrics
from pipeline.tracking import Tracker
from pipeline.train import Loop

THREADS = ("tracking", "system metrics")


class TimedTracker(Tracker):
    """Counts the seconds that callers wait."""

    waited = 0.0

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, *, once: Sequence[str] = ()
    ) -> None:
        started = time.perf_counter()
        super().log_metrics(metrics, step, once=once)
        if threading.current_thread() is threading.main_thread():
            self.waited += time.perf_counter() - started


def thread_seconds() -> dict[int, float]:
    """CPU seconds of each of this process's threads that log."""
    ours = {thread.native_id for thread in threading.enumerate() if thread.name in THREADS}
    threads = psutil.Process().threads()
    return {t.id: t.user_time + t.system_time for t in threads if t.id in ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments, rest = parser.parse_known_args()
    recipe = endless(arguments.config, rest)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    init_distributed()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        (run_dir / "shards").symlink_to((recipe.run_dir / "shards").absolute())
        recipe = recipe.model_copy(update={"run_dir": run_dir})
        training, tracker = Training(recipe), TimedTracker(recipe)
        loop = Loop(training, None, tracker)
        ratios, waits, shares = [], [], []
        for number in range(arguments.rounds + 1):
            seconds = {}
            for logging in (False, True):
                loop.tracker = tracker if logging else None
                tracker.waited, before = 0.0, thread_seconds()
                started = time.perf_counter()
                with SystemMetrics(tracker, training) if logging else nullcontext():
                    for _ in range(arguments.steps):
                        loop.step()
                    after = thread_seconds()
                seconds[logging] = time.perf_counter() - started
            if number:  # the first warms up, and imports mlflow
                ratios.append(seconds[True] / seconds[False])
                waits.append(100 * tracker.waited / seconds[True])
                spent = sum(cpu - before.get(thread, 0.0) for thread, cpu in after.items())
                cores = len(os.sched_getaffinity(0))
                shares.append(100 * spent / (seconds[True] * cores))
        loop.watchdog.stop()
        tracker.close()
    print(f"{describe(torch.device('cpu'))}, {arguments.config.name}, {arguments.steps} steps\n")
    print("| time with over without | training thread in logging calls | logging threads' share |")
    print("|---|---|---|")
    print(f"| {spread(ratios)} | {spread(waits, 3)}% | {spread(shares, 2)}% of the CPU |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
