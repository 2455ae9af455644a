"""Arrow IPC files, memory-mapped: rows of any kind, and what shards of any kind have in common."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa
from pydantic import ValidationError

from data_prep.files import DataError, digest_of, first_line, sha256_of
from data_prep.section import fault_of
from data_prep.stage import Record, read_manifest

RecordT = TypeVar("RecordT", bound=Record)

REMEDY = "without that file, `./run.sh prepare` makes it again"


def write_rows(path: Path, rows: pa.RecordBatch) -> None:
    """Write a record batch. Equal rows give equal bytes."""
    if not len(rows):  # Arrow would write all values that an empty slice was cut from
        rows = pa.RecordBatch.from_pylist([], schema=rows.schema)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_batch(rows)


def open_rows(path: Path) -> pa.RecordBatch:
    """Return the rows of a file, memory-mapped.

    :raises OSError, pa.ArrowInvalid: it is missing or damaged.
    """
    with pa.memory_map(str(path)) as file:  # the map outlives it: open files hold no descriptors
        return pa.ipc.open_file(file).get_batch(0)


# ── Shards ──────────────────────────────────────────────────────────────────────────────────────


class Shard(Protocol):
    """What a manifest says of a file."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...


def read_manifest_of(folder: Path, record: type[RecordT]) -> RecordT:
    """Read the manifest of shards of any kind.

    :raises DataError: the folder is not a finished data set, or its manifest lacks something.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: no prepared data here; run `./run.sh prepare` first")
    try:
        return record.model_validate(manifest)
    except ValidationError as error:
        raise DataError(
            f"{folder / 'manifest.json'}: key {fault_of(error)}; remove {folder} and run "
            "`./run.sh prepare`"
        ) from error


def validation_digest(folder: Path) -> str:
    """Return a digest of the examples of the validation set, as shards of any kind hold them.

    :param folder: of the shards; without any the digest is of nothing.
    """
    shards = (read_manifest(folder) or {}).get("shards", [])
    return digest_of([shard["sha256"] for shard in shards if shard["split"] == "valid"])


def check_shards(folder: Path, shards: Iterable[Shard]) -> None:
    """Compare shards with their checksums.

    :raises DataError: one is missing or has changed.
    """
    checksums = {folder / shard.name: shard.sha256 for shard in shards}
    try:
        with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
            digests = pool.map(sha256_of, checksums)
            for (path, wanted), digest in zip(checksums.items(), digests, strict=True):
                if digest != wanted:
                    raise DataError(f"{path}: checksum is not the manifest's; {REMEDY}")
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read the shard; {REMEDY}") from error


def open_whole(path: Path, examples: int, what: str) -> pa.RecordBatch:
    """Open a shard of any kind, and count what is in it.

    :param examples: how many the manifest says there are.
    :param what: they are called.
    :raises DataError: it is missing or damaged, or has another number.
    """
    try:
        found = open_rows(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = first_line(error)
        raise DataError(f"{path}: damaged or missing shard: {reason}; {REMEDY}") from error
    if len(found) != examples:
        raise DataError(f"{path}: {len(found)} {what}, the manifest says {examples}; {REMEDY}")
    return found
