"""TODO docstring."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import fsync, write_atomically, write_json

if TYPE_CHECKING:  # torch and deepspeed take seconds to import
    pass

log = logging.getLogger("checkpoint")


EMA_FILE = "ema.pt"


FORMAT = 2  # of checkpoint.json


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
