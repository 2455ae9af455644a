"""The factory turns a recipe's `model` section into a model, whatever its architecture."""

from __future__ import annotations

from threading import Lock

import torch

from models.config import ModelConfig, VisionConfig
from models.image_classifier import ImageClassifier, ImageShape, num_positions
from models.ringformer import RingDecoder, RingEncoder, VisionRing
from models.seq2seq import TranslationModel
from models.transformer import transformer_decoder, transformer_encoder
from models.vision_transformer import VisionTransformer

ONE_AT_A_TIME = Lock()  # fairseq2 sets itself up with the first model, not for two threads at once


def create_model(
    config: ModelConfig, vocab_sizes: tuple[int, int], pad_idx: int
) -> TranslationModel:
    """Build the model that `config` describes, freshly initialised from torch's global RNG.

    :param vocab_sizes: of the source and the target side.
    """
    with ONE_AT_A_TIME:
        if config.architecture == "transformer":
            encoder, decoder = transformer_encoder(config), transformer_decoder(config)
            return TranslationModel(config, vocab_sizes, pad_idx, encoder, decoder)
        rings = RingEncoder(config), RingDecoder(config)
        return TranslationModel(config, vocab_sizes, pad_idx, *rings)


def create_classifier(config: VisionConfig, image: ImageShape, classes: int) -> ImageClassifier:
    """Build the classifier that `config` describes, freshly initialised from torch's global RNG.

    :param image: the images'.
    :param classes: how many there are.
    :raises ValueError: patches do not fill an image.
    """
    encoder = (
        VisionTransformer(config)
        if config.architecture == "transformer"
        else VisionRing(config, num_positions(config, image))
    )
    return ImageClassifier(config, image, classes, encoder)


def abstract_model(config: ModelConfig, vocab_sizes: tuple[int, int]) -> TranslationModel:
    """Build the same model without memory for its numbers, to know its shapes."""
    with torch.device("meta"):
        return create_model(config, vocab_sizes, pad_idx=0)


def abstract_classifier(config: VisionConfig, image: ImageShape, classes: int) -> ImageClassifier:
    """Build the same classifier without memory for its numbers, to know its shapes."""
    with torch.device("meta"):
        return create_classifier(config, image, classes)
