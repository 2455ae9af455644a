"""Images of any kind become what is stored, piece by piece.

What an image is turned into is counted by what it was. What cannot be read is refused by name, with
the reason; nothing that is in a file ends the stage.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.arrow import open_rows
from data_prep.files import DataError, first_line, save_array, sha256_of, write_json
from data_prep.fingerprints import NO_FILE, was_changed
from data_prep.images.config import ImagesConfig
from data_prep.images.idx import load_idx
from data_prep.images.read import Refused, as_stored, read_image

DIGEST_BYTES = 16
NAMES = "names.json"


class Piece(NamedTuple):
    """A slice of a set of images, which one worker takes at once."""

    set: int
    """Index of the set, and so of its folder in that of the fetch stage."""

    begin: int
    end: int


class Candidate(NamedTuple):
    """What may be an image of a class."""

    name: str
    """Path below `data.root`; in an IDX file `PATH#ROW`."""

    label: int
    source: bytes
    """A digest of what it is made from, however it will be stored."""

    read: Callable[[], tuple[Image.Image, list[str]]]
    """Read it: the image, and what it was if not as images are stored.

    :raises Refused: it cannot be read.
    :raises DataError: it is another than was found."""


def convert_piece(config: ImagesConfig, raw: Path, piece: Piece, folder: Path) -> dict[str, Any]:
    """Write the images of a piece to `images.npy` `[images, C, S, S]`; the numbers of their classes
    to `labels.npy`, digests of their pixels to `digests.npy` and of their sources to `sources.npy`,
    and their names to `names.json`.

    :param raw: folder of the fetch stage.
    :returns: names, reasons and details of what was refused, and counts of what was converted.
    :raises DataError: an image cannot be read now, but perhaps another time.
    """
    images, labels, digests, sources, names = [], [], [], [], []
    refused: list[tuple[str, str, str]] = []
    converted: Counter[str] = Counter()
    for candidate in _candidates(config, raw, piece):
        try:
            image, kinds = candidate.read()
            resize = config.wrong_size == "resize"
            pixels, more = as_stored(image, config.channels, config.stored, resize=resize)
        except Refused as error:
            refused.append((candidate.name, error.reason, error.detail))
            continue
        except (OSError, MemoryError) as error:
            raise DataError(
                f"{candidate.name}: cannot be read now ({first_line(error)}). Run the same command "
                "again, with fewer data.workers if memory is short; if that is always so, lower "
                "data.max_pixels or take the file away"
            ) from error
        converted.update([*kinds, *more])
        images.append(pixels)
        labels.append(candidate.label)
        digests.append(_digest(pixels.tobytes()))
        sources.append(candidate.source)
        names.append(candidate.name)
    shape = (len(images), config.channels, config.stored, config.stored)
    save_array(folder / "images.npy", np.array(images, np.uint8).reshape(shape))
    save_array(folder / "labels.npy", np.array(labels, np.uint16))
    save_array(folder / "digests.npy", np.array(digests, f"S{DIGEST_BYTES}"))
    save_array(folder / "sources.npy", np.array(sources, f"S{DIGEST_BYTES}"))
    write_json(folder / NAMES, names)
    return {"kept": len(images), "refused": refused, "converted": dict(converted)}


def _candidates(config: ImagesConfig, raw: Path, piece: Piece) -> Iterator[Candidate]:
    """Yield what is in a piece."""
    place = raw / f"{piece.set:05d}"
    (_, images) = list(config.sets())[piece.set]
    if images.folder is None:
        pixels, labels = load_idx(place / "images.npy"), load_idx(place / "labels.npy")
        for row in range(piece.begin, piece.end):
            read, source = bind(_from_array, pixels[row]), _digest(pixels[row].tobytes())
            yield Candidate(f"{images.images}#{row}", int(labels[row]), source, read)
    else:
        files = open_rows(place / "files.arrow").slice(piece.begin, piece.end - piece.begin)
        columns = (column.to_pylist() for column in files)
        for path, label, reason, sha256 in zip(*columns, strict=True):
            read = bind(_read_file, config.root / path, config.max_pixels, reason, sha256)
            yield Candidate(path, label, _digest(sha256.encode()), read)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _read_file(
    path: Path, max_pixels: int, refused: str, sha256: str
) -> tuple[Image.Image, list[str]]:
    """Read an image, unless there is a reason not to.

    :param sha256: of the file that was found.
    :raises Refused: there is, or it cannot be read.
    :raises DataError: it is another by now.
    """
    if refused:
        raise Refused(refused)
    same = sha256 == NO_FILE or (path.is_file() and sha256_of(path) == sha256)
    found = read_image(path, max_pixels) if same else None
    if found is None or sha256 == NO_FILE:  # what was no file, or could not be read, now can be
        raise was_changed(path)
    return found


def _from_array(pixels: NDArray[np.uint8]) -> tuple[Image.Image, list[str]]:
    return Image.fromarray(np.array(pixels)), []
