"""The keys of a sweep's file, and whether its space fits the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, PositiveInt, Tag, model_validator
from pydantic import Field as Limit

from data_prep.section import Section
from pipeline.checkpoints.folder import Criterion
from pipeline.recipe import Recipe, UsageError
from pipeline.recipe_file import Draft, load_section, nearest_key_hint, recipe_keys
from pipeline.tasks import task_of

MOST_TRIED = 100  # values of a range that are compared with the recipe; of longer ones its ends


class Range(Section):
    """The numbers from `low` to `high`, both of them included."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm evenly."""

    step: float | None = Limit(default=None, gt=0)
    """Only `low`, `low` + `step`, …; of whole numbers it is 1 by default."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be less than high ({self.high:g})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0, and no step")
        if self.step is not None and not math.isclose(self.steps, round(self.steps)):
            raise ValueError("high must be low and a multiple of step")
        return self

    @property
    def steps(self) -> float:
        """Return how often the step is in the range."""
        return (self.high - self.low) / (self.step or 1)

    @property
    def is_whole(self) -> bool:
        """Tell whether all numbers that are given are whole ones."""
        return all(number.is_integer() for number in (self.low, self.high, self.step or 1.0))

    def tried(self, whole: bool) -> list[int] | list[float]:
        """Return the values that are compared with the recipe.

        :param whole: whether the range is one of whole numbers.
        """
        values = [self.low, self.high]
        if (self.step or (whole and not self.log)) and self.steps < MOST_TRIED:
            values = [self.low + n * (self.step or 1) for n in range(round(self.steps) + 1)]
        return [int(value) for value in values] if whole else values


class Choices(Section):
    """A few values; they have no order."""

    choices: tuple[Any, ...] = Limit(min_length=1)

    @model_validator(mode="after")
    def _are_different(self) -> Choices:
        try:
            different = {json.dumps(choice) for choice in self.choices}
        except TypeError as error:
            raise ValueError("choices: expected numbers, text, lists or mappings") from error
        equal = any(one == other for one, other in combinations(self.choices, 2))  # as 1 and true
        if equal or len(different) < len(self.choices):
            raise ValueError("choices: each value can be named once")
        return self


Dimension = Annotated[
    Annotated[Range, Tag("some range")] | Annotated[Choices, Tag("some choices")],
    Discriminator(
        lambda value: (
            "some choices"
            if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value)
            else "some range"
        )
    ),
]


class SweepConfig(Section):
    """A search for good values of some keys of a recipe."""

    trials: PositiveInt = 20
    """Trainings, those that were pruned or failed included. It may grow later."""

    metric: str | None = None
    """What validation must report, and trials are judged by: `valid_loss`, or the task's own
    (`valid_accuracy`; `valid_bleu` with training.bleu_every). null: the task's own."""

    seed: int = Limit(default=1, ge=0)
    """Seed of the parameters that are drawn."""

    sampler: Literal["tpe", "random"] = "tpe"
    """`tpe` learns from the trials before, after ten random ones; `random` does not."""

    pruner: Literal["median", "successive_halving", "none"] = "median"
    """Which trials end early: those that are worse than the median of others at the same step, once
    five are finished; those that are not in the best fourth at steps that grow fourfold; none. In
    warm-up none does."""

    space: dict[str, Dimension] = Limit(min_length=1)
    """What is searched: keys of the recipe's `model` and `training`, each with `{low, high}` and
    with `log: true` or `step` where wanted, or with `{choices: […]}`."""


def read_sweep(path: Path, draft: Draft) -> tuple[SweepConfig, Criterion]:
    """Read a sweep's file, and compare its space with a recipe.

    :param draft: the recipe.
    :returns: it, and what its trials are judged by.
    :raises UsageError: its one line names file, line, key, and what was expected.
    """
    config, where = load_section(path, SweepConfig)
    criterion = task_of(draft.recipe()).criterion
    judged_by = {"valid_loss": Criterion("valid_loss", False), criterion.metric: criterion}
    if (metric := config.metric or criterion.metric) not in judged_by:
        raise UsageError(
            f"{where(['metric'])}: `metric`: expected {' or '.join(judged_by)}, not {metric!r}"
        )
    for key, dimension in config.space.items():
        for problem in _problems(key, dimension, draft, criterion):
            raise UsageError(f"{where(['space', key])}: `space.{key}`: {problem}")
    return config, judged_by[metric]


def is_whole(recipe: type[Recipe], key: str) -> bool | None:
    """Tell whether a key of a recipe is a whole number; None: it is no number."""
    types = set(_types(dict(recipe_keys(recipe))[key].annotation))
    return None if types.isdisjoint({int, float}) else float not in types


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _problems(
    key: str, dimension: Range | Choices, draft: Draft, criterion: Criterion
) -> Iterator[str]:
    """Yield what is wrong with a key of the space."""
    if key not in dict(recipe_keys(draft.kind)):
        yield f"the recipe has no such key{nearest_key_hint(key, draft.kind)}"
        return
    section = key.split(".")[0]
    if section == "data":
        yield "trials share their shards, which keys of data shape: make a sweep for each value"
    elif section not in ("model", "training"):
        yield "only keys of model and training can be searched"
    elif isinstance(dimension, Range):
        whole = is_whole(draft.kind, key)
        if whole is None:
            yield "is no number; give it choices"
            return
        if whole and not dimension.is_whole:
            yield "low, high and step must be whole numbers"
        yield from _misfits(key, dimension.tried(whole), draft, criterion)
    else:
        yield from _misfits(key, dimension.choices, draft, criterion)


def _misfits(key: str, values: Any, draft: Draft, criterion: Criterion) -> Iterator[str]:
    """Yield why the recipe cannot have some of `values`."""
    for value in values:
        try:
            recipe = draft.recipe({key: value})
        except UsageError as error:
            yield f"{value!r} does not fit: {str(error).partition(': ')[2]}"
            continue
        if task_of(recipe).criterion != criterion:
            yield f"with {value!r} another metric says which model is best"
