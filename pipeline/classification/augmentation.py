"""Augmentation: training images are changed at random, in processes beside the training.

Not in threads: torchvision draws from torch's global random numbers, and most of its time is
Python's. What happens to an image depends on the seed of its micro-batch and its place there.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from data_prep.batch_plan import Indices
from data_prep.files import DataError
from data_prep.images.shards import ImageReader, LabelledImages
from data_prep.pieces import tie_to_parent
from pipeline.classification.serving import centre_crop
from pipeline.classification_recipe import (
    Crop,
    Erase,
    Flip,
    RandAugment,
    ResizedCrop,
    Transform,
    TrivialAugment,
)
from pipeline.ranks import cores_of_rank

MOST_PROCESSES = 8  # of a rank


class AugmentedImages:
    """Training images, changed by one process for each of a rank's cores but one."""

    def __init__(self, shards: Path, transforms: Sequence[Transform], size: int) -> None:
        """Start them with the first images.

        :param shards: the folder to read from.
        :param size: of the side of what comes out.
        """
        self._shards = shards
        self._pool = ProcessPoolExecutor(
            max(1, min(MOST_PROCESSES, cores_of_rank() - 1)),
            # As in data_prep: a fork would inherit the lock on run_dir.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(tuple(transforms), size),
        )

    def read(self, examples: Indices, seed: int) -> LabelledImages:
        """Return images, whichever thread asks.

        :raises DataError: a shard is missing or damaged, or a process has ended.
        """
        try:
            return self._pool.submit(_read, self._shards, examples, seed).result()
        except BrokenProcessPool as error:
            for process in multiprocessing.active_children():
                if isinstance(process, SpawnProcess):
                    process.kill()  # the pool asks by SIGTERM, and would wait for ever
            raise DataError(
                "a process that augments images has ended: it has said why, or the system has "
                "killed it for want of memory"
            ) from error

    def close(self) -> None:
        """End the processes. Threads that ask all the same get an error, which nobody reads."""
        self._pool.shutdown(cancel_futures=True)


_change: Callable[[Tensor], Tensor]  # of one of the processes


def _begin(transforms: Sequence[Transform], size: int) -> None:
    global _change
    tie_to_parent()
    for number in (signal.SIGTERM, signal.SIGHUP):  # who signals all asks training to save
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    _change = v2.Compose(
        [*(_transform(each, size) for each in transforms), partial(centre_crop, size=size)]
    )


@cache
def _reader(shards: Path) -> ImageReader:
    return ImageReader(shards, "train")


def _read(shards: Path, examples: Indices, seed: int) -> LabelledImages:
    images, labels = _reader(shards).read(examples)
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
