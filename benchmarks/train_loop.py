"""Measure our training loop beside DeepSpeed's bare engine, with and without logging, by ranks.

    ./run.sh prepare --config recipes/multi30k_de_en.yaml
    python -m benchmarks.train_loop --config recipes/multi30k_de_en.yaml [--rounds 5] [--steps 20]
        [--ranks 1 2] [--SECTION.KEY VALUE]...

Bare is `engine(...)`, `backward`, `step` over batches collated before. The loop adds feeding,
learning rate, seeds and agreement on signals; logging adds progress lines, metrics, and MLflow
(sqlite) with the machine's load every 10 s. On a CPU a rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed import comm as dist

from benchmarks.rounds import (
    create_parser,
    free_port,
    print_table,
    progress,
    ratios,
    seconds_of,
    spread,
)
from pipeline.checkpoints.folder import ValidationState
from pipeline.ranks import init_distributed
from pipeline.recipe_file import load_recipe
from pipeline.tracking.system_metrics import system_metrics
from pipeline.tracking.tracker import Tracker
from pipeline.training.feed import Share
from pipeline.training.loop import Loop
from pipeline.training.trainer import Trainer
from pipeline.translation.batches import PairBatch
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe

LOGGING_THREADS = ("tracking", "system metrics")


class TimedTracker(Tracker):
    """A tracker that counts the seconds that the training thread spends in calls of it."""

    waited = 0.0

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, *, once: Sequence[str] = ()
    ) -> None:
        started = time.perf_counter()
        super().log_metrics(metrics, step, once=once)
        if threading.current_thread() is threading.main_thread():
            self.waited += time.perf_counter() - started


def logging_seconds() -> dict[int, float]:
    """Return the CPU seconds of those threads of this process that log, by thread id."""
    ours = {each.native_id for each in threading.enumerate() if each.name in LOGGING_THREADS}
    threads = psutil.Process().threads()
    return {each.id: each.user_time + each.system_time for each in threads if each.id in ours}


def bare_steps(trainer: Trainer[PairBatch], shares: Iterable[Share[PairBatch]]) -> None:
    """Make a step on each share with DeepSpeed's engine alone."""
    scale = trainer.world_size * trainer.accumulation_steps
    for share in shares:
        for batch in share.micro_batches:
            loss = trainer.task.loss(trainer.engine, batch)
            trainer.engine.backward(loss * (scale / share.normaliser))
            trainer.engine.step()


def tokens_of(shares: Iterable[Share[PairBatch]]) -> int:
    """Return how many source and target tokens the shares have."""
    return sum(share.units for share in shares)


def measure(recipe: TranslationRecipe, rounds: int, steps: int) -> dict[str, list[float]]:
    """Measure on this rank.

    :returns: for each round the seconds per token of the bare engine (`bare`), the loop without
        logging (`silent`) and with it (`loop`); how long that loop waited for data (`data wait`)
        and in logging calls (`in calls`), and the CPU time of the threads that log (`threads`), all
        three in percent; and the seconds of three checkpoints (`save`).
    """
    task = TranslationTask(recipe)
    trainer = Trainer(task)
    tracker = TimedTracker(recipe) if trainer.rank == 0 else None
    loop = Loop(trainer, None, tracker)
    found: dict[str, list[float]] = {
        key: [] for key in ("bare", "silent", "loop", "data wait", "in calls", "threads", "save")
    }
    ahead = trainer.shares()
    waited = 0.0

    def run() -> None:
        nonlocal waited
        for _ in range(steps):
            window, before = loop.window, loop.window.waited
            loop.step()  # a progress line begins another window
            waited += window.waited - before

    for number in range(rounds + 1):
        first, second = ([next(ahead) for _ in range(steps)] for _ in range(2))
        trainer.engine.train()
        seconds = {"bare": seconds_of(partial(bare_steps, trainer, second), trainer.device)}
        loop.tracker = None
        seconds["silent"] = seconds_of(run, trainer.device)
        loop.tracker, waited, spent = tracker, 0.0, 0.0
        with system_metrics(tracker, lambda: trainer.step) if tracker else nullcontext():
            if tracker:
                tracker.waited, before = 0.0, logging_seconds()
            seconds["loop"] = seconds_of(run, trainer.device)
            if tracker:
                after = logging_seconds().items()
                spent = sum(cpu - before.get(thread, 0.0) for thread, cpu in after)
        if number and tracker:  # the first warms up, and imports mlflow
            for way, batches in (("bare", second), ("silent", first), ("loop", second)):
                found[way].append(seconds[way] / tokens_of(batches))
            found["data wait"].append(100 * waited / seconds["loop"])
            found["in calls"].append(100 * tracker.waited / seconds["loop"])
            cores = len(os.sched_getaffinity(0))
            found["threads"].append(100 * spent / (seconds["loop"] * cores))
    save = partial(trainer.save, None, ValidationState(criterion=task.criterion.metric))
    found["save"] = [seconds_of(save) for _ in range(3)]
    loop.watchdog.stop()
    if tracker:
        tracker.close()
    return found


