"""Checkpoints: DeepSpeed's own, each in a folder `step-N` with a `checkpoint.json` of ours.

A finished checkpoint has its `checkpoint.json`; `latest` names the newest and `best` the one that
validation found best. They are written after all ranks have saved. `python -m pipeline.checkpoint`
tells whether training has steps left.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import shutil
import sys
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.shards import ShardReader
from data_prep.stage import digest_of, fsync, write_atomically, write_json
from data_prep.vocabulary import vocabulary_digest
from pipeline.command_line import run_command
from pipeline.deepspeed_config import activation_checkpointing, deepspeed_config
from pipeline.recipe import Recipe, TrainingConfig
from pipeline.tracking import Tracker, send_left_over

if TYPE_CHECKING:  # torch and deepspeed take seconds to import
    from torch import Tensor

log = logging.getLogger("checkpoint")

BATCH_PLAN_VERSION = 3  # raise it when the same shards and seed would give other batches
EMA_FILE = "ema.pt"
FORMAT = 2  # of checkpoint.json
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


class CheckpointError(Exception):
    """A checkpoint is missing, or belongs to something else."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    folder: Path
    step: int
    info: dict[str, Any]
    """Contents of checkpoint.json: step, world_size, zero_stage, model, vocabulary, …; empty if it
    cannot be read."""

    @property
    def tag(self) -> str:
        return self.folder.name

    def damage(self) -> str | None:
        """What is wrong with its files; None if they are as they were written."""
        if not self.info:
            return "checkpoint.json is damaged"
        for name, size in self.info["bytes"].items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                return f"{name} has {found:,} of {size:,} bytes"
            if path.suffix == ".pt":  # a zip file, with a checksum for each part
                try:
                    with zipfile.ZipFile(path) as parts:
                        broken = parts.testzip()
                except Exception as error:  # whatever a flipped bit makes of it
                    broken = str(error)
                if broken:
                    return f"{name} is damaged ({broken})"
        return None


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The finished checkpoints, oldest first."""
    checkpoints = []
    for path in sorted(folder.glob("step-*/checkpoint.json")):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            info = {}
        step = int(path.parent.name.removeprefix("step-"))
        checkpoints.append(Checkpoint(path.parent, step, info))
    return checkpoints


def finish_checkpoint(
    folder: Path, step: int, info: dict[str, Any], keep: int, best_step: int | None
) -> None:
    """Declare `step-N` finished; delete what is neither best nor among the `keep` newest.

    For one rank only, when all have saved.
    """
    new = folder / tag_of(step)
    sizes = {}
    for path in sorted(new.rglob("*")):
        fsync(path)
        if path.is_file():
            sizes[str(path.relative_to(new))] = path.stat().st_size
    write_json(new / "checkpoint.json", {"format": FORMAT, "step": step, **info, "bytes": sizes})
    write_atomically(folder / "latest", tag_of(step))
    _point_to_best(folder, best_step)
    for old in list_checkpoints(folder)[:-keep]:
        if old.step != best_step:
            (old.folder / "checkpoint.json").unlink()  # first: half-deleted is not finished
    remove_unfinished(folder)


def record_validation(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write what a validation has found into a checkpoint that was saved before it."""
    path = folder / tag_of(step) / "checkpoint.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**info, "validation": state})
    _point_to_best(folder, state["best_step"])


def _point_to_best(folder: Path, step: int | None) -> None:
    if step is not None and (folder / tag_of(step) / "checkpoint.json").exists():
        write_atomically(folder / "best", tag_of(step))
    else:
        (folder / "best").unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted saves have left."""
    for path in folder.glob("step-*"):
        if not (path / "checkpoint.json").exists():
            shutil.rmtree(path)


def set_aside_damaged(folder: Path, newest: Checkpoint) -> None:
    """Rename the checkpoints after `newest`: they were found damaged, and would pass for newer."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.step > newest.step:
            aside = folder / f"damaged-{checkpoint.tag}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.folder.rename(aside)
            log.warning("set aside as %s", aside)


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


def checkpoints_to_average(recipe: Recipe) -> list[Checkpoint]:
    """Those of `run_dir` that `evaluation.checkpoint` names, oldest first.

    :raises CheckpointError: there is none, or one belongs to another vocabulary or model.
    """
    folder, wanted = recipe.run_dir / "checkpoints", recipe.evaluation.checkpoint
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{recipe.run_dir}: no finished checkpoint; run `./run.sh train`")
    identity = {
        "model": recipe.model.model_dump(mode="json"),
        "vocabulary": vocabulary_digest(recipe.run_dir / "shards"),
    }
    if wanted == "newest":
        chosen = checkpoints[-recipe.evaluation.average_checkpoints :]
    else:
        best = (folder / "best").read_text("utf-8") if (folder / "best").exists() else "none yet"
        tag = best if wanted == "best" else tag_of(int(wanted))
        chosen = [checkpoint for checkpoint in checkpoints if checkpoint.tag == tag]
    if not chosen:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise CheckpointError(
            f"{folder}: evaluation.checkpoint {wanted} is not there; there are the steps {steps}"
        )
    for checkpoint in chosen:
        if damage := checkpoint.damage():
            raise CheckpointError(
                f"{checkpoint.folder}: {damage}; `./run.sh train` goes back to the one before"
            )
        refuse_foreign(checkpoint.folder, checkpoint.info, identity)
    return chosen


def open_tracker(recipe: Recipe) -> Tracker:
    """The tracker of `run_dir`; of a checkpoint that was brought here it goes on with the run."""
    checkpoints = list_checkpoints(recipe.run_dir / "checkpoints")
    return Tracker(recipe, checkpoints[-1].info.get("tracker_run_id") if checkpoints else None)


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The consolidated fp32 weights, under the model's own names.

    :raises CheckpointError: damaged.
    """
    import torch

    # DeepSpeed tells its progress on stdout, where `translate` writes translations.
    silence = io.StringIO()
    try:
        with redirect_stdout(silence), redirect_stderr(silence):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if checkpoint.info["zero_stage"] == 0:
            path = checkpoint.folder / "mp_rank_00_model_states.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)["module"]
        else:
            with redirect_stdout(silence), redirect_stderr(silence):
                state = get_fp32_state_dict_from_zero_checkpoint(
                    str(checkpoint.folder.parent), checkpoint.tag
                )
            if checkpoint.info["zero_stage"] < 3:  # DeepSpeed leaves out what is not trained
                path = checkpoint.folder / "mp_rank_00_model_states.pt"
                whole = torch.load(path, map_location="cpu", weights_only=False)["module"]
                state = {**whole, **state}
    except Exception as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be read: {error}") from error
    return {name: tensor.float() for name, tensor in state.items()}


def load_average(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The moving average of the weights, under the model's own names.

    :raises CheckpointError: it has none.
    """
    import torch

    path = checkpoint.folder / EMA_FILE
    if not path.exists():
        raise CheckpointError(
            f"evaluation.use_ema: {checkpoint.folder} has no moving average; it is kept when "
            "training.ema_decay is set"
        )
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["weights"]
    return weights


def average_weights(
    checkpoints: Sequence[Checkpoint], *, use_ema: bool = False
) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints, summed in float64."""
    load = load_average if use_ema else load_weights
    total = {name: tensor.double() for name, tensor in load(checkpoints[0]).items()}
    for checkpoint in checkpoints[1:]:
        for name, tensor in load(checkpoint).items():
            total[name] += tensor
    return {name: (tensor / len(checkpoints)).float() for name, tensor in total.items()}


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
