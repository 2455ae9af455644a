"""`deepspeed pipeline/train.py`: train on prepared data, on every rank that the launcher starts.

`python pipeline/train.py --steps_left` needs no launcher: it only tells whether there is anything
left to train, and what would stop training at once.
"""

# What needs torch is imported when training starts: `--steps_left` answers in a second.

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack
from datetime import timedelta
from types import FrameType
from typing import NoReturn

from data_prep.identity import check_test_sets
from pipeline.checkpoints.resume import checkpoint_to_resume, finished_note, is_finished
from pipeline.command_line import run_command
from pipeline.evaluation.test_sets import held_out_of
from pipeline.preflight import remove_dead_build_locks
from pipeline.ranks import failing_together, from_rank_0, join_ranks, leave_ranks, rank
from pipeline.recipe import Recipe, UsageError
from pipeline.tracking.tracker import send_left_over
from pipeline.training.deepspeed_config import activation_checkpointing, deepspeed_config
from pipeline.translation.task import TranslationTask

log = logging.getLogger("train")

STEPS_LEFT = 3  # exit code of `--steps_left`
STOPPED = 75  # exit code after a signal: EX_TEMPFAIL, "try again"
AGAIN = "run the same command again to continue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps_left",
        action="store_true",
        help="do not train; exit with 0 when training is finished, with 3 when steps are left",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    task = TranslationTask(recipe)
    if arguments.steps_left:
        tell_steps_left(task)
    if "RANK" not in os.environ:
        raise UsageError(
            "no launcher: call ./run.sh train, deepspeed pipeline/train.py, or torchrun"
        )
    signal.signal(signal.SIGTERM, _stop_early)
    from pipeline.training.progress import start_logging
    from pipeline.training.run import check_run, train
    from pipeline.training.validation import Stopped

    console = start_logging(rank())
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for lock in remove_dead_build_locks():
        log.warning("%s: removed; a build that was killed left it", lock)
    # Longer than the watchdog's, whose message is for people.
    join_ranks(timedelta(seconds=recipe.training.collective_timeout + 60))
    with ExitStack() as held:
        try:
            with failing_together(f"; {AGAIN} from the newest checkpoint"):
                newest = from_rank_0(lambda: check_run(task, held))
                if newest is not None and is_finished(recipe.training, task.criterion, newest):
                    log.info("%s", finished_note(recipe, newest))
                else:
                    from_rank_0(lambda: check_test_sets(held_out_of(recipe), recipe.run_dir))
                    train(task, newest, console)
                leave_ranks()
        except Stopped as stopped:
            if rank() == 0:
                print(f"train: {stopped}; {AGAIN}", file=sys.stderr, flush=True)
            leave_ranks()
            sys.exit(STOPPED)


def tell_steps_left(task: TranslationTask) -> NoReturn:
    """Exit with 0 and say so when there is nothing left to train; with 3 when there is.

    What would stop training at once stops it here, before the launcher is started.
    """
    logging.basicConfig(format="train: %(message)s")
    recipe = task.recipe
    task.check_recipe()
    deepspeed_config(recipe.training, accumulation_steps=1)
    activation_checkpointing(recipe.training, recipe.model)
    newest = checkpoint_to_resume(recipe, task.identity(), task.criterion)
    if newest is None or not is_finished(recipe.training, task.criterion, newest):
        check_test_sets(held_out_of(recipe), recipe.run_dir)
        sys.exit(STEPS_LEFT)
    print(f"train: {finished_note(recipe, newest)}", file=sys.stderr)
    send_left_over(recipe)
    sys.exit(0)


def _stop_early(signum: int, frame: FrameType | None) -> None:
    """Stop before the loop listens to signals itself: there is nothing to save yet, and `finally`
    blocks are run."""
    print(f"train: stopped by a signal before the first step; {AGAIN}", file=sys.stderr, flush=True)
    sys.exit(STOPPED)


def program() -> str:
    """Return what messages begin with."""
    return "train" if rank() == 0 else f"train: rank {rank()}"


if __name__ == "__main__":
    run_command(program(), "Train a translation model with DeepSpeed.", main, add_arguments)
