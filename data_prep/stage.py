"""What every stage of data preparation has in common.

A stage reads finished folders, writes a new one, and is safe to rerun: it works in a temporary
folder that is renamed when complete, and its `manifest.json` says what it was made from. The same
inputs are not worked through twice, and a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.files import DataError, fsync, read_json, write_json

log = logging.getLogger("prepare")

# The folders of a run that the stages make.
FETCH = "fetch"
CLEAN = "clean"
VOCABULARY = "vocabulary"
SHARDS = "shards"

Manifest = dict[str, Any]
"""`manifest.json` as it is on disk: `inputs`, what the stage recorded, and `bytes`."""


class Record(BaseModel):
    """A record is a typed view of what a stage recorded; it ignores keys of no use to it."""

    model_config = ConfigDict(frozen=True)


def run_stage(
    folder: Path,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    log: logging.Logger = log,
) -> Manifest:
    """Make `folder` by calling `build(temporary folder)`, unless it was made from equal `inputs`.

    :param inputs: everything the result depends on (JSON values).
    :param build: writes files and returns what to record about them in the manifest. The temporary
        folder may hold files that an interrupted call made from equal inputs; files and folders
        whose names begin with `scratch` do not become part of the result.
    :param log: logger of the command that calls this.
    :returns: the manifest: `inputs`, what `build` returned, and `bytes` of each file.
    :raises DataError: the folder holds something else, or the disk is full.
    :raises OSError: the folder cannot be written. What was there before is intact.
    """
    folder = folder.absolute()
    inputs = json.loads(json.dumps(inputs))
    previous = read_manifest(folder)
    if previous is None and folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} holds files that this command did not make; name another folder")
    reason = _reason_to_run(folder, previous, inputs)
    shutil.rmtree(_replaced(folder), ignore_errors=True)
    if previous is not None and reason is None:
        log.info("%s: up to date, reused (%s)", folder.name, folder)
        return previous
    started = time.monotonic()
    try:
        partial, continued = _working_folder(folder, inputs)
        log.info("%s: %s", folder.name, "continued" if continued else reason)
        if read_manifest(partial) is None:
            made = build(partial)
            for file in partial.rglob("*"):
                if not file.relative_to(partial).parts[0].startswith("scratch"):
                    fsync(file)
            write_json(
                partial / "manifest.json", {"inputs": inputs, **made, "bytes": _file_sizes(partial)}
            )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{folder}: no space left on the disk; free some and run the same command again to "
            "continue with what is finished"
        ) from error
    manifest = read_manifest(partial)
    assert manifest is not None
    for scratch in partial.glob("scratch*"):
        shutil.rmtree(scratch)
    (partial / ".inputs.json").unlink(missing_ok=True)
    _replace_folder(partial, folder)
    log.info("%s: done in %.1f s", folder.name, time.monotonic() - started)
    return manifest


def is_up_to_date(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Tell whether `run_stage` would have nothing to do."""
    previous = read_manifest(folder)
    wanted = json.loads(json.dumps(inputs))
    return previous is not None and _reason_to_run(folder, previous, wanted) is None


def _working_folder(folder: Path, inputs: Any) -> tuple[Path, bool]:
    """Return where to build `folder`, and whether building was begun there with equal inputs.

    The place is empty if it was not.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    begun = partial / ".inputs.json"
    try:
        resumed = json.loads(begun.read_text(encoding="utf-8")) == inputs
    except (OSError, ValueError):
        resumed = (read_manifest(partial) or {}).get("inputs") == inputs
    if not resumed:
        for mark in (begun, partial / "manifest.json"):  # first, for they vouch for the other files
            mark.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(begun, inputs)
    return partial, resumed


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a finished stage; None if there is none or it cannot be read."""
    manifest = read_json(folder / "manifest.json")
    return manifest if {"inputs", "bytes"} <= manifest.keys() else None


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of the result."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file())
    names = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {name: size for name, size in names.items() if not name.startswith("scratch")}


def _reason_to_run(
    folder: Path, previous: Manifest | None, inputs: Mapping[str, Any]
) -> str | None:
    """Return why a stage must run; None if it need not."""
    if previous is None:
        return "started"
    old = previous["inputs"]
    changed = sorted(key for key in inputs.keys() | old.keys() if inputs.get(key) != old.get(key))
    if changed:
        return f"done again: {', '.join(changed)} changed"
    there = _file_sizes(folder)
    lost = sorted(name for name, size in previous["bytes"].items() if there.get(name) != size)
    return f"done again: {', '.join(lost)} missing or damaged" if lost else None


def _replaced(folder: Path) -> Path:
    """Return where the old result waits while the new one takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _replace_folder(new: Path, folder: Path) -> None:
    old = _replaced(folder)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
