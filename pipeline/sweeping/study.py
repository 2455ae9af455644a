"""Optuna's part of a sweep: which parameters a trial gets, and which of them is pruned or best.

Parameters depend on the seed, the number of the trial and the results before it alone, so a sweep
that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from data_prep.files import DataError, first_line
from data_prep.identity import differences
from pipeline.checkpoints.folder import Criterion
from pipeline.recipe import Recipe
from pipeline.sweeping.config import Choices, Range, SweepConfig, is_whole

NAME = "sweep"
# Keys of what Optuna keeps for us.
BEGAN_WITH, REASON, PRUNED_AT, WRITTEN = "began_with", "reason", "pruned_at", "written"

DRAWS = 1000  # of new values, before none are left

Parameters = Mapping[str, Any]


class Asked(NamedTuple):
    """A trial that is to be trained."""

    number: int
    parameters: Parameters
    """Values by their dotted keys."""


class Study:
    """Optuna's study, in a file."""

    def __init__(
        self, path: Path, config: SweepConfig, criterion: Criterion, recipe: Recipe
    ) -> None:
        """Open the study; a file that is not there is made.

        :param recipe: whose keys are searched.
        :raises DataError: the file is damaged.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self._config, self.criterion = config, criterion
        self._distributions = {
            key: _distribution(dimension, is_whole(type(recipe), key))
            for key, dimension in config.space.items()
        }
        url = f"sqlite:///{quote(str(path.absolute()))}"
        try:
            self._storage = optuna.storages.RDBStorage(url)
        except SQLAlchemyError as error:
            raise DataError(
                f"{path}: cannot be read as a sweep's study ({first_line(error)}); move its folder "
                "away to begin anew"
            ) from error
        self._direction = (
            StudyDirection.MAXIMIZE if criterion.larger_is_better else StudyDirection.MINIMIZE
        )
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=NAME,
            direction=self._direction,
            pruner=_pruner(config, recipe),
            load_if_exists=True,
        )

    @property
    def is_new(self) -> bool:
        """Whether nothing has been said of what it began with."""
        return BEGAN_WITH not in self._study.user_attrs

    def refuse_other(self, began_with: Mapping[str, Any]) -> None:
        """Compare what a sweep depends on with what it began with.

        :param began_with: JSON values.
        :raises DataError: they differ; it names the key and both values, and what to do.
        """
        before = self._study.user_attrs.get(BEGAN_WITH)
        for key, then, now in differences(before, began_with, "") if before else ():
            if key == ".sweep.trials" and int(now) > int(then):
                continue
            raise DataError(
                f"this sweep began with {key[1:]} {then}, now it is {now}; only trials may grow: "
                "undo that, or choose another run_dir"
            )
        if before != began_with:
            self._study.set_user_attr(BEGAN_WITH, began_with)

    @property
    def written(self) -> list[str]:
        """Return the digests of all that was written as the recipe of the best trial."""
        found: list[str] = self._study.user_attrs.get(WRITTEN, [])
        return found

    def note_written(self, digest: str) -> None:
        """Note what will be written as the recipe of the best trial."""
        if digest not in self.written:
            self._study.set_user_attr(WRITTEN, [*self.written, digest])

    # ── Trials ──────────────────────────────────────────────────────────────────────────────────

    @property
    def trials(self) -> list[FrozenTrial]:
        """Return all trials so far."""
        return self._study.get_trials(deepcopy=False)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Return those that are complete, pruned or failed."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    @property
    def best(self) -> FrozenTrial | None:
        """Return the best of the complete ones; of equal ones the first."""
        complete = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        found: FrozenTrial | None = self.criterion.best(
            complete, key=lambda trial: trial.value, default=None
        )
        return found

    def unfinished(self) -> list[Asked]:
        """Return the trials that an interrupted sweep has left."""
        running = [trial.number for trial in self.trials if trial.state == TrialState.RUNNING]
        return [self._asked(self._trial(number)) for number in running]

    def ask(self) -> Asked | None:
        """Return a new trial; None: no values are left that none has had.

        It is drawn in memory and enqueued at once, so that a kill leaves it with all of its
        parameters, or not there.
        """
        if not any(trial.state == TrialState.WAITING for trial in self.trials):
            parameters = self._draw()
            if parameters is None:
                return None
            self._study.enqueue_trial(parameters)
        return self._asked(self._study.ask())

    def _draw(self) -> dict[str, Any] | None:
        """Return what no trial has had: trained again with its seed, it would come to the same.

        :returns: None: there is nothing.
        """
        had, number = [trial.params for trial in self.trials], len(self.trials)
        for attempt in range(DRAWS):
            sampler = self._sampler(number) if attempt == 0 else self._random(number, attempt)
            drawn = optuna.create_study(direction=self._direction, sampler=sampler)
            if attempt == 0:
                drawn.add_trials(self.trials)
            parameters = drawn.ask(self._distributions).params
            if parameters not in had:
                return parameters
        return None

    def reported(self, number: int) -> dict[int, float]:
        """Return what was reported of a trial: step → value."""
        return self.trials[number].intermediate_values

    def report(self, number: int, step: int, value: float) -> None:
        """Note a validation of a trial that runs."""
        self._trial(number).report(value, step)

    def pruned_at(self, number: int) -> int | None:
        """Return the step at which what was reported of a trial has it end; None: it goes on.

        The answer is kept: successive halving gives it once.
        """
        noted = self.trials[number]
        if (step := noted.user_attrs.get(PRUNED_AT)) is None:
            if not noted.intermediate_values or not self._trial(number).should_prune():
                return None
            step = max(noted.intermediate_values)
            self._trial(number).set_user_attr(PRUNED_AT, step)
        return int(step)

    def complete(self, number: int, value: float) -> None:
        """Note how good a trial was."""
        self._study.tell(number, value)

    def prune(self, number: int) -> None:
        """Note that a trial has ended early."""
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Note why a trial has failed."""
        self._trial(number).set_user_attr(REASON, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def parameters(self, trial: FrozenTrial) -> Parameters:
        """Return a trial's values by their dotted keys."""
        space = self._config.space
        return {key: _value(space[key], label) for key, label in trial.params.items()}

    def _trial(self, number: int) -> Trial:
        study_id = self._storage.get_study_id_from_name(NAME)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return Trial(self._study, trial_id)

    def _asked(self, trial: Trial) -> Asked:
        """Return a trial with all of its parameters; a kill may have come between two of them."""
        for key, distribution in self._distributions.items():
            _take(trial, key, distribution)
        return Asked(trial.number, self.parameters(self.trials[trial.number]))

    def _sampler(self, number: int) -> BaseSampler:
        if self._config.sampler == "random":
            return self._random(number)
        return TPESampler(seed=self._seed(number), constant_liar=True)

    def _random(self, *place: int) -> RandomSampler:
        return RandomSampler(self._seed(*place))

    def _seed(self, *place: int) -> int:
        return int(np.random.SeedSequence([self._config.seed, *place]).generate_state(1)[0])


def _pruner(config: SweepConfig, recipe: Recipe) -> BasePruner:
    training = recipe.training
    warmup = _longest_warmup(config, training.warmup_steps)
    if config.pruner == "median":
        return MedianPruner(n_warmup_steps=warmup)
    if config.pruner == "successive_halving":
        first = max(training.validate_every, warmup)
        return SuccessiveHalvingPruner(min_resource=first)
    return NopPruner()


def _longest_warmup(config: SweepConfig, of_recipe: int) -> int:
    match config.space.get("training.warmup_steps"):
        case Choices() as dimension:
            return int(max(dimension.choices))
        case Range() as dimension:
            return int(dimension.high)
    return of_recipe


def _distribution(dimension: Range | Choices, whole: bool | None) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution([_label(choice) for choice in dimension.choices])
    low, high, log, step = dimension.low, dimension.high, dimension.log, dimension.step
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(float(low), float(high), log=log, step=step and float(step))


def _take(trial: Trial, key: str, distribution: BaseDistribution) -> None:
    """Have a trial take the value that was enqueued for it."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(key, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(
            key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(
            key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )


def _label(choice: Any) -> str | bool | int | float | None:
    """Return what Optuna calls a choice: lists and mappings by their JSON."""
    scalar = choice is None or isinstance(choice, str | bool | int | float)
    return choice if scalar else json.dumps(choice)


def _value(dimension: Range | Choices, label: Any) -> Any:
    if isinstance(dimension, Choices):
        labels = [_label(choice) for choice in dimension.choices]
        return dimension.choices[labels.index(label)]
    return label
