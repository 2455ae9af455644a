"""Classifiers that run in PyTorch: of a run's checkpoints, or of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from data_prep.files import first_line
from data_prep.images.shards import read_images_manifest
from models.export_format import (
    ClassifierFormat,
    ClassifierSettings,
    ModelError,
    load_weights,
    read_classifier_settings,
)
from models.factory import create_classifier
from models.image_classifier import ImageClassifier, ImageShape
from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.run_model import model_of_run
from pipeline.classification.serving import Classifier, OnnxClassifier, Pixels
from pipeline.classification_recipe import ClassificationRecipe


class TorchClassifier(Classifier):
    """Runs a model in PyTorch, on a GPU if there is one."""

    def __init__(self, model: ImageClassifier, settings: ClassifierSettings) -> None:
        super().__init__(settings)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def logits(self, images: Pixels) -> NDArray[np.float32]:
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
    try:
        shape = ImageShape(settings.channels, settings.image_size)
        model = create_classifier(settings.model, shape, len(settings.classes))
        load_weights(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: damaged or incomplete export: {first_line(error)}") from error
    return TorchClassifier(model, settings)
