"""What the models of each task are where they are registered, and served from there alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.serving import png_of
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.images import ImageResult
from pipeline.evaluation.result import Result
from pipeline.evaluation.translations import TranslationResult
from pipeline.publishing.exports import export
from pipeline.publishing.image_exports import export_classifier
from pipeline.recipe import Recipe, slug_of
from pipeline.translation_recipe import TranslationRecipe

SERVED = (
    "data_prep/__init__.py",
    "data_prep/section.py",
    "models/__init__.py",
    "models/config.py",
    "models/export_format.py",
    "models/search_config.py",
    "pipeline/__init__.py",
)
SERVED_TRANSLATION = (
    *SERVED,
    "data_prep/text.py",
    "pipeline/translation/__init__.py",
    "pipeline/translation/ctranslate2_translator.py",
    "pipeline/translation/serving.py",
)


def _model_name(recipe: Recipe, result: Result, *more: str) -> str:
    """Return a name for the registered model. MLflow takes none with `/` or `:`, which an
    experiment may have."""
    name = "-".join([recipe.tracking.experiment, *more, slug_of(result.test_set_name)])
    return re.sub("[/:]", "-", name)


@dataclass(frozen=True)
class Servable:
    """What a task's models are where they are registered."""

    default_name: str
    """Of the registered model, if the recipe gives none."""

    export: Callable[[Path], None]
    """Writes the model, as it is served, into a folder."""

    program: str
    """The file beside this one that MLflow runs."""

    code: tuple[str, ...]
    """All of our code that it needs."""

    packages: tuple[str, ...]
    """What has to be installed."""

    example: list[Any]
    """What it can be given."""

    tags: tuple[str, ...]
    """Scores of the test set that a version shows."""


def servable_translation(
    recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint], result: TranslationResult
) -> Servable:
    """Return how the average of checkpoints is served: by CTranslate2.

    :param result: of these checkpoints on the test set.
    """
    languages = f"{recipe.data.source_lang}-{recipe.data.target_lang}"
    return Servable(
        default_name=_model_name(recipe, result, languages),
        export=lambda folder: export(recipe, folder, "ctranslate2", checkpoints=checkpoints),
        program="served_translator.py",
        code=SERVED_TRANSLATION,
        packages=("mlflow", "ctranslate2", "pydantic", "sentencepiece"),
        example=[line for line in result.test_set.sources if line.strip()][:2],
        tags=("bleu", "bleu_ci", "bleu_signature"),
    )


SERVED_CLASSIFIER = (
    *SERVED,
    "data_prep/files.py",
    "data_prep/images/__init__.py",
    "data_prep/images/read.py",
    "pipeline/classification/__init__.py",
    "pipeline/classification/serving.py",
)


def servable_classifier(
    recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint], result: ImageResult
) -> Servable:
    """Return how the average of checkpoints is served: by ONNX Runtime.

    :param result: of these checkpoints on the test set.
    """
    images, _ = result.reader.read(np.arange(1))
    return Servable(
        default_name=_model_name(recipe, result),
        export=lambda folder: export_classifier(recipe, folder, checkpoints=checkpoints),
        program="served_classifier.py",
        code=SERVED_CLASSIFIER,
        packages=("mlflow", "numpy", "onnxruntime", "pillow", "pydantic"),
        example=[png_of(images[0])],
        tags=("accuracy", "accuracy_low", "accuracy_high"),
    )
