"""Image files of every kind become what they show; what is none is refused by name."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.files import DataError
from data_prep.images.shards import ImageReader, ImagesManifest, SetInfo
from tests.data_prep.images.small_sets import (
    FOLDER_SETS,
    SIZE,
    config_of,
    draw_images,
    prepare,
    write_folders,
)

GREY = draw_images(1, seed=5)[0]
COLOUR = np.moveaxis(draw_images(3, seed=6), 0, -1)
RED = np.broadcast_to(np.array([255, 0, 0], np.uint8), (SIZE, SIZE, 3))
ORIENTATION = 0x0112
CUT_EXIF = b"Exif\0\0MM\0*\xff\xff\xff\xff"


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, hole: Sequence[int] = ()
) -> bytes:
    """Return a PNG file whose head may say anything.

    :param colour: 0 grey, 2 RGB.
    :param hole: the colour that stands for transparency; none: nothing is transparent.
    """
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks[1:1] = [(b"tRNS", struct.pack(f">{len(hole)}H", *hole))] if hole else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> Image.Image:
    made = Image.fromarray(image)
    made.putalpha(Image.fromarray(alpha))
    return made


def deep_rows(image: NDArray[np.uint16]) -> bytes:
    """Return the rows of a PNG of 16 bits."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)


def halves(value: int, other: int) -> NDArray[np.uint8]:
    """Return a grey image with a value in its left half and another in its right one."""
    return np.repeat(np.array([[value, other]], np.uint8), SIZE // 2, axis=1).repeat(SIZE, axis=0)


def in_colour(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(image[..., None], 3, axis=-1)


class Kind(NamedTuple):
    """A file of some kind, what it must become as RGB, and how it is counted."""

    content: bytes
    pixels: NDArray[np.uint8]
    counted: set[str]
    near: int = 0  # by so much pixels may differ


def kinds() -> dict[str, Kind]:
    half = halves(255, 0)
    palette = Image.fromarray(RED.copy()).quantize(4)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # seen turned clockwise by a quarter
    deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 1000
    deep_rgb = COLOUR.astype(np.uint16) * 256 + 255
    # On the left the colour of the hole, on the right nearly that.
    hole = np.where(half == 255, np.uint16(1000), np.uint16(1001))
    wide = np.concatenate([halves(0, 0), half, half], axis=1)  # the middle third is `half`
    left_red = np.where(half[..., None] == 255, RED, 255).astype(np.uint8)
    return {
        "rgb.png": Kind(saved(Image.fromarray(COLOUR), "PNG"), COLOUR, set()),
        "grey.PNG": Kind(saved(Image.fromarray(GREY), "PNG"), in_colour(GREY), {"grey"}),
        "one_bit.png": Kind(
            saved(Image.fromarray(half).convert("1"), "PNG"), in_colour(half), {"1-bit", "grey"}
        ),
        "palette.png": Kind(saved(palette, "PNG"), RED, {"palette"}),
        "hole.png": Kind(
            saved(palette, "PNG", transparency=int(np.asarray(palette)[0, 0])),
            np.full_like(RED, 255),
            {"palette", "transparent (put on white)"},
        ),
        "alpha.png": Kind(
            saved(with_alpha(RED, half), "PNG"), left_red, {"transparent (put on white)"}
        ),
        "grey_alpha.png": Kind(
            saved(with_alpha(halves(9, 9), half), "PNG"),
            in_colour(halves(9, 255)),
            {"transparent (put on white)", "grey"},
        ),
        "deep.png": Kind(
            saved(Image.fromarray(deep), "PNG"),
            in_colour((deep >> 8).astype(np.uint8)),
            {"16-bit", "grey"},
        ),
        "deep_rgb.png": Kind(png(SIZE, SIZE, 16, 2, deep_rows(deep_rgb)), COLOUR, {"16-bit"}),
        "deep_hole.png": Kind(
            png(SIZE, SIZE, 16, 0, deep_rows(hole), [1000]),
            in_colour(halves(255, 3)),
            {"16-bit", "grey", "transparent (put on white)"},
        ),
        "four_bits.png": Kind(
            png(SIZE, SIZE, 4, 0, (b"\0" + b"\x33" * 2 + b"\xcc" * 2) * SIZE, [3]),
            in_colour(halves(255, 204)),
            {"grey", "transparent (put on white)"},
        ),
        "two_bits.png": Kind(
            png(SIZE, SIZE, 2, 0, (b"\0" + b"\x55" + b"\xaa") * SIZE, [1]),
            in_colour(halves(255, 170)),
            {"grey", "transparent (put on white)"},
        ),
        "cmyk.jpg": Kind(
            saved(Image.fromarray(RED.copy()).convert("CMYK"), "JPEG"), RED, {"CMYK"}, near=3
        ),
        "turned.jpeg": Kind(
            saved(Image.fromarray(half), "JPEG", quality=100, exif=exif),
            in_colour(np.rot90(half, -1)),
            {"grey", "turned by EXIF"},
            near=3,
        ),
        "bad_exif.png": Kind(
            saved(Image.fromarray(GREY), "PNG", exif=b"garbage"),
            in_colour(GREY),
            {"grey", "unreadable EXIF"},
        ),
        "cut_exif.jpg": Kind(
            saved(Image.fromarray(half), "JPEG", quality=100, exif=CUT_EXIF),
            in_colour(half),
            {"grey", "warned of by Pillow"},
            near=3,
        ),
        "moving.png": Kind(
            saved(
                Image.fromarray(COLOUR),
                "PNG",
                save_all=True,
                append_images=[Image.fromarray(RED.copy())],
            ),
            COLOUR,
            {"several frames (the first is taken)"},
        ),
        "wide.png": Kind(saved(Image.fromarray(wide), "PNG"), in_colour(half), {"grey", "resized"}),
        "large.JPG": Kind(
            saved(Image.fromarray(RED.repeat(4, axis=0).repeat(4, axis=1)), "JPEG"),
            RED,
            {"resized"},
            near=3,
        ),
        "named_otherwise.jpg": Kind(saved(Image.fromarray(COLOUR), "PNG"), COLOUR, set()),
    }


REFUSED = {
    "cat/a_link.png": "link to nowhere",
    "cat/a_pipe.png": "not a file",
    "cat/bomb.png": "too many pixels",
    "cat/broken.png": "damaged or truncated",
    "cat/cut.jpg": "damaged or truncated",
    "cat/cut.png": "damaged or truncated",
    "cat/deeper": "a folder in the folder of a class",
    "cat/empty.png": "empty",
    "cat/large_bomb.png": "too many pixels",
    "cat/notes.txt": "another suffix",
    "cat/deep_rgb_hole.png": "16-bit RGB with a transparent colour",
    "cat/film.png": "neither JPEG nor PNG",
    "cat/text.jpeg": "neither JPEG nor PNG",
    ".hidden/secret.png": "not in the folder of a class",
    "README": "not in the folder of a class",
}


def write_refused(folder: Path) -> None:
    """Write what is no image, or none to take, into a set of images."""
    cat = folder / "cat"
    (cat / "a_link.png").symlink_to("gone.png")
    os.mkfifo(cat / "a_pipe.png")
    (cat / "bomb.png").write_bytes(png(10_000, 6_000, 8, 0, b""))
    (cat / "large_bomb.png").write_bytes(png(1_000_000, 1_000_000, 8, 0, b""))
    whole = saved(Image.fromarray(draw_images(1, 1, 64)[0]), "PNG")
    (cat / "cut.png").write_bytes(whole[: len(whole) // 2])
    (cat / "broken.png").write_bytes(whole[:8] + b"\xff" * 40)
    (cat / "cut.jpg").write_bytes(saved(Image.fromarray(draw_images(1, 1, 64)[0]), "JPEG")[:900])
    rows = deep_rows(COLOUR.astype(np.uint16))
    (cat / "deep_rgb_hole.png").write_bytes(png(SIZE, SIZE, 16, 2, rows, [1, 2, 3]))
    (cat / "deeper").mkdir()
    (cat / "deeper" / "inside.png").write_bytes(whole)
    (cat / "empty.png").touch()
    (cat / "notes.txt").write_text("mine")
    (cat / "text.jpeg").write_text("an image? no")
    (cat / "film.png").write_bytes(saved(Image.fromarray(GREY), "GIF"))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.png").write_bytes(whole)
    (folder / "README").write_text("mine")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare folders whose test set has a file of every kind; return where."""
    root = tmp_path_factory.mktemp("folders")
    write_folders(root)
    for path in (root / "test" / "cat").iterdir():
        path.unlink()
    for name, kind in kinds().items():
        (root / "test" / "cat" / name).write_bytes(kind.content)
    write_refused(root / "test")
    prepare(config_of(root, FOLDER_SETS), root / "run")
    return root


def manifest_of(folders: Path) -> ImagesManifest:
    return ImageReader(folders / "run" / "shards", "test").data


def test_set(made: ImagesManifest) -> SetInfo:
    (found,) = (each for each in made.sets if each.split == "test")
    return found


test_set.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(kinds()))
def test_a_kind_of_file(folders: Path, name: str) -> None:
    kind = kinds()[name]
    reader = ImageReader(folders / "run" / "shards", "test")
    images, labels = reader.read(np.array([sorted(kinds()).index(name)]))
    assert reader.data.classes[labels[0]] == "cat"
    difference = np.abs(images[0].transpose(1, 2, 0).astype(int) - kind.pixels)
    assert difference.max() <= kind.near


def test_kinds_are_counted(folders: Path) -> None:
    wanted: dict[str, int] = {}
    for kind in kinds().values():
        for name in kind.counted:
            wanted[name] = wanted.get(name, 0) + 1
    assert test_set(manifest_of(folders)).converted == wanted


def test_what_is_refused_is_named_with_its_reason(folders: Path) -> None:
    report = json.loads((folders / "run" / "shards" / "report.json").read_text())
    assert {each["file"]: each["reason"] for each in report["refused"]} == {
        f"test/{path}": reason for path, reason in REFUSED.items()
    }
    found = test_set(manifest_of(folders))
    assert found.read == found.kept + len(REFUSED)
    assert found.kept == len(kinds()) + 4  # and the dogs
    assert sum(found.refused.values()) == len(REFUSED)
    assert found.refused["damaged or truncated"] == 3


def test_grey_images_are_stored_with_one_channel(folders: Path, tmp_path: Path) -> None:
    made = prepare(config_of(folders, FOLDER_SETS, channels=1), tmp_path / "run")
    images, _ = ImageReader(tmp_path / "run" / "shards", "test").read(np.arange(len(kinds())))
    names = sorted(kinds())
    assert np.array_equal(images[names.index("grey.PNG"), 0], GREY)
    luma = np.asarray(Image.fromarray(COLOUR).convert("L"))
    assert np.array_equal(images[names.index("rgb.png"), 0], luma)
    assert "grey" not in test_set(made).converted
    assert test_set(made).converted["colour"] >= 8


def test_the_log_names_the_first(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config_of(folders, FOLDER_SETS), tmp_path / "run")
    refused = [message for message in caplog.messages if "shards: refused test/" in message]
    assert "shards: refused test/README: not in the folder of a class" in refused
    assert len(refused) == 5
    assert f"shards: and {len(REFUSED) - 5} more, which report.json will name" in caplog.messages


def test_wrong_sizes_can_be_refused(folders: Path, tmp_path: Path) -> None:
    made = prepare(config_of(folders, FOLDER_SETS, wrong_size="refuse"), tmp_path / "run")
    assert test_set(made).refused["wrong size"] == 2
    report = json.loads((tmp_path / "run" / "shards" / "report.json").read_text())
    assert {"file": "test/cat/wide.png", "reason": "wrong size", "detail": "24 × 8"} in report[
        "refused"
    ]


def test_more_can_be_stored_than_a_model_sees(folders: Path, tmp_path: Path) -> None:
    made = prepare(config_of(folders, FOLDER_SETS, stored_size=12), tmp_path / "run")
    assert made.stored_size == 12
    images, _ = ImageReader(tmp_path / "run" / "shards", "train").read(np.arange(8))
    assert images.shape == (8, 3, 12, 12)


# ── Classes ─────────────────────────────────────────────────────────────────────────────────────


def an_empty_class(root: Path) -> None:
    (root / "train" / "ant").mkdir()


def nothing_but_text(root: Path) -> None:
    (root / "train" / "ant").mkdir()
    (root / "train" / "ant" / "a.png").write_text("ant")


def an_unknown_class(root: Path) -> None:
    (root / "test" / "cow").mkdir()
    (root / "test" / "cow" / "0.png").write_bytes((root / "test" / "cat" / "1.png").read_bytes())


def a_name_of_two_lines(root: Path) -> None:
    (root / "train" / "cat").rename(root / "train" / "cat\ntom")


def nothing_good(root: Path) -> None:
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:30])


def no_folders(root: Path) -> None:
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train" / "0.png").touch()


def nothing_at_all(root: Path) -> None:
    (root / "valid").rename(root / "elsewhere")


def another_encoding(root: Path) -> None:
    os.rename(root / "test" / "cat" / "1.png", os.fsencode(root / "test" / "cat") + b"/\xe4.png")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (an_empty_class, "train/ant: no image there could be used"),
        (nothing_but_text, "train/ant: no image there could be used"),
        (an_unknown_class, "test/cow: there is no class of that name; .*: cat, dog"),
        (a_name_of_two_lines, r"class 'cat\\ntom' has a tab, a line end or"),
        (nothing_good, "photos-test: not one of its 8 files could be used"),
        (no_folders, "train has 0 folders; expected one for each class"),
        (nothing_at_all, "(?s)Image files not found.*valid"),
        (another_encoding, r"\\xe4.png': the name of this file is not UTF-8; rename it"),
    ],
)
def test_folders_that_are_no_classes(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    write_folders(tmp_path)
    harm(tmp_path)
    with pytest.raises(DataError, match=said):
        prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run")


def test_classes_in_an_order_of_ones_own(tmp_path: Path) -> None:
    write_folders(tmp_path)
    config = config_of(tmp_path, FOLDER_SETS, classes=["dog", "cat"])
    assert prepare(config, tmp_path / "run").classes == ("dog", "cat")
    labels = ImageReader(tmp_path / "run" / "shards", "test").labels()
    assert labels.tolist() == [1] * 4 + [0] * 4  # in the order of their paths
    with pytest.raises(DataError, match="no training set has a folder 'cow'"):
        prepare(config_of(tmp_path, FOLDER_SETS, classes=["dog", "cat", "cow"]), tmp_path / "run")
