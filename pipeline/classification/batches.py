"""Collation: stored images become the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.batch_plan import Indices
from data_prep.images.shards import LabelledImages
from models.padding import pinned, to_device
from pipeline.classification.serving import centre_crop

NO_CLASS = -100  # the label that `cross_entropy` leaves out


@dataclass(frozen=True)
class ImageBatch:
    """A micro-batch of images, with a class each."""

    images: Tensor
    """Pixels, uint8 `[B, C, S, S]`, on the host: several batches are read ahead."""

    labels: Tensor
    """Numbers of the classes, int64 `[B]`."""

    def to_device(self) -> Tensor:
        """Copy the images to where the labels are."""
        return self.images.to(self.labels.device, non_blocking=True)

    @property
    def positions(self) -> int:
        """Return the number of images; none is padding."""
        return len(self.labels)

    def __str__(self) -> str:
        return f"{len(self.labels)} images"


def collate(
    read: Callable[[Indices], LabelledImages], examples: Indices, size: int, device: torch.device
) -> ImageBatch:
    """Read `examples`, and keep the middle of each ready for `device`.

    Where the micro-batches do not divide among the ranks, a rank's last one is empty. It then gets
    an image without a class, so that the rank still takes part in the step.

    :param size: of the side of the middle.
    """
    images, labels = read(examples if len(examples) else np.zeros(1, dtype=np.int64))
    if not len(examples):
        labels[:] = NO_CLASS
    middles, classes = torch.from_numpy(centre_crop(images, size)), torch.from_numpy(labels)
    return ImageBatch(pinned(middles, device), to_device(classes, device))
