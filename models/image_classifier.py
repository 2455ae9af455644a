"""This module puts patches, class token and head around any encoder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from models.config import VisionConfig
from models.dropout import replace_dropouts
from models.positions import InterleavedSinusoids
from models.stack import Layered

FINAL_LAYER_NORM_EPS = 1e-6
INIT_CLASS_TOKEN_STD = 0.02


class ImageShape(NamedTuple):
    """Images of one data set all have this shape; they are square."""

    channels: int
    size: int  # of a side, in pixels


def num_positions(config: VisionConfig, image: ImageShape) -> int:
    """Return S, the number of the encoder's positions: the class token's, and one for each patch.

    :raises ValueError: patches do not fill an image.
    """
    patches, rest = divmod(image.size, config.patch_size)
    if rest:
        raise ValueError(
            f"model.patch_size ({config.patch_size}) does not divide the images' side "
            f"({image.size})"
        )
    return 1 + patches**2


class ImageClassifier(Layered):
    """A classifier reads the class token at the end of an encoder: images → logits of classes."""

    around = ("patches", "class_token", "head")

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: VisionConfig, image: ImageShape, classes: int, encoder: nn.Module
    ) -> None:
        """Put patches, class token and head around an encoder.

        :param encoder: `[B, S, d]` and how many positions are read → `[B, read, d]`; position 0 is
            the class token's.
        :raises ValueError: patches do not fill an image.
        """
        super().__init__()
        self.config, self.image = config, image
        dim, size = config.model_dim, config.patch_size
        self.register_buffer("mean", torch.zeros(image.channels))
        self.register_buffer("std", torch.ones(image.channels))
        self.patches = nn.Conv2d(image.channels, dim, size, stride=size)
        self.class_token = nn.Parameter(torch.empty(dim).normal_(std=INIT_CLASS_TOKEN_STD))
        self.pos_encoder: InterleavedSinusoids | None = None
        if config.architecture != "universal":  # which adds positions in every iteration
            self.pos_encoder = InterleavedSinusoids(dim, num_positions(config, image))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = encoder
        self.final_layer_norm = nn.LayerNorm(dim, eps=FINAL_LAYER_NORM_EPS)
        self.head = nn.Linear(dim, classes)
        replace_dropouts(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        mean, std = self.mean, self.std
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not mean.is_meta:  # they keep their precision when the model is cast to another
            self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise images by these from now on.

        :param mean, std: of each channel, of pixels from 0 to 1.
        :raises ValueError: they are not of as many channels, or a deviation is 0.
        """
        if not len(mean) == len(std) == self.image.channels:
            raise ValueError(
                f"{len(mean)} means and {len(std)} deviations for {self.image.channels} channels"
            )
        if min(std) <= 0:
            raise ValueError(f"Standard deviations must be over 0, not {list(std)}")
        with torch.no_grad():
            self.mean.copy_(torch.tensor(mean))
            self.std.copy_(torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        :param images: `[B, C, H, W]`; pixels as uint8, or normalised already.
        :returns: `[B, classes]`.
        :raises ValueError: images are of another shape.
        """
        # The head reads nothing but the class token, so that is all that the last level computes.
        logits: Tensor = self.head(self.encode(images, read=1)[:, 0])
        return logits

    def encode(self, images: Tensor, read: int | None = None) -> Tensor:
        """Compute the encoder's output, after the final LayerNorm.

        :param images: as `forward` takes them.
        :param read: how many positions are wanted, from the first on; None: all.
        :returns: of the class token and of the patches, row by row, `[B, read, d]`.
        """
        encoded: Tensor = self.final_layer_norm(self.encoder(self.embed(images), read))
        return encoded

    def embed(self, images: Tensor) -> Tensor:
        """Compute what the encoder reads.

        :param images: as `forward` takes them.
        :returns: class token and patches, row by row, `[B, S, d]`.
        """
        patches: Tensor = self.patches(self.normalise(images)).flatten(2).mT
        token = self.class_token.expand(patches.size(0), 1, -1)
        x = torch.cat([token, patches], dim=1)  # under autocast in float32, as embeddings are
        if self.pos_encoder is not None:
            x = x + self.pos_encoder.at(range(x.size(1))).to(x.dtype)
        embedded: Tensor = self.dropout(x)
        return embedded

    def normalise(self, images: Tensor) -> Tensor:
        """Return images as the patches take them; those of floating numbers are normalised already.

        :param images: as `forward` takes them.
        """
        channels, size = self.image
        if images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"This model takes images [B, {channels}, {size}, {size}], not {list(images.shape)}"
            )
        if not images.is_floating_point():
            mean, std = (each[:, None, None] for each in (self.mean, self.std))
            images = (images / 255 - mean) / std
        return images.to(self.patches.weight.dtype)
