"""What the models of each task are where they are registered, and served from there alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints.folder import Checkpoint
from pipeline.evaluation.translations import TranslationResult
from pipeline.publishing.exports import export
from pipeline.translation_recipe import TranslationRecipe

SERVED_TRANSLATION = (
    "data_prep/__init__.py",
    "data_prep/text.py",
    "models/__init__.py",
    "models/export_format.py",
    "pipeline/__init__.py",
    "pipeline/translation/__init__.py",
    "pipeline/translation/serving.py",
)


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
        default_name=f"{recipe.tracking.experiment}-{languages}-{result.test_set.slug}",
        export=lambda folder: export(recipe, folder, "ctranslate2", checkpoints=checkpoints),
        program="served_translator.py",
        code=SERVED_TRANSLATION,
        packages=("mlflow", "ctranslate2", "sentencepiece"),
        example=[line for line in result.test_set.sources if line.strip()][:2],
        tags=("bleu", "bleu_ci", "bleu_signature"),
    )
