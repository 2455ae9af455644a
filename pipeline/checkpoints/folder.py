"""Checkpoints on disk: DeepSpeed's files in a folder `step-N`, with a `checkpoint.json` of ours.

A checkpoint is finished when it has its `checkpoint.json`; `latest` names the newest and `best` the
one that validation found best. They are written after all ranks have saved.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from data_prep.files import digest_of, fsync, write_atomically, write_json
from pipeline.preflight import GIB
from pipeline.recipe import Recipe

log = logging.getLogger("checkpoint")

EMA_FILE = "ema.pt"
OURS = "step-" + 8 * "[0-9]"  # all that is ours in the folder of checkpoints, as a glob pattern
FORMAT = 2  # of checkpoint.json


class CheckpointError(Exception):
    """A checkpoint is missing, or belongs to something else."""


class DamagedCheckpointError(CheckpointError):
    """The files of a checkpoint are not as they were written."""


class Criterion(NamedTuple):
    """The metric of a validation that says which step is the best."""

    metric: str
    larger_is_better: bool
    found_by: str | None = None
    """A digest of the keys, besides the model's and training's, that its values depend on."""

    @property
    def best(self) -> Callable[..., Any]:
        """Return what finds the best of some values: `max` or `min`."""
        return max if self.larger_is_better else min


class ValidationState(BaseModel):
    """What the validations of a run have found so far: a resumed run goes on with it."""

    model_config = ConfigDict(frozen=True)

    criterion: str
    """The metric that says which step is the best."""

    validation_set: str | None = None
    """A digest of the examples that it is of; None: a checkpoint of an older version."""

    found_by: str | None = None
    """As of `Criterion`; None: no keys, or a checkpoint of an older version."""

    best: float | None = None
    """Its best value."""

    best_step: int | None = None
    """The step that had it."""

    stale: int = 0
    """Validations since that step."""

    due: bool = False
    """Whether the validation of the newest step was put off by a signal."""

    def is_by(self, criterion: Criterion) -> bool:
        """Tell whether its values can be compared with those of a criterion, as far as is known."""
        same = self.found_by in (None, criterion.found_by)
        return self.criterion == criterion.metric and same

    def is_of(self, validation_set: str | None) -> bool:
        """Tell whether its values are of these examples, as far as that is known."""
        return self.validation_set in (None, validation_set)

    def judged(self, value: float, step: int, criterion: Criterion) -> ValidationState:
        """Return the state after a validation that gave `value`."""
        better = self.best is None or criterion.best(self.best, value) != self.best
        if math.isfinite(value) and better:
            return self.model_copy(update={"best": value, "best_step": step, "stale": 0})
        return self.model_copy(update={"stale": self.stale + 1})

    def gives_up(self, patience: int) -> bool:
        """Tell whether early stopping ends training (`patience` 0: it never does)."""
        return 0 < patience <= self.stale


class Layout(BaseModel):
    """How DeepSpeed has cut the optimizer's state, and what it is made of."""

    model_config = ConfigDict(frozen=True)

    zero_stage: int
    world_size: int
    precision: str
    """`fp32`, `bf16` or `fp16`."""

    offload: bool
    """Whether the optimizer's state is on the host."""

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        words = [f"{ranks} at ZeRO stage {self.zero_stage}", self.precision]
        return ", ".join([*words, "offload"] if self.offload else words)


