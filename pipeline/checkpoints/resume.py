"""Which checkpoint a training goes on from, and whether there is anything left to train."""

from __future__ import annotations

import math
from typing import Any

from data_prep.arrow import validation_digest
from pipeline.checkpoints.folder import (
    Checkpoint,
    CheckpointError,
    Criterion,
    DamagedCheckpointError,
    list_checkpoints,
    log,
)
from pipeline.checkpoints.trained_with import OPTIMISATION, changed_keys
from pipeline.recipe import Recipe, TrainingConfig


def checkpoint_to_resume(
    recipe: Recipe, identity: dict[str, Any], criterion: Criterion
) -> Checkpoint | None:
    """Return the newest checkpoint of `run_dir` that is whole; None to start from step 0.

    :param identity: what the checkpoint must be bound to (`Task.identity`).
    :param criterion: the task's, which says which step is the best.
    :raises CheckpointError: it does not fit the recipe, or may not be continued.
    """
    existing = list_checkpoints(recipe.checkpoints)
    for newest in reversed(existing):
        try:
            newest.check()
        except DamagedCheckpointError as damage:
            log.warning("%s; going back to the one before", damage)
            continue
        newest.refuse_other(identity)
        if recipe.training.resume == "never" and not is_finished(recipe, criterion, newest):
            raise CheckpointError(
                f"{newest.folder} exists and training.resume is `never`; choose another run_dir"
            )
        return newest
    if existing:
        raise CheckpointError(
            f"{recipe.checkpoints}: no checkpoint is whole; remove that folder to train anew"
        )
    return None


def last_step(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Return the step that training ends with."""
    if training.max_epochs is None:
        return training.max_steps
    steps = round(training.max_epochs * steps_per_epoch, 6)  # 1.1 · 100 is more than 110
    return min(training.max_steps, math.ceil(steps))


def is_finished(recipe: Recipe, criterion: Criterion, newest: Checkpoint) -> bool:
    """Tell whether nothing is left to train."""
    training, validation = recipe.training, newest.info.validation
    stopped_early = (
        validation.gives_up(training.early_stopping)
        and validation.is_by(criterion)
        and validation.is_of(validation_digest(recipe.shards))
    )
    over = newest.step >= last_step(training, newest.info.steps_per_epoch)
    return (stopped_early or over) and not validation.due


def finished_note(recipe: Recipe, newest: Checkpoint) -> str:
    """Return what to tell a user whose training has nothing left to do."""
    last = last_step(recipe.training, newest.info.steps_per_epoch)
    note = f"finished: step {newest.step} of {last} ({newest.folder})"
    if newest.step < last:
        stale = newest.info.validation.stale
        note += f"; early stopping: no better model in {stale} validations"
    if changed := changed_keys(recipe.training, newest, OPTIMISATION):
        note += (
            f"; note: it was trained with other values of {', '.join(changed)}; for a new "
            "training, choose another run_dir"
        )
    return note
