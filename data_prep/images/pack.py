"""Pack images: they are converted, and become shards; those of training in a random order.

It takes two passes: first the images of every piece are converted, then those of every shard are
gathered. A worker holds no more than a piece or a shard in memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.files import DataError, sha256_of, write_json
from data_prep.images.config import ImagesConfig
from data_prep.images.convert import NAMES, Piece, convert_piece
from data_prep.images.fetch import Fetched
from data_prep.images.report import draw, report_of
from data_prep.images.shards import (
    ImageShard,
    ImagesManifest,
    Repeats,
    SetInfo,
    SplitCounts,
    write_images,
    write_names,
)
from data_prep.images.split import Images, find_repeats, hold_out, load_images, shuffled
from data_prep.pieces import Result, map_pieces
from data_prep.stage import log, run_stage

SPLITS = ("train", "valid", "test")
NAMED = 5  # files that the log names of those refused
VERSION = 3  # raise it when the same inputs would give other bytes


class Plan(NamedTuple):
    """What a shard gets."""

    split: str
    pieces: NDArray[np.int64]
    """Number of the piece that has each image `[images]`."""

    rows: NDArray[np.int64]
    """The image's row there `[images]`."""


def pack(
    config: ImagesConfig, fetched: Fetched, raw: Path, folder: Path, executor: Executor
) -> ImagesManifest:
    """Write `SPLIT-NNNNN.arrow` for every split, the names of validation and test images, and a
    report.

    Validation and test images keep the order of their sets.

    :param raw: folder of the fetch stage.
    :raises DataError: a class has no image that can be read, or none is left for training.
    """
    inputs = {
        "fetched": fetched.digest,
        "valid_images": config.valid_images,
        "stored_size": config.stored,
        "channels": config.channels,
        "wrong_size": config.wrong_size,
        "drop_repeated": config.drop_repeated,
        "max_pixels": config.max_pixels,
        "images_per_shard": config.images_per_shard,
        "images_per_piece": config.images_per_piece,
        "seed": config.seed,
        "version": VERSION,
    }

    def build(partial: Path) -> dict[str, Any]:
        pieces = _pieces(config, fetched)
        images = partial / "scratch-images"
        converted = map_pieces(executor, bind(convert_piece, config, raw), pieces, images)
        sets = _sets(fetched, pieces, converted)
        refused = [each for result in converted for each in result["refused"]]
        _log_refused(sets, refused)
        by_split = _split(config, fetched, pieces, images)
        repeats, splits = _without_repeats(config, fetched.classes, by_split)
        shards, gathered = _write_shards(config, splits, images, executor, partial)
        for split in ("valid", "test"):
            write_names(partial, split, _names(splits[split], images))
        mean, std = _normalisation(config, shards, gathered)
        made = ImagesManifest(
            classes=fetched.classes,
            channels=config.channels,
            stored_size=config.stored,
            mean=mean,
            std=std,
            totals={split: _counts(own, len(fetched.classes)) for split, own in splits.items()},
            sets=sets,
            repeats=repeats,
            files=fetched.files,
            seed=config.seed,
            versions={
                "pillow": PIL.__version__,
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
            },
            shards=shards,
        )
        _log_made(made)
        write_json(partial / "report.json", report_of(made, refused))
        draw(made, partial, partial / "report.png")
        return made.model_dump()

    return ImagesManifest.model_validate(run_stage(folder, inputs, build))


# ── What was converted ──────────────────────────────────────────────────────────────────────────


def _pieces(config: ImagesConfig, fetched: Fetched) -> list[Piece]:
    every = config.images_per_piece
    return [
        Piece(number, begin, min(begin + every, each.images))
        for number, each in enumerate(fetched.sets)
        for begin in range(0, each.images, every)
    ]


def _sets(
    fetched: Fetched, pieces: Sequence[Piece], converted: Sequence[Result]
) -> tuple[SetInfo, ...]:
    """Return what became of each set.

    :param converted: what `convert_piece` said of each piece.
    """
    sets = []
    for number, each in enumerate(fetched.sets):
        own = [made for piece, made in zip(pieces, converted, strict=True) if piece.set == number]
        reasons = [why for made in own for _, why, _ in made["refused"]]
        kinds: Counter[str] = Counter()
        for made in own:
            kinds.update(made["converted"])
        sets.append(
            SetInfo(
                split=each.split,
                name=each.name,
                read=each.images,
                kept=sum(made["kept"] for made in own),
                refused=dict(Counter(reasons).most_common()),
                converted=dict(kinds.most_common()),
            )
        )
    return tuple(sets)


