"""IDX files, the format of MNIST: a magic number, the dimensions, then the values."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.files import DataError, first_line, write_array_head

UINT8 = 0x08  # IDX has other types; images and labels are of this one
BLOCK = 1 << 20
REMEDY = "get the file again, or name the right one"


def unpack_idx(path: Path, target: Path, dimensions: int, kind: str) -> tuple[int, ...]:
    """Write the values of an IDX file, plain or `.gz`, as a NumPy array.

    :param target: of the array (`.npy`).
    :param dimensions: how many it must have.
    :param kind: what it must hold, for the errors: images or labels.
    :returns: the shape of the array.
    :raises DataError: it is no IDX file of that kind, or is damaged, truncated or too long.
    """
    with _opened(path) as file, target.open("wb") as array:
        shape = _read_head(file, path, dimensions, kind)
        write_array_head(array, np.uint8, shape)
        left = math.prod(shape)
        while left and (block := file.read(min(left, BLOCK))):
            array.write(block)
            left -= len(block)
        if left:
            raise DataError(
                f"{path}: truncated: its head promises {math.prod(shape)} bytes of {kind} "
                f"({' × '.join(map(str, shape))}), {left} are missing; {REMEDY}"
            )
        if file.read(1):
            raise DataError(f"{path}: goes on after its {shape[0]} {kind}; {REMEDY}")
    return shape


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, plain or `.gz`.

    :raises DataError: what is read from it is damaged.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated: {first_line(error)}; {REMEDY}") from error


def _read_head(file: BinaryIO, path: Path, dimensions: int, kind: str) -> tuple[int, ...]:
    """Return the shape that the head of an IDX file promises.

    :raises DataError: it is another one's.
    """
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file (it begins with {magic.hex(' ')!r}); {REMEDY}")
    if magic[2] != UINT8:
        raise DataError(
            f"{path}: its values are of IDX type {magic[2]:#04x}; {kind} must be unsigned bytes "
            f"({UINT8:#04x}); {REMEDY}"
        )
    if magic[3] != dimensions:
        raise DataError(
            f"{path}: has {magic[3]} dimensions, {kind} have {dimensions}; are images and labels "
            "in the right order?"
        )
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path}: truncated in its head; {REMEDY}")
    shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", sizes)
    if 0 in shape:
        raise DataError(f"{path}: holds no {kind} ({' × '.join(map(str, shape))}); {REMEDY}")
    return shape


def load_idx(path: Path) -> NDArray[np.uint8]:
    """Return what `unpack_idx` has written, memory-mapped."""
    return cast("NDArray[np.uint8]", np.load(path, mmap_mode="r"))
