"""How well a model does on a test set: the files of a folder, and which of them MLflow gets."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from data_prep.files import (
    are_whole,
    digest_of,
    read_json,
    sha256_of,
    write_atomically,
    write_json,
)
from models.export_format import digest_of_export
from pipeline.checkpoints.folder import Checkpoint
from pipeline.ranks import from_rank_0
from pipeline.recipe import VALIDATION, Recipe, UsageError, slug_of
from pipeline.tracking.tracker import Tracker

Scores = dict[str, Any]  # contents of a scores.json

log = logging.getLogger("evaluate")

DIGEST = "scores_sha256"  # key of scores.json: the digest of all its others


def read_scores(folder: Path) -> Scores:
    """Return the content of scores.json; empty if it is missing, or not as it was written."""
    found = read_json(folder / "scores.json")
    return found if found.pop(DIGEST, None) == digest_of(found) else {}


def digest_of_weights(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> str:
    """Return a digest of the weights that evaluation takes from `checkpoints`."""
    infos = []
    for checkpoint in checkpoints:
        info = checkpoint.info.model_dump(mode="json", exclude={"run_dir"})
        del info["validation"]["validation_set"]
        # Checkpoints of older versions have neither, and are what they were.
        infos.append({k: v for k, v in info.items() if v or k not in ("base", "parts")})
    return digest_of([*recipe.chosen_weights, *infos])


@dataclass
class Result(ABC):
    """A model's answers to a test set, and their scores."""

    files: ClassVar[tuple[str, ...]]
    """Of the folder; the first is scores.json."""

    answers_file: ClassVar[str]
    """The one that has an answer a line."""

    page_file: ClassVar[str]
    """The one that is for people: all answers, to search and sort."""

    comparison: ClassVar[str]
    """The statistical test of `compare_with`."""

    logged_scores: ClassVar[tuple[str, ...]]
    """Those that become metrics."""

    logged_tags: ClassVar[dict[str, str]]
    """Those that become tags: key → what MLflow calls it."""

    folder: Path
    """RUN_DIR/evaluation/TEST_SET."""

    metric_prefix: str
    """What the names of its metrics in MLflow begin with."""

    fingerprint: str
    """A digest of everything that the scores depend on."""

    test_set_name: str

    test_set_sha256: str
    """A digest of what is in the test set."""

    scores: Scores = field(init=False)
    """Contents of scores.json; empty if there is none."""

    def __post_init__(self) -> None:
        self.scores = read_scores(self.folder)

    @property
    @abstractmethod
    def size(self) -> int:
        """Return how many examples the test set has."""

    @property
    @abstractmethod
    def line(self) -> str:
        """Return the scores in one line."""

    @abstractmethod
    def compare_with(self, answers: list[str]) -> dict[str, dict[str, float]]:
        """Compare with other answers to the same test set, the baseline.

        :returns: for each score the `difference` to the baseline's, and its `p`; the one that
            decides comes first.
        """

    @abstractmethod
    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """Return what MLflow shows as tables: name → columns."""

    def write_answers(self, answers: Sequence[str]) -> None:
        """Begin the folder anew: with the answers, one for each example, and without scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "scores.json").unlink(missing_ok=True)  # what is there describes all of them
        write_atomically(self.folder / self.answers_file, "".join(f"{each}\n" for each in answers))

    def write_scores(self, scores: Scores) -> None:
        """Write scores.json, after all other files of the folder, which it describes."""
        self.scores = {
            **scores,
            "test_set_sha256": self.test_set_sha256,
            "fingerprint": self.fingerprint,
            "files": {name: sha256_of(self.folder / name) for name in self.files[1:]},
        }
        digest = digest_of(json.loads(json.dumps(self.scores)))
        write_json(self.folder / "scores.json", {**self.scores, DIGEST: digest})

    @property
    def up_to_date(self) -> bool:
        """Tell whether all files are there and whole, made from what the fingerprint stands for."""
        made_from = self.scores.get("fingerprint")
        return made_from == self.fingerprint and are_whole(self.folder, self.scores["files"])

    @property
    def answers(self) -> list[str]:
        """Read the model's answers, one for each example."""
        return (self.folder / self.answers_file).read_text(encoding="utf-8").split("\n")[:-1]

    @property
    def artifact_folder(self) -> str:
        """Return the folder of the files in MLflow; each evaluation has its own."""
        what = self.scores.get("checkpoints", ["export"])[-1]
        return f"evaluation/{self.folder.name}/{what}-{self.fingerprint[:8]}"

    def log(self, tracker: Tracker) -> None:
        """Log scores, files, tables and tags to MLflow, but for what was logged before."""
        scores, name = self.scores, self.folder.name
        metrics = {
            f"{self.metric_prefix}{key}": scores[key] for key in self.logged_scores if key in scores
        }
        step = scores.get("step", 0)
        if name != VALIDATION:  # of which training has logged scores, too
            # Of several evaluations MLflow shows that of the highest step, and the last is meant.
            before = chain.from_iterable(tracker.history.get(key, ()) for key in metrics)
            step = max(step, *before, 0)
        tracker.log_metrics(metrics, step, once=list(metrics))
        for file in self.files:
            tracker.log_artifact(self.folder / file, self.artifact_folder)
        for kind, columns in self.tables().items():
            # Runs are compared by tables of the same name: the newest evaluation has it.
            tracker.log_table(f"{kind}/{name}.json", columns)
        if name != VALIDATION:  # which the run has as the data set of its validation
            profile = {"folder": str(self.folder.absolute()), "examples": self.size}
            digest = scores["test_set_sha256"][:16]
            tracker.log_input(scores["test_set"], digest, "evaluation", profile)
        # Tags come last: who compares with this evaluation finds it by them, complete.
        tags = {f"{called}.{name}": scores[key] for key, called in self.logged_tags.items()}
        tracker.log_tags({**tags, f"evaluation.{name}": self.artifact_folder})