def _log_refused(sets: Sequence[SetInfo], refused: Sequence[Sequence[str]]) -> None:
    """Log what was converted, and warn of what was refused."""
    for each in sets:
        if each.converted:
            kinds = ", ".join(f"{count} {kind}" for kind, count in each.converted.items())
            log.info("shards: %s: converted %s", each.name, kinds)
        if each.refused:
            why = ", ".join(f"{count} {reason}" for reason, count in each.refused.items())
            log.warning(
                "shards: %s: refused %d of %d files: %s",
                each.name, each.read - each.kept, each.read, why,
            )  # fmt: skip
    for name, reason, detail in refused[:NAMED]:
        log.warning("shards: refused %s: %s%s", name, reason, detail and f" ({detail})")
    if len(refused) > NAMED:
        log.warning("shards: and %d more, which report.json will name", len(refused) - NAMED)


# ── Splits ──────────────────────────────────────────────────────────────────────────────────────


def _split(
    config: ImagesConfig, fetched: Fetched, pieces: Sequence[Piece], images: Path
) -> dict[str, Images]:
    """Return the images of each split, in the order of their sets.

    :param images: folder of the pieces.
    :raises DataError: a class of a set has no image, or a split has none.
    """
    folders = [images / f"{number:05d}" for number in range(len(pieces))]
    splits = {}
    for split in SPLITS:
        own = [n for n, piece in enumerate(pieces) if fetched.sets[piece.set].split == split]
        if own:
            splits[split] = load_images(folders, own)
            _check_classes(config, fetched, pieces, split, splits[split])
    if config.valid is None:
        splits["train"], splits["valid"] = hold_out(
            splits["train"], config.valid_images, len(fetched.classes), config.seed
        )
    return {split: splits[split] for split in SPLITS}


def _check_classes(
    config: ImagesConfig, fetched: Fetched, pieces: Sequence[Piece], split: str, images: Images
) -> None:
    """Check that there are images of each class that has a folder.

    :raises DataError: there are none.
    """
    set_of_piece = np.array([piece.set for piece in pieces])
    named = [each for _, each in config.sets()]
    for number, each in enumerate(fetched.sets):
        if each.split != split:
            continue
        labels = images.label[set_of_piece[images.piece] == number]
        counts = np.bincount(labels, minlength=len(fetched.classes))
        if not counts.any():
            raise DataError(f"{each.name}: not one of its {each.images} files could be used")
        if empty := [label for label in each.classes if not counts[label]]:
            folder = config.root / str(named[number].folder) / fetched.classes[empty[0]]
            raise DataError(
                f"{folder}: no image there could be used, and so the class has none in "
                f"{each.name}; add some, or remove the folder"
            )
    counts = np.bincount(images.label, minlength=len(fetched.classes))
    if missing := [name for name, count in zip(fetched.classes, counts, strict=True) if not count]:
        if split == "train" and all(each.folder is not None for each in config.train):
            raise DataError(
                f"data.classes: no training set has a folder {missing[0]!r}; add one with images, "
                "or take the class out"
            )
        log.warning("shards: %s has no image of %s", split, ", ".join(missing))


def _without_repeats(
    config: ImagesConfig, classes: Sequence[str], splits: dict[str, Images]
) -> tuple[Repeats, dict[str, Images]]:
    """Return what repeats there are, and the images of each split as its shards have them.

    :raises DataError: all training images of a class are held-out ones too.
    """
    train = splits["train"]
    repeats, held_out = find_repeats(train, splits["valid"], splits["test"])
    if held_out.any() and config.drop_repeated:
        kept = train.take(~held_out)
        for label in np.setdiff1d(train.label, kept.label)[:1]:
            raise DataError(
                f"Every training image of {classes[label]} is also a validation or test image; "
                "remove it there, or set data.drop_repeated to false"
            )
        repeats = repeats.model_copy(update={"dropped": len(train) - len(kept)})
        train = kept
    return repeats, {**splits, "train": shuffled(train, config.seed)}


def _counts(images: Images, classes: int) -> SplitCounts:
    counts = np.bincount(images.label, minlength=classes)
    return SplitCounts(images=len(images), classes=tuple(counts.tolist()), content=images.content)


# ── Shards ──────────────────────────────────────────────────────────────────────────────────────


