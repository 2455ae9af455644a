"""`./run.sh evaluate`: translate the test set, score it with sacreBLEU, log to MLflow."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.corpora import read_lines
from data_prep.stage import digest_of, read_manifest, write_atomically, write_json
from data_prep.vocabulary import load_vocabularies
from pipeline.checkpoint import Checkpoint, checkpoints_to_average
from pipeline.config import DEFAULT_RECIPE, Recipe, load_recipe, run_command
from pipeline.metrics import score
from pipeline.tracking import Tracker, run_id_of, send_left_over

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
    if known.get("fingerprint") == fingerprint and (folder / "hypotheses.txt").exists():
        log.info("up to date, reused (%s)", folder)
        send_left_over(recipe)
        return known

    # Seconds of imports, only when there is work.
    from pipeline.translator import Translator, untrained_model

    tags = [checkpoint.tag for checkpoint in checkpoints]
    log.info("test set %s, checkpoints %s", recipe.data.test.name, ", ".join(tags))
    sources = _lines(recipe, recipe.data.source_lang)
    references = _lines(recipe, recipe.data.target_lang)
    started = time.monotonic()
    hypotheses = _translate(Translator.of_run(recipe, checkpoints), sources, "translating")
    seconds = time.monotonic() - started
    scores: dict[str, Any] = {
        "test_set": recipe.data.test.name,
        "sentences": len(sources),
        **score(hypotheses, references, recipe.data.target_lang),
        "checkpoints": tags,
        "step": checkpoints[-1].step,
        "beam_size": recipe.evaluation.beam_size,
        "length_penalty": recipe.evaluation.length_penalty,
        "sentences_per_second": round(len(sources) / seconds, 2),
    }
    if recipe.evaluation.untrained_baseline:
        vocabularies = load_vocabularies(recipe.run_dir / "shards")
        baseline = Translator(untrained_model(recipe), vocabularies, recipe.evaluation)
        untrained = _translate(baseline, sources, "translating with an untrained model")
        scores["untrained_bleu"] = score(untrained, references, recipe.data.target_lang)["bleu"]
    scores["fingerprint"] = fingerprint

    folder.mkdir(exist_ok=True)
    write_atomically(folder / "hypotheses.txt", "".join(f"{line}\n" for line in hypotheses))
    columns = {"source": sources, "translation": hypotheses, "reference": references}
    tracker = Tracker(recipe)
    _log(tracker, folder, scores, {name: lines[:SAMPLES] for name, lines in columns.items()})
    # Last: once it is there, the tracker's journal has everything too.
    write_json(folder / "scores.json", scores)
    tracker.close(status=None)  # whether the run is finished is training's to say
    return scores


def _log(
    tracker: Tracker, folder: Path, scores: dict[str, Any], samples: dict[str, list[str]]
) -> None:
    names = ("bleu", "chrf", "sentences_per_second", "untrained_bleu")
    metrics = {f"test_{name}": scores[name] for name in names if name in scores}
    tracker.log_metrics(metrics, scores["step"])
    tracker.log_tags({"bleu_signature": scores["bleu_signature"], "test_set": scores["test_set"]})
    name = f"{scores['checkpoints'][-1]}-{scores['fingerprint'][:8]}"
    tracker.log_table(f"translations/{name}.json", samples)
    tracker.log_json("evaluation/scores.json", scores)
    tracker.log_artifact(folder / "hypotheses.txt", "evaluation")


def _fingerprint(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> str:
    return digest_of(
        {
            "evaluation": recipe.evaluation.model_dump(),
            "seed": recipe.training.seed,  # of the untrained baseline
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


def summary(recipe: Recipe, scores: dict[str, Any]) -> str:
    """The last line of a run."""
    untrained = scores.get("untrained_bleu")
    beside = f" (untrained model: {untrained})" if untrained is not None else ""
    return (
        f"BLEU {scores['bleu']}{beside} on {scores['test_set']}, chrF {scores['chrf']} | "
        f"MLflow run {run_id_of(recipe) or 'not sent yet'} | dashboard: {_dashboard(recipe)}"
    )


def _dashboard(recipe: Recipe) -> str:
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        return uri
    found = uri == load_recipe(DEFAULT_RECIPE).tracking_uri
    option = "" if found else f" --tracking.uri {shlex.quote(uri)}"
    return f"./run.sh dashboard{option}, then open http://127.0.0.1:5000"


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    print(summary(recipe, evaluate(recipe)))


if __name__ == "__main__":
    run_command("evaluate", "Translate the test set and score it.", main)
