"""Start ranks without a launcher, as processes of their own: of `train.py`, or of a script."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.weights import load_weights
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import free_port
from tests.forked import SERVER

Main = Callable[[list[str]], None]
"""What a rank does with its command line."""


def new_run(prepared: TranslationRecipe, name: str, *parts: str) -> Path:
    """Make a run_dir beside the prepared one, with its shards and these other parts of it."""
    run_dir = prepared.run_dir.parent / name
    for part in ("shards", *parts):
        shutil.copytree(prepared.run_dir / part, run_dir / part)
    return run_dir


# ── Any ranks ───────────────────────────────────────────────────────────────────────────────────


def start_ranks(
    main: Main, arguments: list[str], log: Path, ranks: int, **environment: str
) -> list[ForkServerProcess]:
    """Start `main(arguments)` on so many ranks.

    :param log: the file, or the terminal, that takes what they say.
    """
    port = free_port()
    log.touch()
    processes = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment,
        }  # fmt: skip
        process = SERVER.Process(target=_run, args=(main, arguments, str(log), variables))
        process.start()
        processes.append(process)
    return processes


def _run(main: Main, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    import torch

    torch.set_num_threads(1)
    main(arguments)


def finish(processes: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Wait for the ranks. Those that do not end are killed.

    :returns: their exit codes.
    """
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{process.name} did not end")
    return [process.exitcode for process in processes]


def wait_for(log: Path, text: str, seconds: float = 120) -> None:
    """Wait until a log says `text`."""
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


# ── Ranks that train ────────────────────────────────────────────────────────────────────────────


def options(recipe: Path, run_dir: Path, **training: object) -> list[str]:
    """Return the command line of `train.py` with these keys of the recipe's `training` section."""
    pairs = [(f"--training.{key}", str(value)) for key, value in training.items()]
    return ["--config", str(recipe), "--run_dir", str(run_dir), *sum(pairs, ())]


def start(
    arguments: list[str], log: Path, ranks: int = 2, **environment: str
) -> list[ForkServerProcess]:
    """Start `train.py ARGUMENTS` on so many ranks; what they say goes to `log`."""
    return start_ranks(train_rank, arguments, log, ranks, **environment)


def train_rank(arguments: list[str]) -> None:
    """Be a rank of `train.py ARGUMENTS`."""
    from pipeline.command_line import run_command
    from pipeline.recipe import Recipe
    from pipeline.train import add_arguments, main, program

    sys.argv = ["train.py", *arguments]
    run_command(program(), "", main, add_arguments, kind=Recipe)


def train(
    recipe: Path, run_dir: Path, *arguments: object, ranks: Any = 1, **training: object
) -> tuple[list[int | None], str]:
    """Train to the end.

    :returns: the exit codes of the ranks, and what they said.
    """
    log = run_dir / "log"
    log.unlink(missing_ok=True)
    command = [*options(recipe, run_dir, **training), *map(str, arguments)]
    return finish(start(command, log, ranks)), log.read_text()


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Return the weights of the newest checkpoint."""
    return load_weights(list_checkpoints(run_dir / "checkpoints")[-1])


def tracked(run_dir: Path, key: str) -> dict[int, float]:
    """Return a metric by step, as it was logged."""
    lines = (run_dir / "tracking" / "journal.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "metrics"]
    return {r["step"]: r["metrics"][key] for r in records if key in r["metrics"]}
