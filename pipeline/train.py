"""`deepspeed pipeline/train.py`: train on prepared data, on every rank that the launcher starts.

`python pipeline/train.py --steps_left` needs no launcher: it only tells whether there is anything
left to train, and what would stop training at once.
"""

# What needs torch is imported when training starts: `--steps_left` answers in a second.

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import ExitStack
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from data_prep.files import only_command_in
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.resume import checkpoint_to_resume, finished_note, is_finished
from pipeline.command_line import AGAIN, STOPPED, on_signals, run_command
from pipeline.evaluation.test_sets import check_training_text
from pipeline.preflight import remove_dead_build_locks
from pipeline.ranks import (
    choose_allocator,
    failing_together,
    join_ranks,
    launched,
    leave_ranks,
    rank,
    refuse_other_keys,
    wait_for_rank_0,
)
from pipeline.recipe import Recipe, UsageError
from pipeline.tasks import task_of
from pipeline.tracking.tracker import send_left_over
from pipeline.training.deepspeed_config import (
    activation_checkpointing,
    check_precision_of_machine,
    deepspeed_config,
)
from pipeline.training.task import Task

log = logging.getLogger("train")

STEPS_LEFT = 3  # exit code of `--steps_left`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps_left",
        action="store_true",
        help="do not train; exit with 0 when training is finished, with 3 when steps are left",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    choose_allocator()
    deepspeed_config(recipe.training, accumulation_steps=1)
    activation_checkpointing(recipe.training, recipe.model)
    slow = check_precision_of_machine(recipe.training)
    task = task_of(recipe)
    if arguments.steps_left:
        tell_steps_left(task)
    if not launched():
        raise UsageError(
            "no launcher: call ./run.sh train, deepspeed pipeline/train.py, or torchrun"
        )
    on_signals(_stop_early)
    from pipeline.training.progress import start_logging
    from pipeline.training.run import train
    from pipeline.training.validation import Stopped

    console = start_logging(rank())
    if slow:
        log.warning("%s", slow)
    for lock in remove_dead_build_locks():
        log.warning("%s: removed; a build that was killed left it", lock)
    # Longer than the watchdog's, whose message is for people.
    timeout = timedelta(seconds=recipe.training.collective_timeout + 60)
    with ExitStack() as held:
        try:
            with failing_together(f"; {AGAIN} from the newest checkpoint"):
                newest = wait_for_rank_0(lambda: _check(task, held), timeout)
                join_ranks(timeout)
                refuse_other_keys(_of_all_ranks(task))
                if newest is not None and is_finished(recipe, task.criterion, newest):
                    log.info("%s", finished_note(recipe, newest))
                else:
                    train(task, newest, console)
                leave_ranks()
        except Stopped as stopped:
            if rank() == 0:
                print(f"train: {stopped}; {AGAIN}", file=sys.stderr, flush=True)
            leave_ranks()
            sys.exit(STOPPED)


def _check(task: Task[Any], held: ExitStack) -> Checkpoint | None:
    """Check everything that training depends on; rank 0 does. See `check_run`.

    :raises DataError: among others, when sentences of a test set may be in the training text.
    """
    from pipeline.training.run import check_run

    recipe, newest = task.recipe, check_run(task, held)
    if newest is None or not is_finished(recipe, task.criterion, newest):
        check_training_text(recipe)
    return newest


def _of_all_ranks(task: Task[Any]) -> dict[str, Any]:
    """Return what must be the same on every rank. Paths may differ, but for what they lead to."""
    paths = {"training": {"deepspeed_config", "init_from"}, "evaluation": {"comet"}}
    keys = task.recipe.model_dump(
        mode="json", include={"model", "training", "evaluation"}, exclude=paths
    )
    config = deepspeed_config(task.recipe.training, accumulation_steps=1)
    return {**keys, "prepared for": task.model_identity, "training.deepspeed_config": config}


def tell_steps_left(task: Task[Any]) -> NoReturn:
    """Exit with 0 and say so when there is nothing left to train; with 3 when there is.

    What would stop training at once stops it here, before the launcher is started.
    """
    logging.basicConfig(format="train: %(message)s")
    recipe = task.recipe
    task.check_recipe()
    newest = checkpoint_to_resume(recipe, task.identity(), task.criterion)
    if newest is None and recipe.training.init_from:
        task.check_base(recipe.training.init_from)
    if newest is None or not is_finished(recipe, task.criterion, newest):
        check_training_text(recipe)
        sys.exit(STEPS_LEFT)
    print(f"train: {finished_note(recipe, newest)}", file=sys.stderr)
    with only_command_in(recipe.run_dir, make=False):
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
    run_command(program(), "Train a model with DeepSpeed.", main, add_arguments, kind=Recipe)
