"""What ranks do together."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed
from deepspeed import comm as dist

Result = TypeVar("Result")


class RankZeroFailed(Exception):
    """On the other ranks, when rank 0 could not do what all depend on; it tells why itself."""


def init_distributed(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Meet the other ranks.

    On CPU DeepSpeed leaves 66 MiB of shared memory behind for every rank, which nobody frees. Once
    all ranks have it open, it needs no name, and goes with the processes.
    """
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def from_rank_0(function: Callable[[], Result]) -> Result:
    """Call it on rank 0. :returns: the result, on every rank.

    :raises RankZeroFailed: on the others, when it has raised anything on rank 0.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as caught:
            error, outcome[1] = caught, str(caught)
    if dist.get_world_size() > 1:
        torch.distributed.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankZeroFailed(outcome[1])
    result: Result = outcome[0]
    return result


def lost_contact(error: Exception) -> bool:
    """Whether it says that another rank is gone, or cannot be reached."""
    signs = ("Connection closed", "Connection reset", "Connection refused", "Timed out", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in first_line(error) for sign in signs)


def first_line(error: Exception) -> str:
    """Without the C++ file that gloo begins with."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.partition("] ")[2] if text.startswith("[/") else text
