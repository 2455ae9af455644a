"""Reading an image of any kind, and making of it what is stored: bytes [channels, size, size].

What an image is turned into is counted by what it was. What cannot be read is refused by name, with
the reason; nothing that is in a file ends the stage.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from data_prep.files import first_line, save_array
from data_prep.images.config import ImagesConfig
from data_prep.images.idx import load_idx
from data_prep.shards import open_shard

FORMATS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}  # and how such files begin
DIGEST_BYTES = 16
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image that EXIF says is stored with that orientation."""


class Refused(Exception):
    """An image is left out, for a reason that is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


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
    read: Callable[[], tuple[Image.Image, list[str]]]
    """Read it: the image, and what it was if not as images are stored.

    :raises Refused: it cannot be read."""


def convert_piece(config: ImagesConfig, raw: Path, piece: Piece, folder: Path) -> dict[str, Any]:
    """Write the images of a piece to `images.npy` `[images, C, S, S]`; the numbers of their classes
    to `labels.npy`, digests of their pixels to `digests.npy`, their rows in the set to `rows.npy`.

    :param raw: folder of the fetch stage.
    :returns: names, reasons and details of what was refused, and counts of what was converted.
    """
    images, labels, digests, rows = [], [], [], []
    refused: list[tuple[str, str, str]] = []
    converted: Counter[str] = Counter()
    for row, candidate in enumerate(_candidates(config, raw, piece), start=piece.begin):
        try:
            pixels, kinds = _stored(config, *candidate.read())
        except Refused as error:
            refused.append((candidate.name, error.reason, error.detail))
            continue
        converted.update(kinds)
        images.append(pixels)
        labels.append(candidate.label)
        digests.append(hashlib.blake2b(pixels.tobytes(), digest_size=DIGEST_BYTES).digest())
        rows.append(row)
    shape = (len(images), config.channels, config.stored, config.stored)
    save_array(folder / "images.npy", np.array(images, np.uint8).reshape(shape))
    save_array(folder / "labels.npy", np.array(labels, np.uint16))
    save_array(folder / "digests.npy", np.array(digests, f"S{DIGEST_BYTES}"))
    save_array(folder / "rows.npy", np.array(rows, np.int64))
    return {"kept": len(images), "refused": refused, "converted": dict(converted)}


def _candidates(config: ImagesConfig, raw: Path, piece: Piece) -> Iterator[Candidate]:
    """Yield what is in a piece."""
    place = raw / f"{piece.set:05d}"
    (_, images) = list(config.sets())[piece.set]
    if images.folder is None:
        pixels, labels = load_idx(place / "images.npy"), load_idx(place / "labels.npy")
        for row in range(piece.begin, piece.end):
            read = bind(_from_array, pixels[row])
            yield Candidate(f"{images.images}#{row}", int(labels[row]), read)
    else:
        files = open_shard(place / "files.arrow").slice(piece.begin, piece.end - piece.begin)
        for path, label, reason in zip(*(column.to_pylist() for column in files), strict=True):
            read = bind(read_image, config.root / path, config.max_pixels, reason)
            yield Candidate(path, label, read)


def _from_array(pixels: NDArray[np.uint8]) -> tuple[Image.Image, list[str]]:
    return Image.fromarray(np.array(pixels)), []


def read_image(path: Path, max_pixels: int, refused: str = "") -> tuple[Image.Image, list[str]]:
    """Read a file as a grey (`L`) or RGB image, upright, on white where it is transparent.

    :param refused: why not even to try, if there is a reason.
    :returns: the image, and what it was if neither grey nor RGB of 8 bits.
    :raises Refused: it is not an image, damaged, or has more than `max_pixels`.
    """
    if refused:
        raise Refused(refused)
    try:
        _check_file(path)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with Image.open(path, formats=list(FORMATS)) as image:
                if image.width * image.height > max_pixels:
                    raise Refused("more than data.max_pixels", f"{image.width} × {image.height}")
                kinds = _kinds(image)
                image.load()
                upright = _upright(image, kinds)
                flat = _on_white(_eight_bits(upright))
        return flat, [*kinds, *(["warned of by Pillow"] if warned else [])]
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("more than data.max_pixels", first_line(error)) from error
    except Exception as error:  # of any type: Pillow's own, struct's, zlib's, …
        if isinstance(error, OSError) and error.errno is not None:
            raise Refused("cannot be read", error.strerror or "") from error
        raise Refused("damaged or truncated", first_line(error)) from error


def _check_file(path: Path) -> None:
    """Look at the beginning of a file.

    :raises Refused: it cannot be an image.
    """
    if not path.exists():
        raise Refused("link to nowhere" if path.is_symlink() else "gone")
    if not path.is_file():
        raise Refused("not a file")
    with path.open("rb") as file:
        head = file.read(max(map(len, FORMATS.values())))
    if not head:
        raise Refused("empty")
    if not any(head.startswith(magic) for magic in FORMATS.values()):
        raise Refused("neither JPEG nor PNG")


def _kinds(image: Image.Image) -> list[str]:
    """Return in what an image that was not loaded yet is unlike a grey or RGB one of 8 bits."""
    kinds = []
    if getattr(image, "n_frames", 1) > 1:
        kinds.append("several frames (the first is taken)")
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])):
        kinds.append("16-bit")
    if image.mode in ("1", "P", "PA"):
        kinds.append("1-bit" if image.mode == "1" else "palette")
    elif image.mode not in ("L", "LA", "RGB", "RGBA") and not image.mode.startswith("I"):
        kinds.append(image.mode)
    if image.has_transparency_data:
        kinds.append("transparent (put on white)")
    return kinds


def _upright(image: Image.Image, kinds: list[str]) -> Image.Image:
    """Return an image as EXIF says that it should be seen."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of any type: the pixels are good all the same
        kinds.append("unreadable EXIF")
        return image
    if turn is None:
        return image
    kinds.append("turned by EXIF")
    return image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits with the upper 8, which Pillow itself takes of 16-bit RGB."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency, as grey or RGB."""
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _stored(
    config: ImagesConfig, image: Image.Image, kinds: list[str]
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return an image `[C, S, S]` as it is stored, and what it was.

    :raises Refused: it has another size, and such are not wanted.
    """
    mode = "L" if config.channels == 1 else "RGB"
    if image.mode != mode:
        kinds = [*kinds, "grey" if image.mode == "L" else "colour"]
        image = image.convert(mode)
    size = (config.stored, config.stored)
    if image.size != size:
        if config.wrong_size == "refuse":
            raise Refused("wrong size", f"{image.width} × {image.height}")
        kinds = [*kinds, "resized"]
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(*size, config.channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), kinds
