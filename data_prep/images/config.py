"""The `data` section of a recipe for images with a class each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field as Limit
from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from data_prep.config import Preparation
from data_prep.section import Section

MAX_CLASSES = 1 << 16
PILLOWS_LIMIT = 178_956_970  # pixels; Pillow itself opens no larger image

Side = Annotated[int, Limit(gt=0, le=math.isqrt(PILLOWS_LIMIT))]
"""Of a square image, in pixels."""


class ImageSet(Section):
    """Images with a class each: a folder, or a pair of IDX files."""

    name: str
    """What reports call it."""

    folder: str | None = None
    """Folder below `data.root` that has a folder for each class, with `.jpg`, `.jpeg` or `.png`
    files (in any case). Folders in those are not looked into."""

    images: str | None = None
    """Instead: an IDX file below `data.root`, plain or `.gz`, of bytes [images, height, width]."""

    labels: str | None = None
    """IDX file of the number of each image's class, likewise."""

    @field_validator("folder", "images", "labels")
    @classmethod
    def _stays_below_root(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in value:
            raise ValueError(f"expected a path below data.root, not {value!r}")
        return str(path)

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> ImageSet:
        idx = (self.images is not None, self.labels is not None)
        if idx[0] != idx[1] or (self.folder is not None) == idx[0]:
            raise ValueError(f"{self.name}: expected folder, or images and labels (IDX files)")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Return what is named below `data.root`: the folder, or the files."""
        return tuple(path for path in (self.folder, self.images, self.labels) if path is not None)


class ImagesConfig(Preparation):
    """Images with a class each, and how they become shards."""

    train: tuple[ImageSet, ...] = Limit(min_length=1)
    """Training images."""

    valid: ImageSet | None = None
    """Validation images; or else `valid_images`."""

    valid_images: NonNegativeInt = 0
    """Where there is no `valid`: that many training images are held out for validation, of each
    class its share, drawn by the seed."""

    test: ImageSet
    """Test images; their name appears in the scores."""

    classes: tuple[str, ...] | None = Limit(default=None, min_length=2, max_length=MAX_CLASSES)
    """Names of the classes, that of label 0 first. Null: the names of the folders of `train`,
    sorted; for IDX files the numbers from 0 to the largest label of `train`."""

    image_size: Side
    """Side of the images that a model sees, in pixels."""

    stored_size: Side | None = None
    """Side of the images in the shards; null: `image_size`. A larger one leaves something to crop
    in training."""

    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB. Images that have others are converted as Pillow does."""

    wrong_size: Literal["resize", "refuse"] = "resize"
    """What becomes of images that are not `stored_size` squared: `resize` scales them (bicubic,
    antialiased) until their shorter side fits and cuts out the centre; `refuse` leaves them out,
    and the report names them."""

    drop_repeated: bool = True
    """Drop training images whose stored pixels are also those of a validation or test image. They
    are counted in any case, as are repeats among the training images, which stay."""

    max_pixels: int = Limit(default=50_000_000, gt=0, le=PILLOWS_LIMIT)
    """Files of images with more pixels are refused before they are unpacked: few bytes can hold
    more than fits into memory."""

    images_per_shard: PositiveInt = 2_500
    """Images in one shard file; a worker holds that many in memory."""

    images_per_piece: PositiveInt = 1_000
    """Images that a worker reads at once: what a killed command can lose of its work."""

    @property
    def stored(self) -> int:
        """Return the side of the images in the shards."""
        return self.stored_size or self.image_size

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(sorted({path for _, each in self.sets() for path in each.paths}))

    def sets(self) -> Iterator[tuple[str, ImageSet]]:
        """Yield all sets with the names of their splits: those of train, valid, test."""
        yield from (("train", each) for each in self.train)
        if self.valid is not None:
            yield "valid", self.valid
        yield "test", self.test

    @model_validator(mode="after")
    def _fits_together(self) -> ImagesConfig:
        if (self.valid is None) == (self.valid_images == 0):
            raise ValueError("valid and valid_images: expected one of them")
        if len({each.name for each in self.train}) < len(self.train):
            raise ValueError("train: every set needs a name of its own")
        if self.stored < self.image_size:
            raise ValueError(
                f"stored_size ({self.stored}) must not be less than image_size ({self.image_size})"
            )
        return self

    @model_validator(mode="after")
    def _knows_its_classes(self) -> ImagesConfig:
        if self.classes is None:
            if len({each.folder is None for each in self.train}) > 1:
                raise ValueError("classes: needed where train has both folders and IDX files")
            for split, each in self.sets():
                if self.train[0].folder is not None and each.folder is None:
                    raise ValueError(
                        f"classes: needed where train has folders and {split} IDX files, whose "
                        "numbers would be taken for places in the order of the folders' names"
                    )
        elif len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: every class needs a name of its own")
        return self
