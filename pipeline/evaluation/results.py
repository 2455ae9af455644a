"""The scores of a test set: the files of a folder, and which of them MLflow gets."""

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
from pipeline.evaluation.test_sets import VALIDATION, TestSet
from pipeline.pictures import draw_bleu_by_length
from pipeline.tracking.tracker import Tracker
from pipeline.translation.scores import by_source_length, corpus_scores, sentence_scores, suspicious
from pipeline.translation_recipe import TranslationRecipe

log = logging.getLogger("evaluate")

FILES = ("scores.json", "hypotheses.txt", "sentences.tsv", "by_length.png")
LOGGED_SCORES = ("bleu", "chrf", "ter", "length_ratio", "sentences_per_second", "untrained_bleu")
TABLE_ROWS = {"first": 50, "worst": 20, "best": 20}  # sentences in MLflow's table
SENTENCE_COLUMNS = ("line", "chrf", "source", "translation", "reference")
USUAL_LENGTH_RATIO = (0.9, 1.1)  # of translations to references; beyond, a warning
WARNINGS = {
    "copied": "are their source again",
    "empty": "are empty",
    "overlong": "are more than twice as long as their reference",
}

Scores = dict[str, Any]  # contents of a scores.json
NUMBERS = ("bleu", "bleu_ci", "chrf", "ter", "length_ratio", "sentences")  # some of its keys
TEXTS = ("test_set", "bleu_signature", "test_set_sha256", "fingerprint")


def read_scores(folder: Path) -> Scores:
    """Return the content of scores.json; empty if it is missing or damaged."""
    found = read_json(folder / "scores.json")
    checkpoints, step = found.get("checkpoints", [""]), found.get("step", 0)
    whole = (
        all(type(found.get(key)) in (int, float) for key in NUMBERS)
        and all(isinstance(found.get(key), str) for key in TEXTS)
        and isinstance(checkpoints, list)
        and len(checkpoints) > 0
        and type(step) is int
    )
    return found if whole else {}


