"""A training from its first check to its last checkpoint."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext

import torch
from rich.console import Console

from data_prep.files import only_command_in
from pipeline.checkpoints.folder import (
    Checkpoint,
    check_space,
    remove_unfinished,
    set_aside_damaged,
)
from pipeline.checkpoints.resume import checkpoint_to_resume, is_finished
from pipeline.pictures import draw_losses
from pipeline.preflight import GIB
from pipeline.ranks import without_greetings
from pipeline.recipe import Recipe
from pipeline.tracking.note import LOSSES, log_note
from pipeline.tracking.provenance import log_data, log_training
from pipeline.tracking.system_metrics import system_metrics
from pipeline.tracking.tracker import Tracker, open_tracker, set_aside_finished
from pipeline.training.deepspeed_config import precision
from pipeline.training.loop import Loop
from pipeline.training.rehearsal import rehearse
from pipeline.training.task import Batch, Task
from pipeline.training.trainer import Trainer
from pipeline.training.validation import Stopped

log = logging.getLogger("train")


def check_run(task: Task[Batch], held: ExitStack) -> Checkpoint | None:
    """Look at everything that training depends on, and clear away what interrupted runs have left.
    Rank 0 calls this for all.

    :param held: takes the lock of `run_dir`.
    :returns: the checkpoint to go on from; None to start from step 0.
    :raises DataError, CheckpointError: training cannot work, and why.
    """
    recipe, started = task.recipe, time.monotonic()
    held.enter_context(only_command_in(recipe.run_dir))
    task.check_recipe()
    data = task.check_data()
    newest = checkpoint_to_resume(recipe, task.identity(), task.criterion)
    if newest is not None and is_finished(recipe, task.criterion, newest):
        return newest
    if newest is not None:
        set_aside_damaged(recipe.checkpoints, newest)
    remove_unfinished(recipe.checkpoints)
    free, needed = check_space(recipe, task.parameter_counts.total)
    seconds = time.monotonic() - started
    text = "preflight: %s; %.1f GiB free, %.2f GiB for checkpoints; %.1f s"
    log.info(text, data, free / GIB, needed / GIB, seconds)
    return newest


def train(task: Task[Batch], newest: Checkpoint | None, console: Console | None) -> None:
    """Train to the end. Every rank calls this.

    :param newest: the checkpoint to go on from.
    :param console: the terminal to show a bar on.
    :raises Stopped: by a signal, after saving.
    """
    torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 takes its fast units
    with without_greetings():
        fits = rehearse(task)
        trainer = Trainer(task, begins=newest is None)
    if newest is not None:
        trainer.resume(newest)
    tracker = None
    if trainer.rank == 0:
        log.info("preflight: %s", fits)
        _introduce(trainer, newest)
        if newest is None:
            set_aside_finished(task.recipe)
        tracker = open_tracker(task.recipe)
        data = task.data_facts()
        log_data(tracker, task.recipe, data)
        log_training(
            tracker,
            task.recipe,
            trainer.deepspeed_config,
            ranks=trainer.world_size,
            device=str(trainer.device),
            core_parameters=task.parameter_counts.core,
        )
    status = "FAILED"
    try:
        with system_metrics(tracker, lambda: trainer.step) if tracker else nullcontext():
            Loop(trainer, newest, tracker).run(console)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracker:
            _draw_losses(tracker, task.recipe, trainer.step)
            log_note(tracker, task.recipe, data, scores=None)
            tracker.close(status)
        task.end.close()


def _introduce(trainer: Trainer[Batch], newest: Checkpoint | None) -> None:
    """Say what is trained, and where."""
    recipe, task = trainer.recipe, trainer.task
    if newest is None and recipe.training.init_from:
        log.info("initial weights: %s", recipe.training.init_from)
    log.info(
        "%s, %s core parameters; %s, %s; %d rank(s) × %d micro-batch(es) a step, ZeRO stage %d; "
        "padding %.1f%%",
        recipe.model.architecture,
        f"{task.parameter_counts.core:,}",
        trainer.device,
        precision(trainer.deepspeed_config),
        trainer.world_size,
        trainer.accumulation_steps,
        trainer.engine.zero_optimization_stage(),
        100 * task.plan.padding_share(),
    )
    micro_batches = task.plan.micro_batches_per_step
    if idle := max(0, trainer.world_size - micro_batches):
        batch = task.plan.max_tokens
        parts = next(n for n in range(trainer.world_size, batch + 1) if batch % n == 0)
        log.warning(
            "%d of %d ranks have nothing to do: a global batch has %d micro-batch(es). With "
            "training.%s %d, in another run_dir, none would be idle",
            idle,
            trainer.world_size,
            micro_batches,
            recipe.training.micro_batch_key,
            batch // parts,
        )


def _draw_losses(tracker: Tracker, recipe: Recipe, last: int) -> None:
    """Draw the picture of the run, which its note shows.

    :param last: the step that it has come to. What is logged of others was trained before, from
        checkpoints that are no more.
    """
    picture = recipe.run_dir / LOSSES
    history = {
        name: {step: value for step, value in values.items() if step <= last}
        for name, values in tracker.history.items()
    }
    try:
        draw_losses(history, picture, smoothed=recipe.training.label_smoothing > 0)
    except OSError as error:  # a full disk: training ends as it has, not with a traceback
        log.warning("%s: not drawn: %s", picture, error.strerror)
