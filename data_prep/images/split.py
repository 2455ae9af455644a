"""Which images go where: held out, dropped, shuffled. All of it is decided at once, from labels and
digests, so it does not depend on how the images were cut into pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import DataError, digest_of
from data_prep.images.shards import Repeats


@dataclass(frozen=True)
class Images:
    """Converted images, in the order of their sets. All arrays are `[images]`."""

    piece: NDArray[np.int64]
    """Number of the piece that has it."""

    row: NDArray[np.int64]
    """Its row in what the piece has."""

    label: NDArray[np.int64]
    digest: NDArray[np.bytes_]
    """Of its stored pixels."""

    source: NDArray[np.bytes_]
    """A digest of what it was made from."""

    def take(self, rows: NDArray[Any]) -> Images:
        """Return some of the images: those at `rows`, or those for which it is true."""
        return Images(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def content(self) -> str:
        """Return a digest of what the images were made from, and of their labels."""
        parts = (np.ascontiguousarray(part).tobytes() for part in (self.source, self.label))
        return digest_of([hashlib.sha256(part).hexdigest() for part in parts])

    def __len__(self) -> int:
        return len(self.piece)


def load_images(folders: Sequence[Path], numbers: Sequence[int]) -> Images:
    """Return what the pieces have converted.

    :param folders: of all pieces.
    :param numbers: of the pieces to load.
    """
    columns: dict[str, list[NDArray[Any]]] = {
        name: [np.load(folders[number] / f"{name}.npy") for number in numbers]
        for name in ("labels", "digests", "sources")
    }
    sizes = list(map(len, columns["labels"]))
    return Images(
        piece=np.repeat(np.array(numbers, np.int64), sizes),
        row=np.concatenate([np.arange(size) for size in sizes]),
        label=np.concatenate(columns["labels"]).astype(np.int64),
        digest=np.concatenate(columns["digests"]),
        source=np.concatenate(columns["sources"]),
    )


def hold_out(images: Images, wanted: int, classes: int, seed: int) -> tuple[Images, Images]:
    """Draw validation images from the training images, of each class its share.

    :returns: the images that stay, and those that are held out; both in their order.
    :raises DataError: not every class would keep an image.
    """
    counts = np.bincount(images.label, minlength=classes)
    too_many = DataError(
        f"data.valid_images {wanted} leaves some class no image to train on: there are "
        f"{len(images)} training images of {np.count_nonzero(counts)} classes; hold out fewer"
    )
    if wanted >= len(images):
        raise too_many
    share, remainder = np.divmod(wanted * counts, len(images))
    by_remainder = np.argsort(-remainder, kind="stable")
    while (missing := wanted - share.sum()) > 0:
        more = by_remainder[(share < counts - 1)[by_remainder]][:missing]
        if not len(more):
            break
        share[more] += 1
    if missing or np.any(share >= np.maximum(counts, 1)):
        raise too_many
    held_out = np.zeros(len(images), bool)
    for label in range(classes):
        own = np.flatnonzero(images.label == label)
        drawn = np.random.default_rng([seed, 1, label]).permutation(len(own))[: share[label]]
        held_out[own[drawn]] = True
    return images.take(~held_out), images.take(held_out)


def find_repeats(train: Images, valid: Images, test: Images) -> tuple[Repeats, NDArray[np.bool_]]:
    """Compare the stored pixels of training images with each other's, and with held-out ones.

    :returns: counts (none dropped), and which training images a held-out one equals `[images]`.
    """
    in_valid, in_test = (np.isin(train.digest, held.digest) for held in (valid, test))
    repeats = Repeats(
        train=len(train) - len(np.unique(train.digest)),
        valid=int(in_valid.sum()),
        test=int(in_test.sum()),
        valid_and_test=int(np.isin(valid.digest, test.digest).sum()),
        dropped=0,
    )
    return repeats, in_valid | in_test


def shuffled(images: Images, seed: int) -> Images:
    """Return the images in the order in which the training shards have them."""
    return images.take(np.random.default_rng([seed, 2]).permutation(len(images)))
