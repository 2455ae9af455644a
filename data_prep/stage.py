"""What every stage of data preparation has in common.

A stage reads finished folders, writes a new one, and is safe to rerun: it works in a temporary
folder that is renamed when complete, and its `manifest.json` says what it was made from. The same
inputs are not worked through twice, and a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_prep.files import DataError, digest_of, fsync, read_json, sha256_of, write_json

log = logging.getLogger("prepare")

# The folders of a run that the stages make.
FETCH = "fetch"
SYNTHETIC = "synthetic"  # a folder for each corpus
CLEAN = "clean"
VOCABULARY = "vocabulary"
SHARDS = "shards"

# Notes that are kept in the folder of a finished stage. They go with it.
FINGERPRINTS = ".fingerprints.json"
PREPARED_FROM = "prepared_from.json"
NOTES = {FINGERPRINTS, PREPARED_FROM}

Manifest = dict[str, Any]
"""`manifest.json` as it is on disk: `stage`, `inputs`, what the stage recorded, `bytes` of each
file, and `sealed`: digests of those whose content counts."""

DIGEST = "manifest_sha256"  # key of a manifest: the digest of all its others


class Record(BaseModel):
    """A record is a typed view of what a stage recorded; it ignores keys of no use to it."""

    model_config = ConfigDict(frozen=True)


def run_stage(
    folder: Path,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    log: logging.Logger = log,
    *,
    stage: str | None = None,
    sealed: Sequence[str] = (),
) -> Manifest:
    """Make `folder` by calling `build(temporary folder)`, unless it was made from equal `inputs`.

    Only what the same stage has made is ever replaced, and only while nothing was added to it, or
    changed in what is sealed.

    :param inputs: everything the result depends on (JSON values).
    :param build: writes files and returns what to record about them in the manifest. The temporary
        folder may hold files that an interrupted call made from equal inputs; files and folders
        whose names begin with `scratch` do not become part of the result.
    :param log: logger of the command that calls this.
    :param stage: what makes the folder, where its name does not say so.
    :param sealed: patterns of files whose content is compared with what was written, and not their
        size alone: those that decide on a score, or that people may have changed.
    :returns: the manifest: `inputs`, `stage`, what `build` returned, and `bytes` of each file.
    :raises DataError: the folder holds something else, or the disk is full.
    :raises OSError: the folder cannot be written. What was there before is intact.
    """
    name = folder.absolute().name
    stage = stage or name
    folder = folder.resolve()  # a link stays one: what it points to is replaced
    inputs = json.loads(json.dumps(inputs))
    previous = _previous_result(folder, stage)
    check_sealed(folder)
    reason = _reason_to_run(folder, previous, inputs)
    old = _replaced(folder)  # is there if a crash came while it was deleted
    if (replaced := read_manifest(old)) is not None and replaced.get("stage") == stage:
        _delete_result(old, replaced)
    if previous is not None and reason is None:
        log.info("%s: up to date, reused (%s)", name, folder)
        return previous
    _refuse_to_delete(folder, previous)
    started = time.monotonic()
    try:
        partial, continued = _working_folder(folder, inputs)
        log.info("%s: %s", name, "continued" if continued else reason)
        if read_manifest(partial) is None:
            _finish(partial, {"stage": stage, "inputs": inputs, **build(partial)}, sealed)
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
    check_sealed(folder)  # building took its time
    _refuse_to_delete(folder, previous)
    if previous is not None:
        folder.rename(old)
    partial.rename(folder)
    fsync(folder.parent)
    if previous is not None:
        _delete_result(old, previous)
    log.info("%s: done in %.1f s", name, time.monotonic() - started)
    return manifest


def _finish(partial: Path, made: Mapping[str, Any], sealed: Sequence[str]) -> None:
    """Bring all that was built to the disk, and then the manifest, with which it is finished."""
    for path in partial.rglob(".*.partial"):  # a killed `write_atomically` left it
        if path.is_file():
            path.unlink()
    for file in partial.rglob("*"):
        if not file.relative_to(partial).parts[0].startswith("scratch"):
            fsync(file)
    names = (path for pattern in sealed for path in partial.glob(pattern))
    files = sorted(path for path in names if path.is_file() and not path.name.startswith("."))
    digests = {str(path.relative_to(partial)): sha256_of(path) for path in files}
    content = {**made, "bytes": _file_sizes(partial), **({"sealed": digests} if sealed else {})}
    digest = digest_of(json.loads(json.dumps(content)))
    write_json(partial / "manifest.json", {**content, DIGEST: digest})


def begun(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return where an interrupted call of `run_stage` was building `folder`, and from which inputs;
    from none if there was no such call."""
    partial = _partial(folder.resolve())
    return partial, read_json(partial / ".inputs.json")


