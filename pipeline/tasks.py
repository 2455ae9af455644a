"""The task of a recipe."""

from __future__ import annotations

from typing import Any

from pipeline.classification.task import ClassificationTask
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import Recipe
from pipeline.training.task import Task
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe


def task_of(recipe: Recipe) -> Task[Any]:
    """Return the task that a recipe describes."""
    if isinstance(recipe, ClassificationRecipe):
        return ClassificationTask(recipe)
    assert isinstance(recipe, TranslationRecipe)
    return TranslationTask(recipe)