def weights_digest(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> str:
    """Return a digest of the weights that evaluation takes from `checkpoints`."""
    return digest_of(
        [
            recipe.evaluation.use_ema,
            recipe.evaluated_model.decoder_levels,
            *(c.info.model_dump(mode="json") for c in checkpoints),
        ]
    )


def scores_of(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> list[Scores]:
    """Return the scores in RUN_DIR/evaluation that belong to these checkpoints.

    Those of the recipe's own test set come first.
    """
    paths = sorted((recipe.run_dir / "evaluation").glob("*/scores.json"))
    found = [read_scores(path.parent) for path in paths]
    wanted = weights_digest(recipe, checkpoints)
    of_these = [scores for scores in found if scores.get("weights_sha256") == wanted]
    return sorted(of_these, key=lambda scores: scores["test_set"] != recipe.data.test.name)


@dataclass
class Result:
    """A test set, and how well a model has translated it."""

    test_set: TestSet
    folder: Path
    """RUN_DIR/evaluation/TEST_SET: scores.json, hypotheses.txt, sentences.tsv, by_length.png."""

    metric_prefix: str
    """What the names of its metrics in MLflow begin with."""

    fingerprint: str
    """A digest of everything that the scores depend on."""

    scores: Scores = field(init=False)
    """Contents of scores.json; empty if there is none."""

    def __post_init__(self) -> None:
        self.scores = read_scores(self.folder)

    @property
    def up_to_date(self) -> bool:
        """Tell whether all files are there, made from what the fingerprint stands for."""
        there = all((self.folder / name).is_file() for name in FILES)
        return there and self.scores.get("fingerprint") == self.fingerprint

    @property
    def hypotheses(self) -> list[str]:
        """Read the translations, one for each source sentence."""
        return (self.folder / "hypotheses.txt").read_text(encoding="utf-8").split("\n")[:-1]

    def write(
        self,
        hypotheses: Sequence[str],
        source_lengths: Sequence[int],
        target_lang: str,
        more: Mapping[str, Any],
    ) -> None:
        """Score the translations, warn of those that look wrong, and write the folder.

        :param source_lengths: of the source sentences, in tokens.
        :param more: further keys of scores.json.
        """
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
        (self.folder / "scores.json").unlink(missing_ok=True)  # what is there describes all of them
        write_atomically(self.folder / "hypotheses.txt", "".join(f"{h}\n" for h in hypotheses))
        self._write_sentences(hypotheses)
        title = f"BLEU {scores['bleu']} ± {scores['bleu_ci']} on {self.test_set.name}"
        draw_bleu_by_length(title, buckets, self.folder / "by_length.png")
        write_json(self.folder / "scores.json", scores)
        self.scores = scores

    def _warn(self, length_ratio: float, wrong: Mapping[str, Sequence[int]]) -> None:
        """Warn of suspicious translations, and of an unusual length ratio.

        :param wrong: row numbers of what `suspicious` found.
        """
        name = self.test_set.name
        for kind, rows in wrong.items():
            if rows:
                lines = ", ".join(str(row + 1) for row in rows[:5]) + (" …" if rows[5:] else "")
                text = "%s: %d translation(s) %s; line(s) %s"
                log.warning(text, name, len(rows), WARNINGS[kind], lines)
        low, high = USUAL_LENGTH_RATIO
        if not low <= length_ratio <= high:
            text = "%s: translations are %.2f times as long as the references"
            log.warning(text, name, length_ratio)

    def _write_sentences(self, hypotheses: Sequence[str]) -> None:
        """Write every sentence with its chrF2, the worst first."""
        references = self.test_set.references
        chrf = sentence_scores(hypotheses, references)
        joined = [" ‖ ".join(row) for row in zip(*references, strict=True)]
        lines = range(1, len(chrf) + 1)
        columns = (lines, chrf, self.test_set.sources, hypotheses, joined)
        rows: list[tuple[Any, ...]] = list(zip(*columns, strict=True))
        rows.sort(key=lambda row: (row[1], row[0]))
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t", lineterminator="\n")
        writer.writerow(SENTENCE_COLUMNS)
        writer.writerows(rows)
        write_atomically(self.folder / "sentences.tsv", text.getvalue())

    # ── In MLflow ───────────────────────────────────────────────────────────────────────────────

    @property
    def artifact_folder(self) -> str:
        """Return the folder of the files in MLflow; each evaluation has its own."""
        what = self.scores.get("checkpoints", ["export"])[-1]
        return f"evaluation/{self.folder.name}/{what}-{self.fingerprint[:8]}"

    def log(self, tracker: Tracker) -> None:
        """Log scores, files, a table and tags to MLflow, but for what was logged before."""
        scores, name = self.scores, self.folder.name
        metrics = {
            f"{self.metric_prefix}{key}": scores[key] for key in LOGGED_SCORES if key in scores
        }
        tracker.log_metrics(metrics, scores.get("step", 0), once=list(metrics))
        for file in FILES:
            tracker.log_artifact(self.folder / file, self.artifact_folder)
        table = self.artifact_folder.removeprefix("evaluation/").replace("/", "-")
        tracker.log_table(f"translations/{table}.json", self._translations_table())
        if name != VALIDATION:  # which the run has as the data set of its validation
            profile = {"folder": str(self.folder.absolute()), "sentences": scores["sentences"]}
            digest = scores["test_set_sha256"][:16]
            tracker.log_input(scores["test_set"], digest, "evaluation", profile)
        signature = scores["bleu_signature"]
        # Tags come last: who compares with this evaluation finds it by them, complete.
        tracker.log_tags(
            {f"bleu_signature.{name}": signature, f"evaluation.{name}": self.artifact_folder}
        )

    def _translations_table(self) -> dict[str, list[Any]]:
        """Return the first, worst and best translations as columns of a table."""
        with (self.folder / "sentences.tsv").open(encoding="utf-8", newline="") as file:
            worst_first = list(csv.reader(file, delimiter="\t"))[1:]
        order: dict[str, list[list[str]]] = {
            "first": sorted(worst_first, key=lambda row: int(row[0])),
            "worst": worst_first,
            "best": worst_first[::-1],
        }
        rows = [[why, *row] for why, some in order.items() for row in some[: TABLE_ROWS[why]]]
        names = ("shown as", *SENTENCE_COLUMNS)
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}
