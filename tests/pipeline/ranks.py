"""Ranks of `pipeline/train.py` as processes of their own, without a launcher.

They are forked from a server that has the imports behind it: a start takes one second, not ten.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.weights import load_weights
from pipeline.recipe import Recipe
from tests.conftest import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pipeline.train",
        "pipeline.training.run",
        "pipeline.translation.validation",
        "tests.pipeline.ranks",
        # What these import when they are first used takes most of a short training's time.
        "mlflow",
        "mlflow.store.tracking.sqlalchemy_store",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.zero.stage3",
        "torch.utils.hipify.hipify_python",
    ]
)


def new_run(prepared: Recipe, name: str, *parts: str) -> Path:
    """A new run_dir beside the prepared one, with its shards and these other parts of it."""
    run_dir = prepared.run_dir.parent / name
    for part in ("shards", *parts):
        shutil.copytree(prepared.run_dir / part, run_dir / part)
    return run_dir


def start(arguments: list[str], log: Path, ranks: int = 2) -> list[ForkServerProcess]:
    """Start `train.py ARGUMENTS` on so many ranks; what they say goes to `log`."""
    port = free_port()
    log.touch()
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = SERVER.Process(target=_train, args=(environment, arguments, str(log)))
        process.start()
        processes.append(process)
    return processes


def _train(environment: dict[str, object], arguments: list[str], log: str) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train.py", *arguments]

    import torch

    from pipeline.command_line import run_command
    from pipeline.train import add_arguments, main, program

    torch.set_num_threads(1)
    run_command(program(), "", main, add_arguments)


def train(
    recipe: Path, run_dir: Path, *arguments: object, ranks: Any = 1, **training: object
) -> tuple[list[int | None], str]:
    """Train to the end. :returns: the exit codes of the ranks, and what they said."""
    log = run_dir / "log"
    log.unlink(missing_ok=True)
    command = [*options(recipe, run_dir, **training), *map(str, arguments)]
    return finish(start(command, log, ranks)), log.read_text()


def options(recipe: Path, run_dir: Path, **training: object) -> list[str]:
    """What `train.py` is called with."""
    pairs = [(f"--training.{key}", str(value)) for key, value in training.items()]
    return ["--config", str(recipe), "--run_dir", str(run_dir), *sum(pairs, ())]


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Of the newest checkpoint."""
    return load_weights(list_checkpoints(run_dir / "checkpoints")[-1])


def tracked(run_dir: Path, key: str) -> dict[int, float]:
    """A metric by step, from what was logged."""
    lines = (run_dir / "tracking" / "journal.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "metrics"]
    return {r["step"]: r["metrics"][key] for r in records if key in r["metrics"]}


def finish(processes: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Wait for the ranks. :returns: their exit codes; those that do not end are killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{process.name} did not end")
    return [process.exitcode for process in processes]
