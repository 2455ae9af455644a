"""Files as data preparation and training write them: atomically, JSON, with digests, under a lock.

The error that says what is wrong with them is here too.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

log = logging.getLogger("lock")

# What `flock` says where a file system has no locks: Lustre without `-o flock`, NFS without lockd.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


class DataError(Exception):
    """The data is wrong in some way; the message says what, where, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not blank, or its type if it says nothing.

    Messages of ours are one line, those of libraries that they quote often are not.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    :raises OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def are_whole(folder: Path, digests: Mapping[str, str]) -> bool:
    """Tell whether files of a folder are there with the content that they had.

    :param digests: the sha256 of each, by its name.
    """
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == digest
        for name, digest in digests.items()
    )


def digest_of(value: Any) -> str:
    """Return a SHA-256 of any JSON value, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that others find the old or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # of a full disk, for example, it does not say where
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_array_head(file: BinaryIO, dtype: DTypeLike, shape: Sequence[int]) -> None:
    """Write what a `.npy` file begins with; the numbers come behind it, row by row."""
    write_header: Any = np.lib.format.write_array_header_1_0  # some NumPys have no types for it
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    write_header(file, head)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write what `np.save` would.

    :raises OSError: of a full disk too, which `np.save` does not notice when it writes to a file.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read, with `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock that is the file `path`.

    Where the file system has no locks, a file in this machine's folder for temporary ones is
    locked instead, which keeps out this machine's processes only. The log says so once.

    :param wait: for another process that holds it.
    :raises BlockingIOError: another process holds it, and `wait` is false.
    """
    operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, operation)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _warn_of_no_locks(path.parent, error.strerror)
            with _lock_of_this_machine(path) as descriptor:
                fcntl.flock(descriptor, operation)
                yield
        else:
            yield


@functools.cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    log.warning(
        "%s: the file system there has no locks (%s): take care that no command on another "
        "machine works there at the same time",
        folder,
        reason,
    )


@contextmanager
def _lock_of_this_machine(path: Path) -> Iterator[int]:
    """Open the file that stands for the lock `path` among the processes of this user here."""
    name = f"lock-{os.getuid()}-{digest_of(str(path.absolute()))[:16]}"
    place = Path(tempfile.gettempdir(), name)
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def only_command_in(run_dir: Path, *, make: bool = True) -> Iterator[None]:
    """Keep other commands from writing to `run_dir`.

    :param make: make it if need be; otherwise one that is not there, or cannot be written to, needs
        no lock.
    :raises DataError: another command is writing to it, or it cannot be made.
    """
    if make:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{run_dir}: there can be no such folder ({error.strerror}); choose another run_dir"
            ) from error
    elif not os.access(run_dir, os.W_OK):
        yield
        return
    with alone(run_dir / ".lock", f"{run_dir}: another command is at work here", "run_dir"):
        yield


@contextmanager
def alone(lock: Path, problem: str, another: str) -> Iterator[None]:
    """Hold a lock that nobody else may hold.

    :param problem: what it means that another process does.
    :param another: what to choose instead.
    :raises DataError: another process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError as error:
            raise DataError(
                f"{problem}; wait for it, stop it, or choose another {another}"
            ) from error
        yield


def fsync(path: Path) -> None:
    """Return when the disk has the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
