"""What the ranks of a training or an evaluation do together; one process is all of its ranks."""

# Functions import torch and deepspeed themselves: that takes seconds, and one process needs none.

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from data_prep.files import first_line
from data_prep.identity import differences
from pipeline.preflight import remove_dead_build_locks

LINGER_SECONDS = 3  # the launcher kills all when one ends, and rank 0 may be telling why
SECONDS_TO_HEAR = 10  # for ranks that ask once a second whether rank 0 has failed

# Keys of `wait_for_rank_0` at the meeting place.
OUTCOME, HEARD = "ringformer/outcome", "ringformer/heard"

_meeting_places: list[object] = []  # rank 0's is open as long as something refers to it

Result = TypeVar("Result")
Item = TypeVar("Item")


class RankZeroFailed(Exception):
    """Rank 0 could not do what all depend on. Raised on the others; rank 0 tells why itself."""


class RanksError(Exception):
    """The ranks cannot meet, or one is gone."""


def launched() -> bool:
    """Tell whether a launcher started this process: it sets all of these variables."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def rank() -> int:
    """Return the number of this process among the ranks, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def choose_allocator() -> None:
    """Have segments of a GPU's memory grow, unless the environment says otherwise: batches are of
    many shapes, and without it the memory falls to pieces.

    Torch 2.9 reads the old name alone, when it first looks at a GPU; later ones prefer the new one.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    said = (os.environ[name] for name in names if name in os.environ)
    chosen = next(said, "expandable_segments:True")
    for name in names:
        os.environ.setdefault(name, chosen)


def wait_for_rank_0(function: Callable[[], Result], timeout: timedelta) -> Result:
    """Call `function` on rank 0, and return its result on every rank. This comes before the ranks
    join, for their collectives have a time limit, and `function` may take as long as it likes.

    The other ranks ask for the result once a second, so signals reach them, and a rank 0 that was
    killed ends them.

    :param timeout: how long ranks may start one after the other, until they have found each other.
    :raises RankZeroFailed: on the others, when it has raised anything on rank 0.
    :raises RanksError: rank 0 cannot be reached, or is gone.
    """
    if world_size() == 1:
        return function()
    from torch.distributed.rendezvous import rendezvous

    with _reaching_others():
        # Torch's own meeting place: `join_ranks` will find it there.
        store, _, _ = next(rendezvous("env://", timeout=timeout))
    _meeting_places.append(store)
    if rank() > 0:
        try:
            while not store.check([OUTCOME]):
                time.sleep(1)
            result, failure = pickle.loads(store.get(OUTCOME))
            store.add(HEARD, 1)
        except RuntimeError as error:
            raise RanksError(f"lost contact with rank 0 ({short_message(error)})") from error
        if failure is not None:
            raise RankZeroFailed(failure)
        return cast(Result, result)
    try:
        result = function()
    except Exception as error:
        store.set(OUTCOME, pickle.dumps((None, str(error))))
        deadline = time.monotonic() + SECONDS_TO_HEAR
        while store.add(HEARD, 0) < world_size() - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        raise
    store.set(OUTCOME, pickle.dumps((result, None)))
    return result


def cores_of_rank() -> int:
    """Return how many cores a rank has, where those of a machine share them; 1 at least."""
    ranks_here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, len(os.sched_getaffinity(0)) // int(ranks_here))


def join_ranks(timeout: timedelta) -> None:
    """Take this rank's device and its share of the cores, and meet the other ranks.

    :raises RanksError: they cannot be reached.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import torch
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_rank())
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _reaching_others(), without_greetings():
        init_distributed(timeout)


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Turn what torch says when a rank cannot be reached into a message for people.

    :raises RanksError: it cannot.
    """
    try:
        yield
    except RuntimeError as error:
        advice = (
            "another program has the port; give the launcher another one by --master_port"
            if "EADDRINUSE" in str(error)
            else "name the network card in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME on every node: "
            "docs/multi_node.md"
        )
        message = f"cannot reach the other ranks ({short_message(error)}); {advice}"
        raise RanksError(message) from error


@contextmanager
def without_greetings() -> Iterator[None]:
    """Leave out what gloo and DeepSpeed write to stdout when they begin."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        if sys.stdout:
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Meet the other ranks.

    On CPU DeepSpeed leaves 66 MiB of shared memory behind for every rank, which nobody frees. Once
    all ranks have it open, it needs no name, and goes with the processes.
    """
    import deepspeed
    from deepspeed import comm as dist

    remove_dead_build_locks()  # of the operator that it takes on CPUs
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def leave_ranks() -> None:
    """Wait for all ranks, and part. The launcher kills all when one ends, and rank 0 may be busy
    longer. (After an error there is nobody to wait for.)"""
    from deepspeed import comm as dist

    dist.barrier()
    dist.destroy_process_group()


def from_rank_0(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0, and return its result on every rank.

    :raises RankZeroFailed: on the others, when it has raised anything on rank 0.
    """
    if world_size() == 1:
        return function()
    import torch.distributed

    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as caught:
            error, outcome[1] = caught, str(caught)
    torch.distributed.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankZeroFailed(outcome[1])
    result: Result = outcome[0]
    return result


