"""Collation and augmentation: stored images become the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from data_prep.batch_plan import Indices
from data_prep.images.shards import ImageReader
from pipeline.classification_recipe import (
    Crop,
    Erase,
    Flip,
    RandAugment,
    ResizedCrop,
    Transform,
    TrivialAugment,
)

NO_CLASS = -100  # the label that `cross_entropy` leaves out


@dataclass(frozen=True)
class ImageBatch:
    """A micro-batch of images as they are stored, with a class each."""

    images: Tensor
    """Pixels in the host's memory, uint8 `[B, C, S, S]`."""

    labels: Tensor
    """Numbers of the classes, int64 `[B]`."""

    @property
    def positions(self) -> int:
        """Return the number of images; none is padding."""
        return len(self.labels)

    def __str__(self) -> str:
        return f"{len(self.labels)} images"


def collate(reader: ImageReader, examples: Indices, device: torch.device) -> ImageBatch:
    """Read `examples`.

    Where the micro-batches do not divide among the ranks, a rank's last one is empty. It then gets
    an image without a class, so that the rank still takes part in the step.
    """
    images, labels = reader.read(examples if len(examples) else np.zeros(1, dtype=np.int64))
    if not len(examples):
        labels[:] = NO_CLASS
    return ImageBatch(torch.from_numpy(images), torch.from_numpy(labels).to(device))


def augmentation(transforms: Sequence[Transform], size: int) -> Callable[[Tensor], Tensor]:
    """Return what a recipe's `training.augmentation` does to an image, uint8 `[C, S, S]`.

    It draws from torch's global RNG.

    :param size: of the side of what comes out.
    """
    steps = [_transform(each, size) for each in transforms]
    composed: Callable[[Tensor], Tensor] = v2.Compose([*steps, v2.CenterCrop(size)])
    return composed


def augment(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return images that were changed one by one.

    :param images: `[B, C, S, S]`.
    """
    return torch.stack([change(image) for image in images])


def _transform(transform: Transform, size: int) -> Any:
    match transform:
        case Crop():
            return v2.RandomCrop(size, padding=transform.padding)
        case ResizedCrop():
            return v2.RandomResizedCrop(size, (transform.min_scale, 1.0), antialias=True)
        case Flip():
            return v2.RandomHorizontalFlip(transform.probability)
        case RandAugment():
            return v2.RandAugment(transform.num_ops, transform.magnitude)
        case TrivialAugment():
            return v2.TrivialAugmentWide()
        case Erase():
            return v2.RandomErasing(transform.probability)
