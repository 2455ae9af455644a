"""Augmentation: training images are changed at random, in processes beside the training.

Not in threads: torchvision draws from torch's global random numbers, and most of its time is
Python's. What happens to an image depends on the seed of its micro-batch and its place there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from data_prep.batch_plan import Indices
from data_prep.files import DataError
from data_prep.images.shards import ImageReader, LabelledImages
from data_prep.pieces import tie_to_parent
from pipeline.classification_recipe import (
    Crop,
    Erase,
    Flip,
    RandAugment,
    ResizedCrop,
    Transform,
    TrivialAugment,
)

MOST_PROCESSES = 8  # of a rank


class AugmentedImages:
    """Training images, changed by as many processes as a rank's cores leave free."""

    def __init__(self, shards: Path, transforms: Sequence[Transform], size: int) -> None:
        """Start them with the first images.

        :param shards: the folder to read from.
        :param size: of the side of what comes out.
        """
        self._pool = ProcessPoolExecutor(
            max(1, min(MOST_PROCESSES, torch.get_num_threads() - 1)),
            # As in data_prep: a fork would inherit the lock on run_dir.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(shards, tuple(transforms), size),
        )

    def read(self, examples: Indices, seed: int) -> LabelledImages:
        """Return images, whichever thread asks.

        :raises DataError: a shard is missing or damaged, or a process was killed.
        """
        try:
            return self._pool.submit(_read, examples, seed).result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that augments images was killed; by the system for want of memory?"
            ) from error

    def close(self) -> None:
        """End the processes; nobody asks any more."""
        self._pool.shutdown(cancel_futures=True)


# Of one of the processes:
_reader: ImageReader
_change: Callable[[Tensor], Tensor]


def _begin(shards: Path, transforms: Sequence[Transform], size: int) -> None:
    global _reader, _change
    tie_to_parent()
    torch.set_num_threads(1)
    _reader = ImageReader(shards, "train")
    _change = v2.Compose([*(_transform(each, size) for each in transforms), v2.CenterCrop(size)])


def _read(examples: Indices, seed: int) -> LabelledImages:
    images, labels = _reader.read(examples)
    torch.manual_seed(seed)
    changed = [_change(image) for image in torch.from_numpy(images)]
    return torch.stack(changed).numpy(), labels


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
