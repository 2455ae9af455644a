"""An exported classifier: images in, probabilities of classes out.

With format onnx it needs no PyTorch. This file travels with a registered model.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.files import first_line
from data_prep.images.read import as_stored, read_image
from models.export_format import (
    CLASSIFIER,
    DIVERGED,
    ClassifierSettings,
    ModelError,
    read_classifier_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]
"""Images `[B, C, S, S]`."""

Images = TypeVar("Images", Pixels, "Tensor")


def centre_crop(images: Images, size: int) -> Images:
    """Return the middle of images, as they are judged.

    :param images: array or tensor `[…, C, S, S]`.
    :returns: `[…, C, size, size]`, not copied.
    """
    begin = (images.shape[-1] - size) // 2
    return images[..., begin : begin + size, begin : begin + size]


class Classifier(ABC):
    """Says how probable each class of an image is."""

    def __init__(self, settings: ClassifierSettings) -> None:
        self.settings = settings

    @abstractmethod
    def logits(self, images: Pixels) -> NDArray[np.float32]:
        """Return logits `[B, classes]` of images of the size that the model takes."""

    def classify(self, source: Path | bytes) -> dict[str, float]:
        """Return the classes with their probabilities, the most probable first.

        :param source: a JPEG or PNG file, or the content of one.
        :raises Refused: it is no such image, or damaged.
        :raises ModelError: the model's output is not a number.
        """
        settings = self.settings
        image, _ = read_image(source, settings.max_pixels)
        pixels, _ = as_stored(image, settings.channels, settings.stored_size)
        (probabilities,) = self.probabilities(pixels[None])
        if not np.isfinite(probabilities).all():
            raise ModelError(DIVERGED)
        order = np.argsort(-probabilities, kind="stable")
        return {settings.classes[i]: float(probabilities[i]) for i in order}

    def probabilities(self, images: Pixels) -> NDArray[np.float32]:
        """Return the probability of each class `[B, classes]`.

        :param images: of at least the size that the model takes, which is cut out of their middle.
        """
        middle = centre_crop(images, self.settings.image_size)
        logits = self.logits(np.ascontiguousarray(middle)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # what is not a number stays so
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
        return shares.astype(np.float32)


class OnnxClassifier(Classifier):
    """Runs an export in format onnx."""

    def __init__(self, folder: Path) -> None:
        """Open the exported model in `folder`.

        :raises ModelError: there is none, or it is damaged.
        """
        import onnxruntime

        super().__init__(read_classifier_settings(folder))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / CLASSIFIER), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's are of many types
            reason = first_line(error)
            raise ModelError(f"{folder}: damaged or incomplete export: {reason}") from error
        self._check_graph(folder)

    def _check_graph(self, folder: Path) -> None:
        """Check that the graph is what export.json says.

        :raises ModelError: it is another model's.
        """
        settings, size = self.settings, self.settings.image_size
        found = {
            each.name: each.shape[1:]
            for each in (*self.session.get_inputs(), *self.session.get_outputs())
        }
        wanted = {"images": [settings.channels, size, size], "logits": [len(settings.classes)]}
        if found != wanted:
            raise ModelError(f"{folder}: damaged export: {CLASSIFIER} is of another model")

    def logits(self, images: Pixels) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.session.run(["logits"], {"images": images})[0]
        return found


def png_of(image: NDArray[np.uint8]) -> bytes:
    """Return a PNG of an image `[C, S, S]`, grey or RGB."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, format="PNG")
    return content.getvalue()
