"""`deepspeed pipeline/train.py`: train on prepared shards.

What one step does is in `engine.py`; here is what happens around the steps, from the first check to
the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack
from datetime import timedelta
from types import FrameType

from deepspeed import comm as dist

from pipeline.checkpoints.resume import finished_note, is_finished
from pipeline.command_line import run_command
from pipeline.preflight import remove_dead_build_locks
from pipeline.ranks import failing_together, from_rank_0, meet
from pipeline.recipe import Recipe, UsageError
from pipeline.training.loop import _look_before, _train
from pipeline.training.progress import start_logging
from pipeline.training.validation import Stopped

log = logging.getLogger("train")


STOPPED = 75  # exit code after a signal: EX_TEMPFAIL, "try again"
AGAIN = "run the same command again to continue"


# ── From start to end ───────────────────────────────────────────────────────────────────────────


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        raise UsageError(
            "no launcher: call ./run.sh train, deepspeed pipeline/train.py, or torchrun"
        )
    signal.signal(signal.SIGTERM, _stop_early)
    rank = int(os.environ["RANK"])
    console = start_logging(rank)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for lock in remove_dead_build_locks():
        log.warning("%s: removed; a build that was killed left it", lock)
    # Longer than the watchdog's, whose message is for people.
    meet(timedelta(seconds=recipe.training.collective_timeout + 60))
    with ExitStack() as held:
        try:
            with failing_together(f"; {AGAIN} from the newest checkpoint"):
                newest = from_rank_0(lambda: _look_before(recipe, held))
                if newest is not None and is_finished(recipe.training, newest):
                    log.info("%s", finished_note(recipe, newest))
                else:
                    _train(recipe, newest, console)
                dist.barrier()  # the launcher kills all when one ends; rank 0 may still be sending
        except Stopped as stopped:
            dist.barrier()
            if rank == 0:
                print(f"train: {stopped}; {AGAIN}", file=sys.stderr, flush=True)
            sys.exit(STOPPED)
    dist.destroy_process_group()  # after an error it could wait for what never comes


def _stop_early(signum: int, frame: FrameType | None) -> None:
    """Until the loop listens itself: nothing to save yet. It ends with `finally`."""
    print(f"train: stopped by a signal before the first step; {AGAIN}", file=sys.stderr, flush=True)
    sys.exit(STOPPED)


def program() -> str:
    """What messages begin with."""
    rank = os.environ.get("RANK", "0")
    return "train" if rank == "0" else f"train: rank {rank}"


if __name__ == "__main__":
    run_command(program(), "Train a translation model with DeepSpeed.", main)
