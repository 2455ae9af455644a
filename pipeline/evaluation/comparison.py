"""Compare an evaluation with that of another MLflow run."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.result import Result
from pipeline.recipe import Recipe, slug_of
from pipeline.tracking.mlflow_records import client_of, describe_error

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("evaluate")

NAMES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "accuracy": "points of accuracy"}
SIGNIFICANT = 0.05  # a difference counts when its p is below this


class ComparisonError(Exception):
    """There is no evaluation to compare with."""


@dataclass(frozen=True)
class LoggedEvaluation:
    """An evaluation that was logged to MLflow."""

    run_id: str
    test_set_sha256: str
    answers: list[str]


@dataclass(frozen=True)
class Comparison:
    """How an evaluation compares with another one of the same test set."""

    other_run_id: str
    """MLflow run id of the other evaluation."""

    scores: dict[str, dict[str, float]]
    """What `Result.compare_with` returned, with the other as the baseline."""

    test: str
    """The statistical test."""

    @property
    def p(self) -> float:
        """Return the p-value of the score that decides."""
        return next(iter(self.scores.values()))["p"]

    @property
    def better(self) -> bool:
        """Tell whether this evaluation has the higher score, and not by chance."""
        decides = next(iter(self.scores.values()))
        return decides["difference"] > 0 and self.p < SIGNIFICANT

    @property
    def file_name(self) -> str:
        """Return the name of the artifact that holds `content`."""
        return f"compared-with-{self.other_run_id}.json"

    @property
    def content(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {"run_id": self.other_run_id, **self.scores}

    def __str__(self) -> str:
        parts = [
            f"{score['difference']:+.2f} {NAMES[name]}, p = {score['p']:.3f}"
            for name, score in self.scores.items()
        ]
        return f"{'; '.join(parts)} ({self.test} against run {self.other_run_id})"


def evaluations_of_run(
    recipe: Recipe, run_id: str, kind: type[Result]
) -> dict[str, LoggedEvaluation]:
    """Download the newest evaluation of each test set in an MLflow run.

    :param kind: of results that they are to be compared with.
    :returns: evaluations by the names of their folders in RUN_DIR/evaluation.
    :raises ComparisonError: there is no such run, or it has no evaluation that can be downloaded.
    """
    client = client_of(recipe)
    try:
        tags = client.get_run(run_id).data.tags
    except Exception as error:  # MLflow's and the network's are of many types
        raise ComparisonError(f"--baseline {run_id}: {describe_error(error)}") from error
    found = {
        name.removeprefix("evaluation."): download_evaluation(client, run_id, folder, kind)
        for name, folder in tags.items()
        if name.startswith("evaluation.")
    }
    there = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    if not there:
        reason = (
            "none of its evaluations can be downloaded, as said above"
            if found
            else "that run has no evaluation; `./run.sh evaluate` makes one"
        )
        raise ComparisonError(f"--baseline {run_id}: {reason}")
    return there


def download_evaluation(
    client: MlflowClient, run_id: str, folder: str, kind: type[Result]
) -> LoggedEvaluation | None:
    """Download an evaluation from MLflow.

    :param folder: of its artifacts.
    :param kind: of results that it is to be compared with.
    :returns: the evaluation; None, after a warning, if one of its files cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as place:
        try:
            paths = [
                Path(client.download_artifacts(run_id, f"{folder}/{name}", place))
                for name in ("scores.json", kind.answers_file)
            ]
            scores, answers = (path.read_text(encoding="utf-8") for path in paths)
            return LoggedEvaluation(
                run_id, json.loads(scores)["test_set_sha256"], answers.split("\n")[:-1]
            )
        except Exception as error:  # MLflow's and the network's are of many types
            log.warning("%s of run %s: %s", folder, run_id, describe_error(error))
            return None


def compare_all(
    results: Sequence[Result], baseline: Mapping[str, LoggedEvaluation]
) -> list[tuple[Result, Comparison]]:
    """Compare results with a baseline on each test set that both have; warn of the others.

    :param baseline: evaluations by the names of their folders.
    """
    compared = []
    for result in results:
        other = baseline.get(slug_of(result.test_set_name))
        if other is None:
            log.warning("%s: not compared, the baseline has no such test set", result.test_set_name)
        elif (comparison := compare(result, other)) is None:
            text = "%s: not compared, the baseline was scored on other examples, or not on all"
            log.warning(text, result.test_set_name)
        else:
            compared.append((result, comparison))
    return compared


def compare(result: Result, other: LoggedEvaluation) -> Comparison | None:
    """Compare a result with another evaluation.

    :returns: the comparison; None if the other evaluation is of another test set, or not whole.
    """
    if (other.test_set_sha256, len(other.answers)) != (result.test_set_sha256, result.size):
        return None
    return Comparison(other.run_id, result.compare_with(other.answers), result.comparison)
