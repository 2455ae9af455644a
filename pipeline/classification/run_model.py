"""The classifier of a run: as training starts with it, or with the weights of checkpoints."""

# Functions import torch and what needs it themselves: that takes seconds, and choosing checkpoints
# needs none of it.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_prep.files import digest_of
from data_prep.images.shards import ImagesManifest, read_images_manifest
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.weights import average_weights, fitting_checkpoints
from pipeline.classification_recipe import ClassificationRecipe

if TYPE_CHECKING:
    from models.image_classifier import ImageClassifier
    from models.stack import ParameterCounts


def model_identity(recipe: ClassificationRecipe) -> dict[str, Any]:
    """Return what a model's weights are bound to, as JSON values: its shape, the classes, and the
    images that it has learnt from.

    :raises DataError: there are no prepared data.
    """
    data = read_images_manifest(recipe.shards)
    return {
        "model": recipe.model.model_dump(mode="json"),
        "shape of images": [data.channels, recipe.data.image_size],
        "list of classes": list(data.classes),
        "data": digest_of([shard.sha256 for shard in data.of_split("train")]),
    }


def checkpoints_of_run(recipe: ClassificationRecipe) -> list[Checkpoint]:
    """Return the checkpoints of `run_dir` that evaluation averages, oldest first.

    :raises CheckpointError: there is none, or one belongs to other classes, model or data.
    :raises DataError: the data were not prepared as the recipe says.
    """
    return fitting_checkpoints(recipe, model_identity)


def model_for(recipe: ClassificationRecipe, data: ImagesManifest) -> ImageClassifier:
    """Return a freshly initialised model for prepared images."""
    from models.factory import create_classifier
    from models.image_classifier import ImageShape

    shape = ImageShape(data.channels, recipe.data.image_size)
    model = create_classifier(recipe.model, shape, len(data.classes))
    model.set_normalisation(data.mean, data.std)
    return model


def parameter_counts(recipe: ClassificationRecipe, data: ImagesManifest) -> ParameterCounts:
    """Return how many parameters the model for prepared images has."""
    from models.factory import abstract_classifier
    from models.image_classifier import ImageShape

    shape = ImageShape(data.channels, recipe.data.image_size)
    return abstract_classifier(recipe.model, shape, len(data.classes)).parameter_counts


def model_of_run(
    recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint]
) -> ImageClassifier:
    """Return the model with the average of the checkpoints' weights, or of their moving averages.

    :raises CheckpointError: a checkpoint is damaged, or has no moving average.
    """
    model = model_for(recipe, read_images_manifest(recipe.shards))
    model.load_state_dict(average_weights(checkpoints, use_ema=recipe.evaluation.use_ema))
    return model
