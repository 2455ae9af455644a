"""Reading an image of any kind, and making of it what is stored: bytes [channels, size, size].

What cannot be read is refused with the reason, whatever is in a file. This module travels with a
registered model.
"""

from __future__ import annotations

import errno
import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from data_prep.files import first_line

FORMATS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}  # and how such files begin
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


LASTING = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""Errors of a file that will not go by themselves."""


class Refused(Exception):
    """An image is left out, for a reason that is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_image(source: Path | bytes, max_pixels: int) -> tuple[Image.Image, list[str]]:
    """Read a grey (`L`) or RGB image, upright, on white where it is transparent.

    :param source: a JPEG or PNG file, or the content of one.
    :returns: the image, and what it was if neither grey nor RGB of 8 bits.
    :raises Refused: it is not an image, damaged, or has more than `max_pixels`.
    :raises OSError: it cannot be read now.
    :raises MemoryError: it does not fit into what memory there is now.
    """
    try:
        _check_head(source if isinstance(source, bytes) else _head_of(source))
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with Image.open(file, formats=list(FORMATS)) as image:
                if image.width * image.height > max_pixels:
                    raise Refused("too many pixels", f"{image.width} × {image.height}")
                kinds = _kinds(image)
                _scale_transparent_colour(image)
                image.load()
                upright = _upright(image, kinds)
                flat = _on_white(_eight_bits(upright))
        return flat, [*kinds, *(["warned of by Pillow"] if warned else [])]
    except (Refused, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels", first_line(error)) from error
    except Exception as error:  # of any type: Pillow's own, struct's, zlib's, …
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno not in LASTING:
                raise
            raise Refused("cannot be read", error.strerror or "") from error
        raise Refused("damaged or truncated", first_line(error)) from error


def _head_of(path: Path) -> bytes:
    """Return the beginning of a file.

    :raises Refused: there is none.
    """
    if not path.exists():
        raise Refused("link to nowhere" if path.is_symlink() else "not there")
    if not path.is_file():
        raise Refused("not a file")
    with path.open("rb") as file:
        return file.read(max(map(len, FORMATS.values())))


def _check_head(head: bytes) -> None:
    """Look at the beginning of what may be an image.

    :raises Refused: it cannot be one.
    """
    if not head:
        raise Refused("empty")
    if not any(head.startswith(magic) for magic in FORMATS.values()):
        raise Refused("neither JPEG nor PNG")


def _kinds(image: Image.Image) -> list[str]:
    """Return in what an image that was not loaded yet is unlike a grey or RGB one of 8 bits."""
    kinds = []
    if getattr(image, "n_frames", 1) > 1:
        kinds.append("several frames (the first is taken)")
    if ";16" in _layout(image):
        kinds.append("16-bit")
    if image.mode in ("1", "P", "PA"):
        kinds.append("1-bit" if image.mode == "1" else "palette")
    elif image.mode not in ("L", "LA", "RGB", "RGBA") and not image.mode.startswith("I"):
        kinds.append(image.mode)
    if image.has_transparency_data:
        kinds.append("transparent (put on white)")
    return kinds


def _layout(image: Image.Image) -> str:
    """Return how the pixels of an image that was not loaded yet lie in the file, as Pillow calls
    it: `L;4` is grey of 4 bits."""
    tiles = getattr(image, "tile", [])
    return str(tiles[0][3]) if tiles else ""


def _scale_transparent_colour(image: Image.Image) -> None:
    """Bring the colour that stands for transparency in an image that was not loaded yet to 8 bits,
    where its pixels will be; Pillow leaves it as it is in the file.

    :raises Refused: it is one of 16-bit RGB, whose lower bits Pillow does not tell.
    """
    layout, colour = _layout(image), image.info.get("transparency")
    if isinstance(colour, int) and layout in ("L;2", "L;4"):
        image.info["transparency"] = colour * 255 // (2 ** int(layout[-1]) - 1)
    elif isinstance(colour, tuple) and ";16" in layout:
        raise Refused("16-bit RGB with a transparent colour")


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
    values = np.asarray(image).clip(0, 0xFFFF)
    grey = (values >> 8).astype(np.uint8)
    if not image.has_transparency_data:
        return Image.fromarray(grey)
    opaque = values != image.info["transparency"]
    return Image.fromarray(np.stack([grey, opaque * np.uint8(255)], axis=2), "LA")


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image without transparency, as grey or RGB."""
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def as_stored(
    image: Image.Image, channels: int, size: int, *, resize: bool = True
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return an image as shards hold it, `[C, size, size]`, and what it was.

    :param resize: scale it until its shorter side fits, and cut out the centre.
    :raises Refused: it has another size, and `resize` is false.
    """
    mode, kinds = "L" if channels == 1 else "RGB", []
    if image.mode != mode:
        kinds.append("grey" if image.mode == "L" else "colour")
        image = image.convert(mode)
    if image.size != (size, size):
        if not resize:
            raise Refused("wrong size", f"{image.width} × {image.height}")
        kinds.append("resized")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(size, size, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), kinds
