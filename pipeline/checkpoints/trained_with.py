"""What a run was trained with: its recipe or the command line may say otherwise by now."""

from __future__ import annotations

from typing import TypeVar

from pipeline.checkpoints.folder import Checkpoint, list_checkpoints
from pipeline.recipe import Recipe, TrainingConfig

R = TypeVar("R", bound=Recipe)

# Keys of the recipe's `training` that change what is learnt but not what a step is.
OPTIMISATION = (
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "adam_betas",
    "adam_eps",
    "weight_decay",
    "clip_norm",
    "label_smoothing",
    "init_from",
    "random_depth",
    "ema_decay",
    "augmentation",
)
LEARNT_WITH = ("seed", "max_steps", *OPTIMISATION)  # the schedule ends with max_steps


def newest_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """Return the newest checkpoint of `run_dir`, if there is one."""
    return next(reversed(list_checkpoints(recipe.checkpoints)), None)


def as_trained(recipe: R, checkpoint: Checkpoint) -> R:
    """Return the recipe that a checkpoint was trained with. (What it says of model and data cannot
    have changed: the checkpoint is bound to them.) What it began from may have moved: the recipe
    says where that is now.

    :raises CheckpointError: it is damaged.
    """
    training, now = type(recipe.training), recipe.training
    known = {k: v for k, v in checkpoint.info.training.items() if k in training.model_fields}
    if known.get("init_from") and now.init_from:
        known["init_from"] = now.init_from
    return recipe.model_copy(update={"training": training.model_validate(known)})


def changed_keys(
    training: TrainingConfig, checkpoint: Checkpoint, keys: tuple[str, ...]
) -> list[str]:
    """Return which keys of `training` were others when the checkpoint was trained.

    :param keys: to compare.
    :raises CheckpointError: it is damaged.
    """
    then, now = checkpoint.info.training, training.model_dump(mode="json")
    known = now.keys() & then.keys()  # each task has some; those of an older version lack the new
    return sorted(key for key in keys if key in known and then[key] != now[key])
