"""What rank 0 does before the ranks join, for as long as it takes and never in vain; and what they
compare then."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from data_prep.files import DataError
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.ranks import failing_together, join_ranks, leave_ranks, rank, wait_for_rank_0
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import free_port
from tests.forked import SERVER
from tests.pipeline.ranks import finish, new_run, options, start_ranks, train_rank

LIMIT = timedelta(seconds=2)


def checks(what: str) -> str:
    """What rank 0 does, longer than the time limit of collectives."""
    time.sleep(2 * LIMIT.total_seconds())
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fails":
        raise DataError("a shard is damaged")
    return "all is well"


def say(text: str) -> None:
    """Writes a line at once: the ranks share one file, and print may write its end apart."""
    os.write(1, f"rank {rank()}: {text}\n".encode())


def meet(environment: dict[str, str], log: str, what: str) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        with failing_together():
            said = wait_for_rank_0(lambda: checks(what), timedelta(seconds=60))
            join_ranks(timedelta(seconds=60))
            say(said)
            leave_ranks()
    except Exception as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "expected"),
    [
        ("works", [0, 0, 0], ["rank 0: all is well", "rank 1: all is well", "rank 2: all is well"]),
        ("fails", [1, 1, 1], ["rank 0: DataError: a shard is damaged"]),
        ("killed", [-9, 1, 1], ["rank 1: RanksError: lost contact with rank 0", "rank 2: RanksE"]),
    ],
)
def test_the_others_wait_and_learn(
    tmp_path: Path, what: str, codes: list[int], expected: list[str]
) -> None:
    log, port = tmp_path / "log", str(free_port())
    log.touch()
    processes = []
    for number in range(3):
        environment = {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "3", "LOCAL_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        processes.append(SERVER.Process(target=meet, args=(environment, str(log), what)))
        processes[-1].start()
    for process in processes:
        process.join(120)
    said = log.read_text()
    assert [process.exitcode for process in processes] == codes, said
    lines = sorted(line for line in said.splitlines() if line.startswith("rank "))
    assert len(lines) == len(expected), said
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), said


def train_with_another_seed(arguments: list[str]) -> None:
    train_rank([*arguments, *(["--training.seed", "99"] if rank() else [])])


@pytest.mark.slow
def test_ranks_with_different_keys_do_not_train_together(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    run_dir = new_run(prepared, "different-keys")
    arguments, log = options(tiny_recipe, run_dir), run_dir / "log"
    assert finish(start_ranks(train_with_another_seed, arguments, log, 2)) == [1, 1]
    said = log.read_text()
    assert said.count("ranks were started with different keys: training.seed is 1 on rank 0") == 1
    assert "and 99 on rank 1" in said
    assert "Traceback" not in said
    assert list_checkpoints(run_dir / "checkpoints") == []