def _write_shards(
    config: ImagesConfig,
    splits: dict[str, Images],
    converted: Path,
    executor: Executor,
    folder: Path,
) -> tuple[tuple[ImageShard, ...], list[Result]]:
    """Write all shards.

    :param converted: folder of the pieces.
    :returns: the shards, and what `_gather` said of each.
    """
    every = config.images_per_shard
    plans, names = [], []
    for split, images in splits.items():
        for number, begin in enumerate(range(0, len(images), every)):
            some = slice(begin, begin + every)
            plans.append(Plan(split, images.piece[some], images.row[some]))
            names.append(f"{split}-{number:05d}.arrow")
    gathered = folder / "scratch-shards"
    results = map_pieces(executor, bind(_gather, converted), plans, gathered)
    shards = []
    for number, (name, plan, result) in enumerate(zip(names, plans, results, strict=True)):
        made = gathered / f"{number:05d}" / "shard.arrow"
        if made.exists():  # an interrupted call may have moved it
            made.replace(folder / name)
        shards.append(
            ImageShard(name=name, split=plan.split, images=len(plan.rows), sha256=result["sha256"])
        )
    return tuple(shards), results


def _gather(converted: Path, plan: Plan, folder: Path) -> dict[str, Any]:
    """Write one shard: its images from all pieces.

    :returns: its checksum, and by channel the sums of the values of pixels and of their squares.
    """
    labels = np.empty(len(plan.rows), np.uint16)
    pixels: NDArray[np.uint8] | None = None
    for piece in np.unique(plan.pieces).tolist():
        places = np.flatnonzero(plan.pieces == piece)
        of_piece = converted / f"{piece:05d}"
        images = np.load(of_piece / "images.npy", mmap_mode="r")
        if pixels is None:
            pixels = np.empty((len(labels), *images.shape[1:]), np.uint8)
        pixels[places] = images[plan.rows[places]]
        labels[places] = np.load(of_piece / "labels.npy")[plan.rows[places]]
    assert pixels is not None
    sums = squares = np.zeros(pixels.shape[1], np.int64)
    for image in pixels:
        values = image.reshape(len(sums), -1).astype(np.int64)
        sums, squares = sums + values.sum(axis=1), squares + (values * values).sum(axis=1)
    path = folder / "shard.arrow"
    write_images(path, pixels, labels)
    return {"sha256": sha256_of(path), "sums": sums.tolist(), "squares": squares.tolist()}


def _names(images: Images, converted: Path) -> list[str]:
    """Return the names of images, in their order.

    :param converted: folder of the pieces.
    """
    of_piece = {
        piece: json.loads((converted / f"{piece:05d}" / NAMES).read_text(encoding="utf-8"))
        for piece in np.unique(images.piece).tolist()
    }
    places = zip(images.piece.tolist(), images.row.tolist(), strict=True)
    return [of_piece[piece][row] for piece, row in places]


def _normalisation(
    config: ImagesConfig, shards: Sequence[ImageShard], gathered: Sequence[Result]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the training images' pixels, as 0…1, by channel.

    They come from sums of whole numbers, and so are exact whatever the order.
    """
    train = [
        result for shard, result in zip(shards, gathered, strict=True) if shard.split == "train"
    ]
    pixels = sum(shard.images for shard in shards if shard.split == "train") * config.stored**2
    mean, std = [], []
    for channel in range(config.channels):
        total = sum(result["sums"][channel] for result in train)
        squares = sum(result["squares"][channel] for result in train)
        spread = pixels * squares - total**2
        mean.append(total / (255 * pixels))
        std.append(math.sqrt(spread) / (255 * pixels) if spread else 1.0)
    return tuple(mean), tuple(std)


def _log_made(made: ImagesManifest) -> None:
    """Log what is in the shards, and warn of images that are in them twice."""
    counts = ", ".join(f"{split} {total.images} images" for split, total in made.totals.items())
    log.info("shards: %s, of %d classes", counts, len(made.classes))
    repeats = made.repeats
    if repeats.train:
        log.warning("shards: %d training images repeat an earlier one", repeats.train)
    if repeats.valid or repeats.test:
        log.warning(
            "shards: %d training images are also validation images, %d also test images; %d of "
            "them were dropped",
            repeats.valid,
            repeats.test,
            repeats.dropped,
        )
    if repeats.valid_and_test:
        log.warning(
            "shards: %d validation images are also test images, and so help to choose the model",
            repeats.valid_and_test,
        )
