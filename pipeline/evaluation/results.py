"""The scores of a test set: a folder of files, and what MLflow gets of it."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import digest_of, read_json, write_atomically, write_json
from pipeline.checkpoints.folder import Checkpoint
from pipeline.evaluation.test_sets import TestSet
from pipeline.recipe import Recipe
from pipeline.tracking.tracker import Tracker
from pipeline.translation.scores import by_source_length, corpus_scores, sentence_scores, suspicious

log = logging.getLogger("evaluate")

FILES = ("scores.json", "hypotheses.txt", "sentences.tsv", "by_length.png")
LOGGED = ("bleu", "chrf", "ter", "length_ratio", "sentences_per_second", "untrained_bleu")
TABLE = {"first": 50, "worst": 20, "best": 20}  # sentences in the table that MLflow shows
COLUMNS = ("line", "chrf", "source", "translation", "reference")
LENGTH_RATIO = (0.9, 1.1)  # of translations to references; outside it there is a warning
WRONG = {
    "copied": "are their source again",
    "empty": "are empty",
    "overlong": "are more than twice as long as their reference",
}


Scores = dict[str, Any]  # contents of a scores.json


def weights_digest(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> str:
    """Of the weights that evaluation takes from them."""
    return digest_of(
        [recipe.evaluation.use_ema, *(c.info.model_dump(mode="json") for c in checkpoints)]
    )


def scores_of(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[Scores]:
    """Those in RUN_DIR/evaluation that are of these checkpoints; of the recipe's test set first."""
    paths = sorted((recipe.run_dir / "evaluation").glob("*/scores.json"))
    found = [read_json(path) for path in paths]
    wanted = weights_digest(recipe, checkpoints)
    of_these = [scores for scores in found if scores.get("weights_sha256") == wanted]
    return sorted(of_these, key=lambda scores: scores["test_set"] != recipe.data.test.name)


@dataclass
class Result:
    """A test set, and how well it was translated."""

    test_set: TestSet
    folder: Path
    """RUN_DIR/evaluation/TEST_SET: scores.json, hypotheses.txt, sentences.tsv, by_length.png."""

    metric_prefix: str
    fingerprint: str
    """Of everything that the scores depend on."""

    scores: Scores = field(init=False)
    """Empty if there are none."""

    def __post_init__(self) -> None:
        self.scores = read_json(self.folder / "scores.json")

    @property
    def up_to_date(self) -> bool:
        there = all((self.folder / name).is_file() for name in FILES)
        return there and self.scores.get("fingerprint") == self.fingerprint

    @property
    def hypotheses(self) -> list[str]:
        return (self.folder / "hypotheses.txt").read_text(encoding="utf-8").split("\n")[:-1]

    def write(
        self,
        hypotheses: Sequence[str],
        source_lengths: Sequence[int],
        target_lang: str,
        more: Mapping[str, Any],
    ) -> None:
        """Score, warn of what looks wrong, and write the folder.

        :param source_lengths: in tokens. :param more: what else scores.json says.
        """
        from pipeline.pictures import draw_bleu_by_length

        sources, references = self.test_set.sources, self.test_set.references
        wrong = suspicious(sources, hypotheses, references)
        buckets = by_source_length(source_lengths, hypotheses, references, target_lang)
        scores = {
            "test_set": self.test_set.name,
            "sentences": len(sources),
            "references": len(references),
            **corpus_scores(hypotheses, references, target_lang),
            **{kind: len(rows) for kind, rows in wrong.items()},
            "copy_rate": round(len(wrong["copied"]) / len(sources), 4),
            "by_source_length": buckets,
            **more,
            "test_set_sha256": self.test_set.sha256,
            "fingerprint": self.fingerprint,
        }
        self._warn(scores["length_ratio"], wrong)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "scores.json").unlink(missing_ok=True)  # it goes with the other files
        write_atomically(self.folder / "hypotheses.txt", "".join(f"{h}\n" for h in hypotheses))
        self._write_sentences(hypotheses)
        title = f"BLEU {scores['bleu']} ± {scores['bleu_ci']} on {self.test_set.name}"
        draw_bleu_by_length(title, buckets, self.folder / "by_length.png")
        write_json(self.folder / "scores.json", scores)
        self.scores = scores

    def _warn(self, length_ratio: float, wrong: Mapping[str, Sequence[int]]) -> None:
        name = self.test_set.name
        for kind, rows in wrong.items():
            if rows:
                lines = ", ".join(str(row + 1) for row in rows[:5]) + (" …" if rows[5:] else "")
                text = "%s: %d translation(s) %s; line(s) %s"
                log.warning(text, name, len(rows), WRONG[kind], lines)
        low, high = LENGTH_RATIO
        if not low <= length_ratio <= high:
            text = "%s: translations are %.2f times as long as the references"
            log.warning(text, name, length_ratio)

    def _write_sentences(self, hypotheses: Sequence[str]) -> None:
        """Every sentence with its chrF2, the worst first."""
        references = self.test_set.references
        chrf = sentence_scores(hypotheses, references)
        joined = [" ‖ ".join(row) for row in zip(*references, strict=True)]
        lines = range(1, len(chrf) + 1)
        columns = (lines, chrf, self.test_set.sources, hypotheses, joined)
        rows: list[tuple[Any, ...]] = list(zip(*columns, strict=True))
        rows.sort(key=lambda row: (row[1], row[0]))
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        write_atomically(self.folder / "sentences.tsv", text.getvalue())

    # ── In MLflow ───────────────────────────────────────────────────────────────────────────────

    @property
    def artifact_folder(self) -> str:
        """Where MLflow has the files: another place for another evaluation."""
        what = self.scores.get("checkpoints", ["export"])[-1]
        return f"evaluation/{self.folder.name}/{what}-{self.fingerprint[:8]}"

    def log(self, tracker: Tracker) -> None:
        """Log what MLflow does not have yet."""
        scores, name = self.scores, self.folder.name
        metrics = {f"{self.metric_prefix}{key}": scores[key] for key in LOGGED if key in scores}
        tracker.log_metrics(metrics, scores.get("step", 0), once=list(metrics))
        for file in FILES:
            tracker.log_artifact(self.folder / file, self.artifact_folder)
        table = self.artifact_folder.removeprefix("evaluation/").replace("/", "-")
        tracker.log_table(f"translations/{table}.json", self._table())
        profile = {"folder": str(self.folder.absolute()), "sentences": scores["sentences"]}
        digest = scores["test_set_sha256"][:16]
        tracker.log_input(scores["test_set"], digest, "evaluation", profile)
        signature = scores["bleu_signature"]
        # Last: with it the evaluation is complete for those who compare with it.
        tracker.log_tags(
            {f"bleu_signature.{name}": signature, f"evaluation.{name}": self.artifact_folder}
        )

    def _table(self) -> dict[str, list[Any]]:
        with (self.folder / "sentences.tsv").open(encoding="utf-8", newline="") as file:
            worst_first = list(csv.reader(file, delimiter="\t"))[1:]
        order: dict[str, list[list[str]]] = {
            "first": sorted(worst_first, key=lambda row: int(row[0])),
            "worst": worst_first,
            "best": worst_first[::-1],
        }
        rows = [[why, *row] for why, some in order.items() for row in some[: TABLE[why]]]
        names = ("shown as", *COLUMNS)
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}
