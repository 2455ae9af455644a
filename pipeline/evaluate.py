"""`./run.sh evaluate`: translate test sets, score them with sacreBLEU, log to MLflow, and register
the model. `deepspeed pipeline/evaluate.py` shares the sentences among ranks.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command_line import DEFAULT_RECIPE, given_evaluation, load_recipe, run_command
from pipeline.evaluation.comparison import Logged, compare_all, evaluations_of_run
from pipeline.evaluation.evaluator import Subject, evaluate, rank, world_size
from pipeline.evaluation.results import Result, Scores
from pipeline.publishing.registry import register
from pipeline.recipe import SEARCH, Recipe
from pipeline.tracking.open import open_tracker
from pipeline.tracking.provenance import log_data
from pipeline.tracking.tracker import run_id_of

log = logging.getLogger("evaluate")


if TYPE_CHECKING:
    pass


PATIENCE = timedelta(hours=2)  # of the other ranks while rank 0 scores and registers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="folder written by `export`; default: the run's checkpoints"
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN_ID",
        help="MLflow run to compare with by paired bootstrap, on each test set that it has too",
    )


# ── From start to end ───────────────────────────────────────────────────────────────────────────


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    for chatty in ("sacrebleu", "export"):  # the latter is of the model that is registered
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if world_size() > 1:
        _main_of_ranks(recipe, arguments)
        return
    baseline = _baseline(recipe, arguments)
    _publish(recipe, *_evaluate_given(recipe, arguments), baseline)


def _baseline(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Logged]:
    """Before the work: a mistyped run id is told at once, and the run may be this one."""
    return evaluations_of_run(recipe, arguments.baseline) if arguments.baseline else {}


def _evaluate_given(recipe: Recipe, arguments: argparse.Namespace) -> tuple[Subject, list[Result]]:
    given = dict(given_evaluation(recipe, arguments))
    search = {key: value for key, value in given.items() if key in SEARCH}
    if arguments.model:
        for key in sorted(given.keys() - SEARCH - {"test_sets"}):
            log.warning("evaluation.%s does not apply to an exported model: left out", key)
    return evaluate(recipe, arguments.model, search)


def _main_of_ranks(recipe: Recipe, arguments: argparse.Namespace) -> None:
    import torch.distributed

    from pipeline.ranks import failing_together, from_rank_0, meet

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    meet(PATIENCE)
    with failing_together():
        baseline = from_rank_0(lambda: _baseline(recipe, arguments))
        subject, results = _evaluate_given(recipe, arguments)
        from_rank_0(lambda: _publish(recipe, subject, results, baseline))
    torch.distributed.barrier()  # the launcher ends all when one ends
    torch.distributed.destroy_process_group()


def _publish(
    recipe: Recipe, subject: Subject, results: Sequence[Result], baseline: Mapping[str, Logged]
) -> None:
    """Tell MLflow and the user."""
    tracker = open_tracker(recipe)
    log_data(tracker, recipe)
    for result in results:
        result.log(tracker)
    if not subject.export:
        tracker.log_tags({"mlflow.note.content": "\n\n".join(_line(r.scores) for r in results)})
    compared = compare_all(recipe, results, baseline) if baseline else []
    for result, comparison in compared:
        tracker.log_json(f"{result.artifact_folder}/{comparison.file_name}", comparison.content)
        tracker.log_tags({f"compared.{result.folder.name}": str(comparison)})
    tracker.close(status=None)  # whether the run is finished is training's to say
    if not subject.export:
        register(recipe, subject.checkpoints, results[0])
    lines = [f"{result.test_set.name}: {comparison}" for result, comparison in compared]
    print("\n".join([*lines, summary(recipe, results)]))


def summary(recipe: Recipe, results: Sequence[Result]) -> str:
    """The last lines of a run."""
    own, *others = results
    run = run_id_of(recipe) or "not sent yet"
    last = f"{_line(own.scores)} | MLflow run {run} | dashboard: {_dashboard(recipe)}"
    return "\n".join([*(_line(other.scores) for other in others), last])


def _line(scores: Scores) -> str:
    untrained = scores.get("untrained_bleu")
    beside = f" (untrained model: {untrained})" if untrained is not None else ""
    return (
        f"BLEU {scores['bleu']} ± {scores['bleu_ci']}{beside} on {scores['test_set']}, "
        f"chrF2 {scores['chrf']}, TER {scores['ter']}"
    )


def _dashboard(recipe: Recipe) -> str:
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        return uri
    found = uri == load_recipe(DEFAULT_RECIPE).tracking_uri
    return "./run.sh dashboard" + ("" if found else f" --tracking.uri {shlex.quote(uri)}")


if __name__ == "__main__":
    run_command("evaluate", "Translate test sets and score them.", main, add_arguments)
