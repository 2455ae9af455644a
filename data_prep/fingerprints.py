"""What the input files are, without reading those again that have not changed."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.config import Preparation
from data_prep.files import DataError, digest_of, read_json, sha256_of, write_json
from data_prep.stage import FINGERPRINTS, Record

log = logging.getLogger("prepare")

DEPTH = 2  # how far down files are looked for: a folder has folders, and they have files
NO_FILE = ""  # the sha256 of a folder, of a link to nowhere, of what cannot be read


class Fingerprint(Record):
    """A fingerprint says what a file below `data.root` was when it was last read."""

    bytes: int
    ctime_ns: int
    """When it was last written, or its time was set: nobody can set this one."""

    inode: int
    sha256: str


def fingerprints(config: Preparation, folder: Path) -> dict[str, Fingerprint]:
    """Return what the input files are that lie below `data.root`, by their paths; where the recipe
    names a folder, what everything in it and in its folders is.

    A file that the fetch stage has seen is not read again. Its modification time would not tell
    that it is that one: those in an archive or a container can all have the same.

    :param folder: of the fetch stage.
    :raises DataError: the name of a file in a folder is not UTF-8.
    :raises OSError: a file that the recipe names cannot be read.
    """
    known = read_json(folder / FINGERPRINTS)
    named = [path for path in config.inputs if (config.root / path).is_file()]
    folders = [path for path in config.inputs if (config.root / path).is_dir()]
    inside = sorted({path for each in folders for path in _entries(config.root, each)})

    def look(path: str) -> Fingerprint:
        return fingerprint_of(config.root / path, known.get(path, {}))

    def look_inside(path: str) -> Fingerprint:
        with suppress(OSError):
            if stat.S_ISREG((config.root / path).stat().st_mode):  # a pipe could be read for ever
                return look(path)
        return Fingerprint(bytes=0, ctime_ns=0, inode=0, sha256=NO_FILE)

    with ThreadPoolExecutor() as threads:
        found = dict(zip(named, threads.map(look, named), strict=True))
        for each in config.downloads:
            path = each.provides[0]
            if not each.members and path in found and found[path].sha256 != each.sha256:
                log.warning("%s is used, and is not the file of the recipe's download", path)
        return found | dict(zip(inside, threads.map(look_inside, inside), strict=True))


def fingerprint_of(path: Path, known: Mapping[str, Any]) -> Fingerprint:
    """Return what a file is. It is not read if it is the one that is known.

    :param known: its fingerprint, as JSON values; empty: none.
    :raises OSError: it cannot be read.
    """
    status = path.stat()
    seen = {"bytes": status.st_size, "ctime_ns": status.st_ctime_ns, "inode": status.st_ino}
    if known.items() >= seen.items():
        return Fingerprint.model_validate(known)
    return Fingerprint(**seen, sha256=sha256_of(path))


def was_changed(path: Path, made: bool = False) -> DataError:
    """Return what to say of a file that is another than its fingerprint says.

    :param made: a stage of data preparation has made it.
    """
    if made:
        return DataError(f"{path} is not as it was made; remove it, and it is made anew")
    return DataError(f"{path} was changed while it was prepared; run the same command again")


def keep(found: Mapping[str, Fingerprint], folder: Path) -> None:
    """Keep fingerprints for the next command, if the folder of the fetch stage can be written."""
    content = {path: file.model_dump() for path, file in found.items()}
    if read_json(folder / FINGERPRINTS) != content:
        with suppress(OSError):
            write_json(folder / FINGERPRINTS, content)


def digests(config: Preparation, found: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Return a checksum of every input that is at hand: the sha256 of a file, and for a folder a
    digest of what is in it.

    :param found: what `fingerprints` has returned.
    """
    result = {path: found[path].sha256 for path in config.inputs if path in found}
    for folder in config.inputs:
        if inside := {path: file.sha256 for path, file in entries_of(folder, found)}:
            result[folder] = digest_of({path.removeprefix(folder): inside[path] for path in inside})
    return result


def entries_of(folder: str, found: Mapping[str, Fingerprint]) -> Iterator[tuple[str, Fingerprint]]:
    """Yield what `fingerprints` has found in a folder that the recipe names, in order; but not what
    is further down, in a folder there that the recipe names, too."""
    for path, file in found.items():
        if path.startswith(f"{folder}/") and path.count("/", len(folder)) <= DEPTH:
            yield path, file


def _entries(root: Path, folder: str) -> Iterator[str]:
    """Yield the paths below `root` of what is in a folder, and for a folder there of what is in it.

    :raises DataError: a name is not UTF-8.
    """
    for path in (root / folder).iterdir():
        inside = [*path.iterdir()] if path.is_dir() else []
        for each in inside or [path]:
            name = f"{folder}/{each.relative_to(root / folder)}"
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{os.fsencode(each)!r}: the name of this file is not UTF-8; rename it"
                ) from error
            yield name
