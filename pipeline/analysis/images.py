"""Images of the validation set as examples, and what the class token looks at in some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.images.shards import ImageReader
from models.image_classifier import ImageClassifier
from models.recording import record
from models.stack import Layered
from pipeline.analysis.distance import patch_distances
from pipeline.analysis.drawings import LookedAt, draw_class_attention
from pipeline.analysis.examples import (
    Analysis,
    Batch,
    Examples,
    Numbers,
    Settings,
    choose,
)
from pipeline.analysis.measures import rounded
from pipeline.classification.serving import centre_crop
from pipeline.recipe import UsageError

SHOWN = 4  # images


class Images(Examples):
    """Images of the validation set, cut as for validation."""

    what = "images"
    unit = "pixels"
    class_token = True

    def __init__(self, shards: Path, size: int, settings: Settings, device: torch.device) -> None:
        """Choose images.

        :param size: of the side of what models see.
        :raises UsageError: there are too few, or the one to show is not there.
        """
        self._reader, self._size = ImageReader(shards, "valid"), size
        self._settings, self._device = settings, device
        images, show = len(self._reader), settings.show
        if show is not None and show > images:
            raise UsageError(f"--show {show}: the validation set has {images} images")
        super().__init__(choose(images, settings.examples))
        self._shown = self.dealt.flatten()[:SHOWN] if show is None else np.array([show - 1])

    def batches(self) -> Iterator[Batch]:
        for numbers in self.dealt:
            yield Batch(partial(_run, self._read(numbers)), real={})

    def _read(self, numbers: Numbers) -> Tensor:
        pixels, _ = self._reader.read(numbers)
        return centre_crop(torch.from_numpy(pixels), self._size).to(self._device)

    def distances(self, positions: int) -> Tensor:
        side = isqrt(positions)
        return patch_distances(side, side, self._size // side)

    def attention_maps(self, model: Layered) -> Sequence[Analysis]:
        images = self._read(self._shown)
        (encoder,) = record(model.stacks, partial(_run, images, model)).values()
        heads = encoder.self_attention[:, :, :, 0, 1:]  # of the class token to patches
        chosen, side = self._settings.head, isqrt(heads.size(-1))
        levels = heads.mean(2) if chosen is None else heads[:, :, chosen - 1]
        maps = levels.transpose(0, 1).cpu().numpy()
        maps = maps.reshape(*maps.shape[:2], side, side)  # [images, N, rows, columns]
        _, labels = self._reader.read(self._shown)
        classes = [self._reader.data.classes[label] for label in labels]
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        content = {
            "heads": "mean over heads" if chosen is None else f"head {chosen}",
            "images": [
                {"image": int(number) + 1, "class": name, "levels": rounded(attention)}
                for number, name, attention in zip(self._shown, classes, maps, strict=True)
            ],
        }
        shown = [LookedAt(*each) for each in zip(classes, pixels, maps, strict=True)]
        return [Analysis("attention_class_token", content, partial(draw_class_attention, shown))]


def _run(images: Tensor, model: nn.Module) -> object:
    assert isinstance(model, ImageClassifier)
    return model.encode(images)  # its logits would not need all positions