P = TypeVar("P", bound=Recipe)
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class EvaluatedModel(ABC, Generic[P, R]):
    """The model to evaluate: the average of checkpoints of the run, or an exported model."""

    recipe: P

    checkpoints: Sequence[Checkpoint]
    """None of them if an export is evaluated."""

    export: Path | None
    """The folder of an exported model."""

    @abstractmethod
    def results(self) -> list[R]:
        """Return the results on the test sets, that of the recipe first: where the files of each
        belong, with the scores found there."""

    @abstractmethod
    def result_on_validation(self) -> R:
        """Return where the scores on the validation set belong: models are compared by them, so
        that the scores on test sets remain what they are for."""

    @abstractmethod
    def answer(self, missing: Sequence[R]) -> None:
        """Load the model, have it answer some test sets, on all ranks, and write the results."""

    def __str__(self) -> str:
        return str(self.export or ", ".join(checkpoint.tag for checkpoint in self.checkpoints))

    @cached_property
    def weights(self) -> str:
        """Return a digest of what the checkpoints hold."""
        return digest_of_weights(self.recipe, self.checkpoints)

    @cached_property
    def export_digest(self) -> str | None:
        """Return a digest of the export's files; None if checkpoints are evaluated."""
        return digest_of_export(self.export) if self.export else None

    @property
    def variant(self) -> str:
        """Return what the names of an export's results end with, to be beside the checkpoints'."""
        return f"--{slug_of(self.export.resolve().name)}" if self.export else ""

    @property
    def description(self) -> dict[str, Any]:
        """Return what scores.json says about the model."""
        if self.export:
            return {"model": str(self.export.absolute())}
        return {
            "checkpoints": [checkpoint.tag for checkpoint in self.checkpoints],
            "step": self.checkpoints[-1].step,
            "weights_sha256": self.weights,
        }


@dataclass(frozen=True)
class Evaluation(Generic[R]):
    """An evaluated model with its results."""

    model: EvaluatedModel[Any, R]

    results: list[R]
    """One for each test set, that of the recipe first."""

    validation: R | None
    """Of the run's checkpoints, which compete to be champion; an export does not."""

    @property
    def all_results(self) -> list[R]:
        """Return the results on the test sets, and that on the validation set."""
        return [*self.results, *filter(None, [self.validation])]

    @property
    def missing(self) -> list[R]:
        """Return the results that are not up to date."""
        return [result for result in self.all_results if not result.up_to_date]


def bring_up_to_date(find: Callable[[], EvaluatedModel[P, R]]) -> Evaluation[R]:
    """Bring `RUN_DIR/evaluation` up to date: a folder for each test set, and the validation set's.

    Every rank calls this; rank 0 decides, scores and writes.

    :param find: returns the model; rank 0 calls it.
    """
    evaluation, missing = from_rank_0(lambda: _find_results(find()))
    if missing:
        evaluation.model.answer(missing)
    return evaluation


def _find_results(model: EvaluatedModel[P, R]) -> tuple[Evaluation[R], list[R]]:
    """Return a model with its results, and those that are missing: rank 0 alone can tell."""
    results = model.results()
    for result in results:
        _refuse_to_replace(result, model.export)
        if result.up_to_date:
            log.info("%s: up to date, reused (%s)", result.test_set_name, result.folder)
    validation = None if model.export else model.result_on_validation()
    evaluation = Evaluation(model, results, validation)
    return evaluation, evaluation.missing


def _refuse_to_replace(result: Result, export: Path | None) -> None:
    """Check that the scores of an export would not take the place of another one's.

    :raises UsageError: they would.
    """
    other = result.scores.get("model")
    if export is None or other is None or result.up_to_date:
        return
    if Path(other).is_dir() and Path(other).resolve() != export.resolve():
        raise UsageError(
            f"{result.folder} has the scores of {other}, and those of {export} would be called the "
            "same: rename one of the two folders"
        )