class CheckpointInfo(Layout):
    """What `checkpoint.json` says. Keys besides those here are the identity of the training: what
    the checkpoint is bound to (`Task.identity`)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: int = FORMAT
    step: int
    training: dict[str, Any]
    """The recipe's `training` section; its `init_from` is that of the first step."""

    base: str | None = None
    """A digest of the export that the first step began from; None: it began from random weights, or
    an older version trained it."""

    steps_per_epoch: int
    validation: ValidationState

    scheduled: bool = True
    """Whether the schedule asked for this checkpoint. One that only a signal asked for is there to
    resume from, and takes no part in what is kept, averaged and evaluated."""

    tracker_run_id: str | None
    """The MLflow run that the training logs to, once it is known."""

    run_dir: str | None = None
    """Where it was trained; None: an older version trained it."""

    saved_at: float
    """Seconds since the epoch."""

    bytes: dict[str, int] = {}
    """The size of each file of the checkpoint."""

    parts: dict[str, str] = {}
    """A digest of the checksums in each of torch's files, which are zip files."""

    @property
    def layout(self) -> Layout:
        return Layout.model_validate(self.model_dump(include=set(Layout.model_fields)))

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint."""

    folder: Path
    step: int

    @property
    def tag(self) -> str:
        return self.folder.name

    @cached_property
    def info(self) -> CheckpointInfo:
        """Return the contents of checkpoint.json.

        :raises DamagedCheckpointError: the file is damaged.
        :raises CheckpointError: another version of this program wrote it.
        """
        path = self.folder / "checkpoint.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] == FORMAT:
                info = CheckpointInfo.model_validate(content)
                if info.step == self.step:
                    return info
                raise ValueError(f"it is of step {info.step}")  # someone renamed the folder
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{self.folder}: {path.name} is damaged") from error
        raise CheckpointError(
            f"{self.folder} was written by another version of this program; choose another "
            "run_dir, or remove that folder"
        )

    def check(self) -> None:
        """Compare the files with what was written.

        :raises DamagedCheckpointError: they differ.
        :raises CheckpointError: another version of this program wrote them.
        """
        for name, size in self.info.bytes.items():
            if damage := _damage(self.folder / name, size, self.info.parts.get(name)):
                raise DamagedCheckpointError(f"{self.folder}: {name} {damage}")

    def refuse_other(self, identity: dict[str, Any]) -> None:
        """Compare what the checkpoint is bound to with `identity`, or with a part of it.

        :raises CheckpointError: the checkpoint belongs to another model, vocabulary, data …
        """
        for key, value in identity.items():
            if self.info.identity.get(key) != value:
                its = f"set of {key}" if key.endswith("s") else key
                raise CheckpointError(
                    f"{self.folder} belongs to another {its}: it does not fit this recipe and its "
                    "shards. Choose another run_dir, or remove that folder"
                )


def _damage(path: Path, size: int, parts: str | None) -> str | None:
    """Say what is wrong with a file; None if nothing is."""
    found = path.stat().st_size if path.exists() else 0
    if found != size:
        return f"has {found:,} of {size:,} bytes"
    if path.suffix != ".pt":
        return None
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if parts is not None and _digest_of_parts(path) != parts:
            return "is another than was written"
    except Exception as error:  # whatever a flipped bit makes of it
        broken = str(error)
    return f"is damaged ({broken})" if broken else None


def _digest_of_parts(path: Path) -> str:
    """Return a digest of the checksums of the parts of a zip file, without reading those."""
    with zipfile.ZipFile(path) as file:
        return digest_of([[part.filename, part.CRC] for part in file.infolist()])


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the finished checkpoints, oldest first."""
    finished = sorted(path.parent for path in folder.glob(f"{OURS}/checkpoint.json"))
    return [Checkpoint(path, int(path.name.removeprefix("step-"))) for path in finished]