def refuse_other_keys(own: Mapping[str, Any]) -> None:
    """Compare what the ranks were started with: nodes where somebody types the command, or run_dirs
    that are not one. Ranks with different keys would train one model together, and say nothing.

    :param own: what must be the same on all, of JSON's types.
    :raises RanksError: on rank 0, another one differs; on the others `RankZeroFailed`.
    """
    if world_size() == 1:
        return
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, (socket.gethostname(), own))
    (host, expected), *others = found
    for number, (other_host, theirs) in enumerate(others, start=1):
        for key, here, there in differences(expected, theirs, ""):
            message = (
                f"ranks were started with different keys: {key[1:]} is {here} on rank 0 ({host}), "
                f"and {there} on rank {number} ({other_host}); start all by the same command"
            )
            raise RanksError(message) if rank() == 0 else RankZeroFailed(message)


def share_of(lines: Sequence[str], rank: int, world_size: int) -> slice:
    """Return which lines a rank takes: consecutive ones, about equally many characters for each."""
    ends = np.cumsum([len(line) + 1 for line in lines])
    total = int(ends[-1]) if lines else 0
    cuts = [int(np.searchsorted(ends, total * r / world_size)) for r in range(1, world_size)]
    bounds = [0, *cuts, len(lines)]
    return slice(bounds[rank], bounds[rank + 1])


@contextmanager
def failing_together(advice: str = "") -> Iterator[None]:
    """Leave the word to a rank that fails, or tell that it is gone.

    :param advice: behind the message of `RanksError`.
    """
    try:
        yield
    except RankZeroFailed:
        time.sleep(LINGER_SECONDS)
        sys.exit(1)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        message = f"lost contact with another rank ({short_message(error)}){advice}"
        raise RanksError(message) from error


@contextmanager
def share_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far rank 0 is with its share of some work, if stderr is a terminal.

    :param what: the label of the bar.
    :returns: a function to call with the number of things just done.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = console.is_terminal and rank() == 0
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def gather_shares(share: Sequence[Item]) -> list[Item]:
    """Return the items of all ranks, one rank's after the other's, on every rank."""
    if world_size() == 1:
        return list(share)
    import torch.distributed

    shares: list[Sequence[Item]] = [share] * world_size()
    torch.distributed.all_gather_object(shares, share)
    return [item for part in shares for item in part]


def lost_contact(error: Exception) -> bool:
    """Tell whether an error says that another rank is gone, or cannot be reached."""
    signs = ("Connection closed", "Connection reset", "Connection refused", "Timed out", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in short_message(error) for sign in signs)


def short_message(error: Exception) -> str:
    """Return the first line of an error, without the C++ file that gloo begins with."""
    text = first_line(error)
    return text.partition("] ")[2] if text.startswith("[/") else text
