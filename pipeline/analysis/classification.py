"""Image classifiers that can be analysed: of a run, or of an export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import digest_of
from data_prep.images.shards import read_images_manifest
from models.export_format import read_classifier_settings
from pipeline.analysis.examples import Subject, exported
from pipeline.classification.run_model import checkpoints_of_run, model_of_run
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.result import digest_of_weights

if TYPE_CHECKING:
    from models.image_classifier import ImageClassifier


def subject_of_run(recipe: ClassificationRecipe) -> Subject:
    """Return the model of a run's checkpoints, as `evaluation` names them.

    :raises CheckpointError: there is none, or it belongs to other data.
    """
    checkpoints = checkpoints_of_run(recipe)
    data = read_images_manifest(recipe.shards)
    return Subject(
        name=recipe.run_dir.absolute().name,
        weights=digest_of_weights(recipe, checkpoints),
        bound_to=digest_of(
            [data.channels, recipe.data.image_size, data.stored_size, list(data.classes)]
        ),
        heads=recipe.model.num_heads,
        load=partial(model_of_run, recipe, checkpoints),
    )


def subject_of_export(folder: Path) -> Subject:
    """Return an exported model.

    :raises ModelError: there is none.
    :raises UsageError: its format does not hold the model as PyTorch runs it.
    """
    settings = read_classifier_settings(folder)
    sizes = settings.channels, settings.image_size, settings.stored_size
    made_with = [*sizes, settings.classes]
    return exported(folder, settings, lambda: digest_of(made_with), partial(_load_export, folder))


def _load_export(folder: Path) -> ImageClassifier:
    from pipeline.classification.classifier import TorchClassifier, classifier_of_export

    classifier = classifier_of_export(folder)
    assert isinstance(classifier, TorchClassifier)  # of this format
    return classifier.model
