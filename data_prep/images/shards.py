"""Shards of images: Arrow IPC files, memory-mapped, readable by any Arrow tool.

They have the columns `image`, `fixed_size_binary` of unsigned bytes `[channels, rows, columns]`,
and `label`, `uint16`: the number of the image's class. Each file is one record batch.
`manifest.json` beside them says what they hold, `SPLIT-names.arrow` what validation and test images
are called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.arrow import check_shards, open_whole, read_manifest_of, write_rows
from data_prep.stage import Record

Pixels = NDArray[np.uint8]
"""Images `[images, channels, size, size]`."""

LabelledImages = tuple[Pixels, NDArray[np.int64]]
"""Images, and the numbers of their classes `[images]`."""


def write_images(path: Path, images: Pixels, labels: NDArray[np.integer[Any]]) -> None:
    """Write a shard. Equal images give equal bytes.

    :param labels: the number of each image's class `[images]`.
    """
    # Not by `pa.array`, which imports pandas when it sees an array of NumPy.
    columns = [
        pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
        for kind, values in (
            (pa.binary(math.prod(images.shape[1:])), images),
            (pa.uint16(), labels.astype(np.uint16)),
        )
    ]
    write_rows(path, pa.record_batch(columns, names=["image", "label"]))


def write_names(folder: Path, split: str, names: Sequence[str]) -> None:
    """Write what the images of a split are called, in their order."""
    write_rows(folder / f"{split}-names.arrow", pa.record_batch([pa.array(names)], names=["name"]))


# ── The manifest ────────────────────────────────────────────────────────────────────────────────


class SplitCounts(Record):
    """The record counts the images of a split that are in its shards."""

    images: int
    classes: tuple[int, ...]
    """Of each class."""

    content: str
    """A digest of what they were made from, and of their classes, in their order: whether they are
    stored at another scale or in other colours does not count."""


class SetInfo(Record):
    """The record says what became of a set of images."""

    split: str
    """The split it belongs to: train, valid or test."""

    name: str
    read: int
    """Images and other files in it."""

    kept: int
    """Those that could be converted."""

    refused: dict[str, int]
    """The others, by reason; `report.json` names them."""

    converted: dict[str, int]
    """Images kept that were not as they are stored, by what they were."""


class Repeats(Record):
    """The record counts images with equal stored pixels."""

    train: int
    """Training images that an earlier one equals."""

    valid: int
    """Training images that a validation image equals."""

    test: int
    """Training images that a test image equals."""

    valid_and_test: int
    """Validation images that a test image equals."""

    dropped: int
    """Training images dropped for one of the latter two."""


class ImageShard(Record):
    """The record says what a shard holds."""

    name: str
    """Name of the file."""

    split: str
    """The split it belongs to: train, valid or test."""

    images: int
    sha256: str


class ImagesManifest(Record):
    """The record is `manifest.json` of the shards; its fields are in the order on disk."""

    classes: tuple[str, ...]
    """Names of the classes, by their numbers."""

    channels: int
    stored_size: int
    """Side of the images in the shards."""

    mean: tuple[float, ...]
    """Of all pixels of the training images, as 0…1, by channel."""

    std: tuple[float, ...]
    """Their standard deviation, likewise; 1 where all are alike."""

    totals: dict[str, SplitCounts]
    """Counts of each split."""

    sets: tuple[SetInfo, ...]
    repeats: Repeats
    files: dict[str, str]
    """The sha256 of every IDX file, and a digest of every folder."""

    seed: int
    versions: dict[str, str]
    """Versions of the libraries that made the shards."""

    shards: tuple[ImageShard, ...]

    def of_split(self, split: str) -> tuple[ImageShard, ...]:
        """Return the shards of train, valid or test."""
        return tuple(shard for shard in self.shards if shard.split == split)


def read_images_manifest(folder: Path) -> ImagesManifest:
    """Read what `folder` says about its shards.

    :raises DataError: the folder is not a finished data set, or its manifest lacks something.
    """
    return read_manifest_of(folder, ImagesManifest)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


class OpenShard(NamedTuple):
    """A shard that was opened, memory-mapped."""

    images: Pixels
    labels: NDArray[np.uint16]


def open_images(folder: Path, shard: ImageShard, data: ImagesManifest) -> OpenShard:
    """Open a shard.

    :param folder: of the shards.
    :raises DataError: it is missing or damaged.
    """
    batch = open_whole(folder / shard.name, shard.images, "images")
    pixels = np.frombuffer(batch.column("image").buffers()[1], np.uint8)
    images = pixels.reshape(len(batch), data.channels, data.stored_size, data.stored_size)
    return OpenShard(images, batch.column("label").to_numpy())


class ImageReader:
    """The reader maps the images of one split, over all its shards.

    A shard is opened when it is first read, so opening a data set of thousands reads its manifest
    only.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = False) -> None:
        """Open the images of a split.

        :param verify: also compare each shard with its checksum (reads all of it).
        :raises DataError: the folder is not a finished data set, or a shard is damaged.
        """
        self.data = read_images_manifest(folder)
        self._folder, self.split = folder, split
        self.shards = self.data.of_split(split)
        self.image_shape = (self.data.channels, self.data.stored_size, self.data.stored_size)
        if verify:
            check_shards(folder, self.shards)
        self._open: list[OpenShard | None] = [None] * len(self.shards)
        self._first = np.array([0, *accumulate(shard.images for shard in self.shards)])

    def _opened(self, number: int) -> OpenShard:
        """Return a shard, and open it the first time."""
        opened = self._open[number]
        if opened is None:
            opened = open_images(self._folder, self.shards[number], self.data)
            self._open[number] = opened
        return opened

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: NDArray[np.integer[Any]]) -> LabelledImages:
        """Return images `[B, C, S, S]` and the numbers of their classes `[B]`, copied, in the
        order of `indices`.

        :raises IndexError: there is no such image.
        :raises DataError: a shard is missing or damaged.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"images {indices.min()} to {indices.max()} of {len(self)}")
        shards = np.searchsorted(self._first, indices, side="right") - 1
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for number in np.unique(shards).tolist():
            places = np.flatnonzero(shards == number)
            rows = indices[places] - self._first[number]
            opened = self._opened(number)
            images[places], labels[places] = opened.images[rows], opened.labels[rows]
        return images, labels

    def labels(self) -> NDArray[np.int64]:
        """Return the numbers of the classes of all images `[images]`.

        :raises DataError: a shard is missing or damaged.
        """
        labels = (self._opened(number).labels for number in range(len(self.shards)))
        return np.concatenate([np.empty(0, np.int64), *labels])

    def names(self) -> list[str]:
        """Return what all images are called, of valid or test: paths below `data.root`.

        :raises DataError: the file is missing or damaged.
        """
        found = open_whole(self._folder / f"{self.split}-names.arrow", len(self), "names")
        names: list[str] = found.column("name").to_pylist()
        return names
