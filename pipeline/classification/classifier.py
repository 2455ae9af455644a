"""Classifiers of a run's checkpoints, or of an export; by any engine."""

# Functions import torch themselves: ONNX Runtime needs none of it, and so starts seconds sooner.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_prep.files import first_line
from data_prep.images.shards import read_images_manifest
from models.export_format import (
    ClassifierFormat,
    ClassifierSettings,
    ModelError,
    load_weights,
    read_classifier_settings,
)
from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.run_model import model_of_run
from pipeline.classification.serving import Classifier, OnnxClassifier, Pixels
from pipeline.classification_recipe import ClassificationRecipe

if TYPE_CHECKING:
    from models.image_classifier import ImageClassifier


class TorchClassifier(Classifier):
    """Runs a model in PyTorch, on a GPU if there is one."""

    def __init__(self, model: ImageClassifier, settings: ClassifierSettings) -> None:
        import torch

        super().__init__(settings)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()

    def logits(self, images: Pixels) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            logits = self.model(torch.from_numpy(images).to(self.device))
        found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found


def settings_of_run(
    recipe: ClassificationRecipe, format: ClassifierFormat = "safetensors"
) -> ClassifierSettings:
    """Return what an export of the run says of itself."""
    data = read_images_manifest(recipe.shards)
    return ClassifierSettings(
        format=format,
        model=recipe.model,
        channels=data.channels,
        image_size=recipe.data.image_size,
        stored_size=data.stored_size,
        classes=list(data.classes),
        max_pixels=recipe.data.max_pixels,
    )


def classifier_of_run(
    recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint]
) -> TorchClassifier:
    """Return the classifier with the average of the checkpoints' weights.

    :raises CheckpointError: a checkpoint is damaged.
    """
    return TorchClassifier(model_of_run(recipe, checkpoints), settings_of_run(recipe))


def classifier_of_export(folder: Path) -> Classifier:
    """Return the classifier that was exported to a folder.

    :raises ModelError: there is none, or it is damaged.
    """
    settings = read_classifier_settings(folder)
    if settings.format == "onnx":
        return OnnxClassifier(folder)
    from safetensors import SafetensorError

    from models.factory import create_classifier
    from models.image_classifier import ImageShape

    try:
        shape = ImageShape(settings.channels, settings.image_size)
        model = create_classifier(settings.model, shape, len(settings.classes))
        load_weights(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged or incomplete export: {first_line(error)}") from error
    return TorchClassifier(model, settings)
