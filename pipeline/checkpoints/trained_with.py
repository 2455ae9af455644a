"""What a run was trained with: its recipe or the command line may say otherwise by now."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from models.export_format import digest_of_export
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
LEARNT_WITH = ("seed", "max_steps", "max_epochs", *OPTIMISATION)  # the schedule ends with them


def newest_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """Return the newest checkpoint of `run_dir`, if there is one."""
    return next(reversed(list_checkpoints(recipe.checkpoints)), None)


def as_trained(recipe: R, checkpoint: Checkpoint) -> R:
    """Return the recipe that a checkpoint was trained with. (What it says of model and data cannot
    have changed: the checkpoint is bound to them.) What it began from may have moved: the recipe
    may say where that is now.

    :raises CheckpointError: it is damaged.
    """
    training, now = type(recipe.training), recipe.training.init_from
    known = {k: v for k, v in checkpoint.info.training.items() if k in training.model_fields}
    if known.get("init_from") and now and is_base(checkpoint, now):
        known["init_from"] = now
    return recipe.model_copy(update={"training": training.model_validate(known)})


def is_base(checkpoint: Checkpoint, export: Path) -> bool:
    """Tell whether an export is what the training of a checkpoint began from, as far as is known:
    older checkpoints do not say.

    :raises CheckpointError: the checkpoint is damaged.
    """
    return checkpoint.info.base in (None, digest_of_export(export))


def changed_keys(
    training: TrainingConfig, checkpoint: Checkpoint, keys: tuple[str, ...]
) -> list[str]:
    """Return which keys of `training` were others when the checkpoint was trained.

    :param keys: to compare.
    :raises CheckpointError: it is damaged.
    """
    then, now = checkpoint.info.training, training.model_dump(mode="json")
    known = now.keys() & then.keys()  # each task has some; those of an older version lack the new
    changed = {key for key in keys if key in known and then[key] != now[key]}
    if "init_from" in keys and training.init_from and checkpoint.info.base:  # it may have moved
        same = is_base(checkpoint, training.init_from)
        changed = changed - {"init_from"} if same else changed | {"init_from"}
    return sorted(changed)