def scheduled_ones(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return those that the schedule asked for. Damaged ones count as such: whoever reads them will
    say what is wrong."""

    def is_scheduled(checkpoint: Checkpoint) -> bool:
        try:
            return checkpoint.info.scheduled
        except CheckpointError:
            return True

    return [checkpoint for checkpoint in checkpoints if is_scheduled(checkpoint)]


def best_tag(folder: Path) -> str | None:
    """Return the tag of the checkpoint that validation found best; None if there is none yet.

    The newest checkpoint knows it. The file `best` is for people: a kill can leave it behind.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        with suppress(CheckpointError):  # it is damaged
            step = checkpoint.info.validation.best_step
            return None if step is None else tag_of(step)
    return None


def finish_checkpoint(folder: Path, info: CheckpointInfo, keep: int) -> None:
    """Declare a checkpoint finished; delete those that are neither best nor among the `keep` newest
    of the schedule. The newest of all stays.

    One rank calls this when all have saved.
    """
    new, best_step = folder / tag_of(info.step), info.validation.best_step
    sizes, parts = {}, {}
    for path in sorted(new.rglob("*")):
        fsync(path)
        if path.is_file():
            name = str(path.relative_to(new))
            sizes[name] = path.stat().st_size
            if path.suffix == ".pt" and zipfile.is_zipfile(path):
                parts[name] = _digest_of_parts(path)
    _write_info(new, info.model_copy(update={"bytes": sizes, "parts": parts}))
    write_atomically(folder / "latest", new.name)
    _point_to_best(folder, best_step)
    there = list_checkpoints(folder)
    kept = {info.step, best_step, *(c.step for c in scheduled_ones(there)[-keep:])}
    for old in there:
        if old.step not in kept and not old.folder.is_symlink():
            (old.folder / "checkpoint.json").unlink()  # first: half-deleted is not finished
    remove_unfinished(folder)


def record_validation(folder: Path, step: int, state: ValidationState, *, asked: bool) -> None:
    """Write what a validation has found into a checkpoint that was saved before it.

    :param asked: whether the validation would have asked for the checkpoint itself.
    """
    checkpoint = Checkpoint(folder / tag_of(step), step)
    scheduled = checkpoint.info.scheduled or asked
    found = {"validation": state, "scheduled": scheduled}
    _write_info(checkpoint.folder, checkpoint.info.model_copy(update=found))
    _point_to_best(folder, state.best_step)


def _write_info(folder: Path, info: CheckpointInfo) -> None:
    write_json(folder / "checkpoint.json", info.model_dump(mode="json"))


def _point_to_best(folder: Path, step: int | None) -> None:
    if step is not None and (folder / tag_of(step) / "checkpoint.json").exists():
        write_atomically(folder / "best", tag_of(step))
    else:
        (folder / "best").unlink(missing_ok=True)


def check_space(recipe: Recipe, parameters: int) -> tuple[int, int]:
    """Check that there is room for the checkpoints that `recipe` will keep.

    :param parameters: how many the model has.
    :returns: the free bytes, and those that all checkpoints together take.
    :raises CheckpointError: the folder cannot be written, or there is not enough room.
    """
    # Weights; for the optimizer a float32 copy of them and two moments; the moving average.
    checkpoint_bytes = (20 if recipe.training.ema_decay else 16) * parameters
    folder = recipe.checkpoints
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from error
    # Besides them the best, and one more: a new one is written before an old one is deleted.
    needed = checkpoint_bytes * (recipe.training.keep_checkpoints + 2)
    there = sum(path.stat().st_size for path in folder.glob(f"{OURS}/*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise CheckpointError(
            f"{folder}: {recipe.training.keep_checkpoints} checkpoints, the best and a new one "
            f"take {needed / GIB:.2f} GiB, and {(free + there) / GIB:.2f} GiB are there; make "
            "room, or lower training.keep_checkpoints"
        )
    return free, needed


def remove_unfinished(folder: Path) -> None:
    """Delete what interrupted saves have left."""
    for path in folder.glob(OURS):
        if path.is_dir() and not path.is_symlink() and not (path / "checkpoint.json").exists():
            shutil.rmtree(path)
    for path in folder.glob(f".{OURS}.universal"):
        shutil.rmtree(path)


def scratch_folder(checkpoint: Checkpoint) -> Path:
    """Return where a checkpoint is taken apart; what a crash leaves there goes with others."""
    return checkpoint.folder.with_name(f".{checkpoint.tag}.universal")


def set_aside_damaged(folder: Path, newest: Checkpoint) -> None:
    """Rename the checkpoints after `newest`: they were found damaged, and would pass for newer."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.step > newest.step:
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            places = (folder / f"damaged-{checkpoint.tag}{suffix}" for suffix in names)
            aside = next(place for place in places if not os.path.lexists(place))
            checkpoint.folder.rename(aside)
            log.warning("set aside as %s", aside)
