"""The task of a recipe."""

from __future__ import annotations

from typing import Any

from pipeline.recipe import Recipe
from pipeline.training.task import Task
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe


def task_of(recipe: Recipe) -> Task[Any]:
    """Return the task that a recipe describes."""
    assert isinstance(recipe, TranslationRecipe)
    return TranslationTask(recipe)