def is_up_to_date(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Tell whether `run_stage` would have nothing to do."""
    previous = read_manifest(folder)
    wanted = json.loads(json.dumps(inputs))
    return previous is not None and _reason_to_run(folder, previous, wanted) is None


def _working_folder(folder: Path, inputs: Any) -> tuple[Path, bool]:
    """Return where to build `folder`, and whether building was begun there with equal inputs.

    The place is empty if it was not.

    :raises DataError: another program's files are there.
    """
    partial = _partial(folder)
    note = partial / ".inputs.json"
    finished = read_manifest(partial)
    if os.path.lexists(partial) and not note.is_file() and finished is None:
        _refuse_other_files(partial)
    found = read_json(note) if note.is_file() else (finished or {}).get("inputs")
    if found != inputs:
        partial.mkdir(parents=True, exist_ok=True)
        write_json(note, None)  # ours still, whenever a crash comes, but of no inputs
        for path in partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != note:
                path.unlink()
        write_json(note, inputs)
    return partial, found == inputs


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a finished stage; None if there is none or it cannot be read."""
    manifest = read_json(folder / "manifest.json")
    parts = (manifest.get("inputs"), manifest.get("bytes"), manifest.get("sealed", {}))
    if not all(isinstance(part, dict) for part in parts):
        return None
    return manifest if all(type(size) is int for size in manifest["bytes"].values()) else None


def check_sealed(folder: Path) -> None:
    """Compare the sealed files of a finished stage with what was written, as far as they are there.

    :raises DataError: one was changed.
    """
    for name, digest in (read_manifest(folder) or {}).get("sealed", {}).items():
        if (folder / name).is_file() and sha256_of(folder / name) != digest:
            raise DataError(
                f"{folder / name} is not as it was written: it was edited, or is damaged. Move it "
                f"away; the command that makes {folder} then makes it anew"
            )


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
    content = {key: value for key, value in previous.items() if key != DIGEST}
    if DIGEST in previous and digest_of(content) != previous[DIGEST]:
        lost.append("manifest.json")
    return f"done again: {', '.join(lost)} missing or damaged" if lost else None


# ── What may be replaced ────────────────────────────────────────────────────────────────────────


def _previous_result(folder: Path, stage: str) -> Manifest | None:
    """Return the manifest of what `stage` has made; None if there is nothing.

    :raises DataError: there is something else.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if os.path.lexists(folder):
            _refuse_other_files(folder)
        return None
    made_by = manifest.get("stage", folder.name)  # manifests did not always say it
    if made_by != stage:
        raise DataError(
            f"{folder} holds files that this command did not make ({made_by}); name another folder"
        )
    return manifest


def _refuse_other_files(folder: Path) -> None:
    """Check that a folder without a manifest is empty.

    :raises DataError: it is not, or is a file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; move it away, or name another folder")
    if any(folder.iterdir()):
        raise DataError(
            f"{folder} holds files that this command did not make; move them away, or name "
            "another folder"
        )


def _refuse_to_delete(folder: Path, manifest: Manifest | None) -> None:
    """Check that a result can be replaced and nothing of others goes with it.

    :param manifest: of the result; None if there is none.
    :raises DataError: something was added to it, or is where it is put aside.
    """
    if os.path.lexists(old := _replaced(folder)):
        _refuse_other_files(old)
    ours = {"manifest.json", *NOTES, *(manifest["bytes"] if manifest else ())}
    added = sorted(_files(folder) - ours)
    if added:
        more = f" and {len(added) - 1} more" if len(added) > 1 else ""
        raise DataError(
            f"{folder} must be made anew, and holds files that this command did not make: "
            f"{added[0]}{more}; move them away, or name another folder"
        )


def _files(folder: Path) -> set[str]:
    """Return the paths below `folder` of all that is not a folder."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in paths}


def _delete_result(folder: Path, manifest: Manifest) -> None:
    """Delete the files that `manifest` names, itself last: until then a crash leaves a result."""
    for name in _files(folder) & (manifest["bytes"].keys() | NOTES):
        (folder / name).unlink()
    (folder / "manifest.json").unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):  # a file of someone else
            path.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _partial(folder: Path) -> Path:
    """Return where a result is built."""
    return folder.with_name(f".{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    """Return where the old result waits while the new one takes its name."""
    return folder.with_name(f".{folder.name}.old")
