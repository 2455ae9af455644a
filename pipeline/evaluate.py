"""`./run.sh evaluate`: translate the test set, score it with sacreBLEU, log to MLflow."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.corpora import read_lines
from data_prep.stage import digest_of, read_manifest, write_atomically, write_json
from data_prep.vocabulary import load_vocabulary
from pipeline.checkpoint import Checkpoint, checkpoints_to_average
from pipeline.config import Recipe, run_command

if TYPE_CHECKING:
    from pipeline.translator import Translator

log = logging.getLogger("evaluate")

SAMPLES = 50  # translations in the table that MLflow shows


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Bring `RUN_DIR/evaluation/{scores.json, hypotheses.txt}` up to date.

    :returns: the contents of scores.json.
    :raises CheckpointError: nothing to evaluate, or it belongs to other data.
    """
    folder = recipe.run_dir / "evaluation"
    checkpoints = checkpoints_to_average(recipe)
    fingerprint = _fingerprint(recipe, checkpoints)
    known = _read_scores(folder)
    if known.get("fingerprint") == fingerprint:
        log.info("up to date, reused (%s)", folder)
        return known

    from pipeline.tracking import Tracker  # seconds of imports, only when there is work
    from pipeline.translator import Translator, untrained_model

    tags = [checkpoint.tag for checkpoint in checkpoints]
    log.info("test set %s, checkpoints %s", recipe.data.test.name, ", ".join(tags))
    sources = _lines(recipe, recipe.data.source_lang)
    references = _lines(recipe, recipe.data.target_lang)
    started = time.monotonic()
    hypotheses = _translate(Translator.of_run(recipe), sources, "translating")
    seconds = time.monotonic() - started
    scores: dict[str, Any] = {
        "test_set": recipe.data.test.name,
        "sentences": len(sources),
        **_score(recipe, hypotheses, references),
        "checkpoints": tags,
        "beam_size": recipe.evaluation.beam_size,
        "length_penalty": recipe.evaluation.length_penalty,
        "sentences_per_second": round(len(sources) / seconds, 2),
    }
    if recipe.evaluation.untrained_baseline:
        vocabulary = load_vocabulary(recipe.run_dir / "shards" / "spm.model")
        baseline = Translator(untrained_model(recipe), vocabulary, recipe.evaluation)
        untrained = _translate(baseline, sources, "translating with an untrained model")
        scores["untrained_bleu"] = _score(recipe, untrained, references)["bleu"]
    scores["fingerprint"] = fingerprint

    folder.mkdir(exist_ok=True)
    write_atomically(folder / "hypotheses.txt", "".join(f"{line}\n" for line in hypotheses))
    write_json(folder / "scores.json", scores)

    tracker = Tracker(recipe)
    metrics = {f"test_{name}": scores[name] for name in ("bleu", "chrf", "sentences_per_second")}
    if "untrained_bleu" in scores:
        metrics["untrained_bleu"] = scores["untrained_bleu"]
    tracker.log_metrics(metrics, step=checkpoints[-1].step)
    tracker.log_tags({"bleu_signature": scores["bleu_signature"], "test_set": scores["test_set"]})
    columns = {"source": sources, "translation": hypotheses, "reference": references}
    tracker.log_table(
        "translations.json", {name: lines[:SAMPLES] for name, lines in columns.items()}
    )
    tracker.log_artifact(folder / "hypotheses.txt", "evaluation")
    tracker.log_artifact(folder / "scores.json", "evaluation")
    tracker.close()
    return scores


def _fingerprint(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> str:
    return digest_of(
        {
            "evaluation": recipe.evaluation.model_dump(),
            "checkpoints": [checkpoint.info for checkpoint in checkpoints],
            "test": read_manifest(recipe.run_dir / "clean"),
        }
    )


def _read_scores(folder: Path) -> dict[str, Any]:
    try:
        scores: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return scores


def _lines(recipe: Recipe, language: str) -> list[str]:
    return list(read_lines(recipe.run_dir / "clean" / f"test.{language}"))


def _translate(translator: Translator, sources: Sequence[str], what: str) -> list[str]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=len(sources))
        return translator.translate(sources, lambda count: progress.advance(task, count))


def _score(
    recipe: Recipe, hypotheses: Sequence[str], references: Sequence[str]
) -> dict[str, float | str]:
    """BLEU and chrF of detokenised text against raw references, with signatures."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU(trg_lang=recipe.data.target_lang)), ("chrf", CHRF())):
        scores[name] = round(metric.corpus_score(hypotheses, [references]).score, 2)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def summary(recipe: Recipe, scores: dict[str, Any]) -> str:
    """The last line of a run."""
    untrained = scores.get("untrained_bleu")
    beside = f" (untrained model: {untrained})" if untrained is not None else ""
    try:
        state = recipe.run_dir / "tracking" / "run.json"
        run_id = json.loads(state.read_text(encoding="utf-8"))["run_id"]
    except (FileNotFoundError, ValueError, KeyError):
        run_id = "not sent yet"
    return (
        f"BLEU {scores['bleu']}{beside} on {scores['test_set']}, chrF {scores['chrf']} | "
        f"MLflow run {run_id} | dashboard: ./run.sh dashboard, then open http://127.0.0.1:5000"
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    print(summary(recipe, evaluate(recipe)))


if __name__ == "__main__":
    run_command("evaluate", "Translate the test set and score it.", main)
