"""Is this evaluation better than that of another MLflow run? Paired bootstrap says."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Recipe
from pipeline.metrics import paired_bootstrap
from pipeline.mlflow_records import client_of, short
from pipeline.results import Result

if TYPE_CHECKING:
    from mlflow import MlflowClient

SIGNIFICANT = 0.05  # p below which a difference counts


class ComparisonError(Exception):
    """There is nothing to compare with."""


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


def compare_with_run(
    recipe: Recipe, results: Sequence[Result], run_id: str
) -> list[tuple[Result, Comparison]]:
    """Compare with the newest evaluations of an MLflow run, of each test set that it has too.

    :raises ComparisonError: there is no such run, or it has none of the test sets.
    """
    client = client_of(recipe.tracking_uri)
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException as error:
        raise ComparisonError(f"--baseline {run_id}: {short(error)}") from error
    compared = []
    for result in results:
        folder = tags.get(f"evaluation.{result.test_set.slug}")
        if folder and (comparison := compare(client, result, run_id, folder, recipe)):
            compared.append((result, comparison))
    if not compared:
        names = ", ".join(result.test_set.name for result in results)
        raise ComparisonError(
            f"--baseline {run_id}: that run has no evaluation of the same sentences ({names}); "
            "./run.sh evaluate makes one"
        )
    return compared


def compare(
    client: MlflowClient, result: Result, run_id: str, folder: str, recipe: Recipe
) -> Comparison | None:
    """:param folder: artifacts of an evaluation of run `run_id`. :returns: None if it is of other
    sentences."""
    with tempfile.TemporaryDirectory() as place:
        files = Path(client.download_artifacts(run_id, folder, place))
        theirs = json.loads((files / "scores.json").read_text(encoding="utf-8"))
        baseline = (files / "hypotheses.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if theirs["test_set_sha256"] != result.test_set.sha256:
        return None
    references, language = result.test_set.references, recipe.data.target_lang
    return Comparison(run_id, paired_bootstrap(baseline, result.hypotheses, references, language))