def endless_recipe(config: Path, arguments: Sequence[str]) -> TranslationRecipe:
    """Return a recipe whose training neither ends, validates nor saves.

    :param arguments: `--SECTION.KEY VALUE`, one after the other.
    """
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    overrides = [(key.removeprefix("--"), value) for key, value in pairs]
    for key in ("max_steps", "validate_every", "checkpoint_every"):
        overrides.append((f"training.{key}", "1000000"))
    return load_recipe(config, overrides)


def run_rank(arguments: argparse.Namespace, recipe: TranslationRecipe, scratch: Path) -> None:
    """Measure as one rank of several; rank 0 writes what was found into `scratch`."""
    torch.set_num_threads(1)
    init_distributed()
    link = scratch / "run" / "shards"
    if dist.get_rank() == 0:
        link.parent.mkdir()
        link.symlink_to((recipe.run_dir / "shards").absolute())
    dist.barrier()
    recipe = recipe.model_copy(update={"run_dir": link.parent})
    found = measure(recipe, arguments.rounds, arguments.steps)
    if dist.get_rank() == 0:
        (scratch / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch_ranks(ranks: int) -> dict[str, Any]:
    """Run this program with DeepSpeed's launcher, and return what rank 0 measured."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    command += ["--num_accelerators", str(ranks), "--module", "benchmarks.train_loop"]
    with tempfile.TemporaryDirectory() as scratch:
        command += [*sys.argv[1:], "--worker", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found: dict[str, Any] = json.loads((Path(scratch) / "found.json").read_text())
    return found


def main() -> None:
    """Measure with each number of ranks, and print the tables."""
    parser = create_parser(__doc__)
    gpus = torch.cuda.device_count()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20, help="of each way in a round")
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({1, gpus or 2}))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    recipe = endless_recipe(arguments.config, overrides)
    if arguments.worker:
        run_rank(arguments, recipe, arguments.worker)
        return
    rows: list[list[str]] = []
    loops, costs = {}, []
    for ranks in arguments.ranks:
        found = launch_ranks(ranks)
        loops[ranks] = found["loop"]
        rows.append(
            [
                str(ranks),
                spread([1 / seconds for seconds in found["loop"]], 0),
                ratios(loops[arguments.ranks[0]], found["loop"]),
                ratios(found["silent"], found["bare"]),
                f"{max(found['data wait']):.2f}",
                spread(found["save"], 2),
            ]
        )
        costs.append(
            [
                str(ranks),
                ratios(found["loop"], found["silent"]),
                spread(found["in calls"], 3),
                spread(found["threads"], 2),
            ]
        )
        progress(f"ranks: {ranks}: done")
    what = (
        f"{arguments.config.name}, width {recipe.model.model_dim}, {recipe.model.num_levels} "
        f"levels, {recipe.training.max_tokens:,} tokens a side in a step, {arguments.steps} steps "
        "of each way in a round"
    )
    header = ["ranks", "source and target tokens/s", "over the first"]
    header += ["silent loop's time over bare engine", "data wait at most, %", "checkpoint, s"]
    print_table(f"The loop; {what}", header, rows)
    header = ["ranks", "time with logging over without", "training thread in logging calls, %"]
    print_table("Logging", [*header, "logging threads' share of all cores, %"], costs)


if __name__ == "__main__":
    main()
