"""Is this evaluation better than that of another MLflow run? Paired bootstrap says."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.results import Result
from pipeline.recipe import Recipe
from pipeline.tracking.mlflow_records import client_of, short
from pipeline.translation.scores import paired_bootstrap

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("evaluate")

SIGNIFICANT = 0.05  # p below which a difference counts


class ComparisonError(Exception):
    """There is nothing to compare with."""


@dataclass(frozen=True)
class LoggedEvaluation:
    """An evaluation as MLflow has it."""

    run_id: str
    test_set_sha256: str
    hypotheses: list[str]


@dataclass(frozen=True)
class Comparison:
    """With another evaluation of the same test set."""

    of: str
    """MLflow run id of the other."""

    scores: dict[str, dict[str, float]]
    """Of `metrics.paired_bootstrap`."""

    @property
    def better(self) -> bool:
        """Whether this evaluation has the higher BLEU, and not by chance."""
        bleu = self.scores["bleu"]
        return bleu["difference"] > 0 and bleu["p"] < SIGNIFICANT

    @property
    def file_name(self) -> str:
        return f"compared-with-{self.of}.json"

    @property
    def content(self) -> dict[str, Any]:
        return {"run_id": self.of, **self.scores}

    def __str__(self) -> str:
        names = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER"}
        parts = [
            f"{score['difference']:+.2f} {names[name]}, p = {score['p']:.3f}"
            for name, score in self.scores.items()
        ]
        return f"{'; '.join(parts)} (paired bootstrap against run {self.of})"


def evaluations_of_run(recipe: Recipe, run_id: str) -> dict[str, LoggedEvaluation]:
    """The newest evaluation of each test set in an MLflow run, by the name of its folder.

    :raises ComparisonError: there is no such run, or none can be had.
    """
    client = client_of(recipe.tracking_uri)
    try:
        tags = client.get_run(run_id).data.tags
    except Exception as error:  # whatever MLflow or the network says
        raise ComparisonError(f"--baseline {run_id}: {short(error)}") from error
    found = {
        name.removeprefix("evaluation."): logged(client, run_id, folder)
        for name, folder in tags.items()
        if name.startswith("evaluation.")
    }
    there = {name: evaluation for name, evaluation in found.items() if evaluation is not None}
    if not there:
        raise ComparisonError(
            f"--baseline {run_id}: that run has no evaluation; `./run.sh evaluate` makes one"
        )
    return there


def logged(client: MlflowClient, run_id: str, folder: str) -> LoggedEvaluation | None:
    """:param folder: of artifacts. :returns: None if the files are not (all) there."""
    with tempfile.TemporaryDirectory() as place:
        try:
            paths = [
                Path(client.download_artifacts(run_id, f"{folder}/{name}", place))
                for name in ("scores.json", "hypotheses.txt")
            ]
            scores, hypotheses = (path.read_text(encoding="utf-8") for path in paths)
            return LoggedEvaluation(
                run_id, json.loads(scores)["test_set_sha256"], hypotheses.split("\n")[:-1]
            )
        except Exception as error:  # whatever MLflow or the network says
            log.warning("%s of run %s: %s", folder, run_id, short(error))
            return None


def compare_all(
    recipe: Recipe, results: Sequence[Result], baseline: Mapping[str, LoggedEvaluation]
) -> list[tuple[Result, Comparison]]:
    """Compare on each test set that both have."""
    compared = []
    for result in results:
        other = baseline.get(result.test_set.slug)
        if other is None:
            log.warning("%s: not compared, the baseline has no such test set", result.test_set.name)
        elif (comparison := compare(recipe, result, other)) is None:
            text = "%s: not compared, the baseline was scored on other sentences"
            log.warning(text, result.test_set.name)
        else:
            compared.append((result, comparison))
    return compared


def compare(recipe: Recipe, result: Result, other: LoggedEvaluation) -> Comparison | None:
    """:returns: None if the other evaluation is of other sentences."""
    if other.test_set_sha256 != result.test_set.sha256:
        return None
    references, language = result.test_set.references, recipe.data.target_lang
    scores = paired_bootstrap(other.hypotheses, result.hypotheses, references, language)
    return Comparison(other.run_id, scores)
