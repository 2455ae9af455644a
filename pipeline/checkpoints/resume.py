"""TODO docstring."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

from data_prep.batch_plan import BATCH_PLAN_VERSION
from data_prep.files import digest_of
from data_prep.shards import ShardReader
from pipeline.checkpoints.folder import FORMAT, Checkpoint, CheckpointError, list_checkpoints, log
from pipeline.command_line import run_command
from pipeline.recipe import Recipe, TrainingConfig
from pipeline.tracking.tracker import send_left_over
from pipeline.training.deepspeed_config import activation_checkpointing, deepspeed_config

if TYPE_CHECKING:  # torch and deepspeed take seconds to import
    pass

STEPS_LEFT = 3  # exit code of `python -m pipeline.checkpoint`


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
)


def training_identity(recipe: Recipe, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint is bound to: the model, and what its step counts batches of."""
    training = recipe.training
    return {
        "model": recipe.model.model_dump(mode="json"),
        "vocabulary": manifest["vocabulary"]["sha256"],
        "data": digest_of([s["sha256"] for s in manifest["shards"] if s["split"] == "train"]),
        "batch plan": [
            BATCH_PLAN_VERSION,
            training.seed,
            training.max_tokens,
            training.micro_batch_tokens,
        ],
        "frozen parameters": training.freeze,
    }


def refuse_foreign(where: object, info: dict[str, Any], identity: dict[str, Any]) -> None:
    """:raises CheckpointError: the checkpoint belongs to another model, vocabulary, data …"""
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{where} was written by another version of this program; choose another run_dir, or "
            "remove that folder"
        )
    for key, value in identity.items():
        if info.get(key) != value:
            raise CheckpointError(
                f"{where} belongs to another {key}: it does not fit this recipe and its shards. "
                "Choose another run_dir, or remove that folder"
            )


def checkpoint_to_resume(recipe: Recipe, manifest: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint of `run_dir` that is whole; None to start from step 0.

    :param manifest: of the shards.
    :raises CheckpointError: it does not fit the recipe, or may not be continued.
    """
    existing = list_checkpoints(recipe.run_dir / "checkpoints")
    for newest in reversed(existing):
        if damage := newest.damage():
            log.warning("%s: %s; going back to the one before", newest.folder, damage)
            continue
        refuse_foreign(newest.folder, newest.info, training_identity(recipe, manifest))
        if recipe.training.resume == "never" and not is_finished(recipe.training, newest):
            raise CheckpointError(
                f"{newest.folder} exists and training.resume is `never`; choose another run_dir"
            )
        return newest
    if existing:
        raise CheckpointError(
            f"{existing[0].folder.parent}: no checkpoint is whole; remove that folder to train anew"
        )
    return None


def last_step(training: TrainingConfig, steps_per_epoch: int) -> int:
    """The step that training ends with."""
    if training.max_epochs is None:
        return training.max_steps
    return min(training.max_steps, math.ceil(training.max_epochs * steps_per_epoch))


def criterion(training: TrainingConfig) -> str:
    """The metric that says which step was the best."""
    return "valid_bleu" if training.bleu_every else "valid_loss"


def is_finished(training: TrainingConfig, newest: Checkpoint) -> bool:
    """Whether nothing is left to train."""
    validation = newest.info["validation"]
    judged = validation["criterion"] == criterion(training)
    stopped_early = judged and 0 < training.early_stopping <= validation["stale"]
    over = newest.step >= last_step(training, newest.info["steps_per_epoch"])
    return (stopped_early or over) and not validation["due"]


def changed_optimisation(training: TrainingConfig, checkpoint: Checkpoint) -> list[str]:
    """Keys of the recipe's `training` with which the checkpoint was trained otherwise."""
    then, now = checkpoint.info.get("training", {}), training.model_dump(mode="json")
    return sorted(key for key in OPTIMISATION if then.get(key) != now[key])


def finished_note(recipe: Recipe, newest: Checkpoint) -> str:
    """What to tell a user whose training has nothing left to do."""
    last = last_step(recipe.training, newest.info["steps_per_epoch"])
    note = f"finished: step {newest.step} of {last} ({newest.folder})"
    if newest.step < last:
        note += (
            f"; early stopping: no better model in {newest.info['validation']['stale']} validations"
        )
    if changed := changed_optimisation(recipe.training, newest):
        note += (
            f"; note: it was trained with other values of {', '.join(changed)}; for a new "
            "training, choose another run_dir"
        )
    return note


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Exit 0 and say so when there is nothing left to train; 3 when there is.

    What would stop training at once stops it here, before the launcher is started.
    """
    logging.basicConfig(format="train: %(message)s")
    manifest = ShardReader(recipe.run_dir / "shards", "train").manifest
    deepspeed_config(recipe.training, accumulation_steps=1)
    activation_checkpointing(recipe.training, recipe.model)
    newest = checkpoint_to_resume(recipe, manifest)
    if newest is None or not is_finished(recipe.training, newest):
        sys.exit(STEPS_LEFT)
    print(f"train: {finished_note(recipe, newest)}", file=sys.stderr)
    send_left_over(recipe)


if __name__ == "__main__":
    run_command("train", "Train a translation model with DeepSpeed.", main)
