"""How well a model translates a test set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.checkpoints.folder import Checkpoint
from pipeline.evaluation.answers import read_table, write_answers_page, write_table
from pipeline.evaluation.result import Result, Scores, digest_of_weights, read_scores
from pipeline.evaluation.test_sets import TestSet, test_sets_at_hand
from pipeline.markdown import markdown_table
from pipeline.pictures import draw_bleu_by_length
from pipeline.recipe import slug_of
from pipeline.translation.scores import (
    by_source_length,
    corpus_scores,
    paired_bootstrap,
    sentence_scores,
    suspicious,
)
from pipeline.translation_recipe import TranslationRecipe

log = logging.getLogger("evaluate")

TABLE_ROWS = 100  # the first sentences, in MLflow's table
SENTENCE_COLUMNS = ("line", "chrf", "source", "translation", "reference")
NO_CELL = str.maketrans("\r\0", "  ")  # what would end a row of a table, or the table
USUAL_LENGTH_RATIO = (0.9, 1.1)  # of translations to references; beyond, a warning
WARNINGS = {
    "copied": "are their source again",
    "empty": "are empty",
    "overlong": "are more than twice as long as their reference",
}


def scores_of(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> list[Scores]:
    """Return the scores in RUN_DIR/evaluation of these checkpoints, translating as the recipe says
    now, on its test sets as they are now. Those of its own test set come first."""
    wanted = {
        "weights_sha256": digest_of_weights(recipe, checkpoints),
        "search": recipe.evaluation.search_of_checkpoints,
    }
    scores = []
    for name, sha256 in test_sets_at_hand(recipe):
        found = read_scores(recipe.evaluations / slug_of(name))
        is_same_text = sha256 in (None, found.get("test_set_sha256"))
        if is_same_text and {**wanted, "test_set": name}.items() <= found.items():
            scores.append(found)
    return scores


def table_of(scores: Sequence[Scores]) -> str:
    """Return scores on several test sets as a Markdown table, with half of their intervals."""
    names = ["test set", "sentences", "BLEU", "chrF2", "TER"]
    names += ["COMET"] * any("comet" in s for s in scores)
    names += ["length ratio", "beam", "in training text"]
    rows = []
    for s in scores:
        cells = [s["test_set"], f"{s['sentences']:,}"]
        cells += [f"{s[name]} ± {s[f'{name}_ci']}" for name in ("bleu", "chrf", "ter")]
        cells += [s.get("comet", "–")] * ("COMET" in names)
        cells += [s["length_ratio"], s["beam_size"], _leak_in_short(s)]
        rows.append(cells)
    return markdown_table(names, rows)


@dataclass
class TranslationResult(Result):
    """A test set, and how well a model has translated it."""

    files = (
        "scores.json", "hypotheses.txt", "sentences.tsv", "sentences.html", "by_length.png",
    )  # fmt: skip
    answers_file = "hypotheses.txt"
    page_file = "sentences.html"
    comparison = "paired bootstrap"
    logged_scores = (
        "bleu", "bleu_low", "bleu_high", "chrf", "ter", "length_ratio", "comet",
        "sentences_per_second", "untrained_bleu",
    )  # fmt: skip
    logged_tags: ClassVar[dict[str, str]] = {"bleu_signature": "bleu_signature"}

    test_set: TestSet
    target_lang: str

    @property
    def size(self) -> int:
        return len(self.test_set.sources)

    @property
    def line(self) -> str:
        scores = self.scores
        untrained = scores.get("untrained_bleu")
        beside = f" (untrained model: {untrained})" if untrained is not None else ""
        comet = f", COMET {scores['comet']}" if "comet" in scores else ""
        return (
            f"BLEU {scores['bleu']} ± {scores['bleu_ci']}{beside} on {scores['test_set']}, "
            f"chrF2 {scores['chrf']}, TER {scores['ter']}{comet}{_leak(scores)}"
        )

    def compare_with(self, answers: list[str]) -> dict[str, dict[str, float]]:
        references = self.test_set.references
        return paired_bootstrap(answers, self.answers, references, self.target_lang)

    def write(
        self,
        hypotheses: Sequence[str],
        source_lengths: Sequence[int],
        more: Mapping[str, Any],
    ) -> None:
        """Score the translations, warn of those that look wrong, and write the folder.

        :param source_lengths: of the source sentences, in tokens.
        :param more: further keys of scores.json.
        """
        sources, references = self.test_set.sources, self.test_set.references
        wrong = suspicious(sources, hypotheses, references)
        buckets = by_source_length(source_lengths, hypotheses, references, self.target_lang)
        found = corpus_scores(hypotheses, references, self.target_lang)
        scores = {
            "test_set": self.test_set.name,
            "sentences": len(sources),
            "references": len(references),
            **found,
            "bleu_low": round(max(0.0, found["bleu"] - found["bleu_ci"]), 2),
            "bleu_high": round(min(100.0, found["bleu"] + found["bleu_ci"]), 2),
            **{kind: len(rows) for kind, rows in wrong.items()},
            "copy_rate": round(len(wrong["copied"]) / len(sources), 4),
            "by_source_length": buckets,
            **more,
        }
        self._warn(scores["length_ratio"], wrong)
        self.write_answers(hypotheses)
        title = f"BLEU {scores['bleu']} ± {scores['bleu_ci']} on {self.test_set.name}"
        self._write_sentences(title, hypotheses)
        draw_bleu_by_length(title, buckets, self.folder / "by_length.png")
        self.write_scores(scores)

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

    def _write_sentences(self, title: str, hypotheses: Sequence[str]) -> None:
        """Write every sentence with its chrF2, the worst first."""
        references = self.test_set.references
        chrf = sentence_scores(hypotheses, references)
        joined = [" ‖ ".join(row) for row in zip(*references, strict=True)]
        lines = range(1, len(chrf) + 1)
        texts = (
            [text.translate(NO_CELL) for text in column]
            for column in (self.test_set.sources, hypotheses, joined)
        )
        columns = (lines, chrf, *texts)
        rows: list[tuple[Any, ...]] = list(zip(*columns, strict=True))
        rows.sort(key=lambda row: (row[1], row[0]))
        write_table(self.folder / "sentences.tsv", SENTENCE_COLUMNS, rows)
        page = self.folder / self.page_file
        write_answers_page(page, title, SENTENCE_COLUMNS, rows, "sentences.tsv")

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        rows = sorted(read_table(self.folder / "sentences.tsv"), key=lambda row: int(row["line"]))
        # Where runs are compared, MLflow shows the second column of each for the same first.
        kinds = {"source": str, "translation": str, "reference": str, "chrf": float, "line": int}
        return {
            "translations": {
                name: [kind(row[name]) for row in rows[:TABLE_ROWS]] for name, kind in kinds.items()
            }
        }


def _leak_in_short(scores: Scores) -> str:
    """Return how much of a test set the training text has."""
    overlap = scores.get("in_training_text")
    if overlap is None:
        return "not known"
    if not any(overlap.values()):
        return "none"
    return f"{overlap['sources']:,} sources, {overlap['references']:,} references"


def _leak(scores: Scores) -> str:
    """Return what to say beside a score of sentences that the model may have learnt by heart."""
    overlap = scores["in_training_text"]
    if overlap is None:
        return " (whether its sentences are in the training text is not known here)"
    if not any(overlap.values()):
        return ""
    return (
        f" (of its {scores['sentences']} sentences the training text has {overlap['sources']} "
        f"sources and {overlap['references']} references)"
    )
