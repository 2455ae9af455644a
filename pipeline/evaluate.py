"""`./run.sh evaluate`: score the model on test sets, log to MLflow, and register the model.

`deepspeed pipeline/evaluate.py` shares the examples among ranks.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from itertools import chain, islice
from typing import Any

from data_prep.files import only_command_in
from data_prep.text import seen_words, unseen_words
from models.search_config import SearchConfig
from pipeline.checkpoints.folder import CheckpointError
from pipeline.checkpoints.trained_with import (
    LEARNT_WITH,
    as_trained,
    changed_keys,
    newest_checkpoint,
)
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import (
    DEFAULT_RECIPE,
    evaluation_keys,
    overrides_on_command_line,
    path_argument,
    run_command,
    text_argument,
)
from pipeline.evaluation import images, translations
from pipeline.evaluation.comparison import LoggedEvaluation, compare_all, evaluations_of_run
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.images import ImageResult, evaluate_images
from pipeline.evaluation.result import Evaluation, Result
from pipeline.evaluation.translations import TranslationResult
from pipeline.publishing.registry import register
from pipeline.publishing.servable import Servable, servable_classifier, servable_translation
from pipeline.ranks import failing_together, from_rank_0, join_ranks, leave_ranks, rank, world_size
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.tasks import task_of
from pipeline.tracking.note import log_note
from pipeline.tracking.provenance import log_data
from pipeline.tracking.tracker import open_tracker, run_id_of
from pipeline.translation_recipe import TranslationRecipe

log = logging.getLogger("evaluate")

PATIENCE = timedelta(hours=2)  # how long the other ranks wait while rank 0 scores and registers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--model",
        type=path_argument,
        help="folder written by `export`; default: the run's checkpoints",
    )
    parser.add_argument(
        "--baseline",
        type=text_argument,
        metavar="RUN_ID",
        help="MLflow run to compare with, on each test set that it has too: by paired bootstrap, "
        "or by McNemar's test",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Evaluate on every rank, and publish on rank 0."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    for chatty in ("sacrebleu", "export"):  # registering a model exports it
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if world_size() > 1:
        join_ranks(PATIENCE)
    with ExitStack() as held, failing_together():
        from_rank_0(lambda: held.enter_context(only_command_in(recipe.run_dir, make=False)))
        # This comes before the work: a mistyped run id is found at once; and if the baseline is
        # this very run, its earlier evaluation is meant.
        baseline = from_rank_0(
            lambda: (
                evaluations_of_run(recipe, arguments.baseline, _kind_of(recipe))
                if arguments.baseline
                else {}
            )
        )
        is_first = not recipe.evaluations.exists()
        recipe = _as_trained(recipe)
        evaluation = _evaluate(recipe, arguments)
        from_rank_0(lambda: _publish(recipe, evaluation, baseline))
        if is_first and rank() == 0 and not arguments.model:
            print(things_to_try(recipe, arguments, evaluation.results[0]), file=sys.stderr)
        if world_size() > 1:
            leave_ranks()


def _kind_of(recipe: Recipe) -> type[Result]:
    """Return what evaluations of the recipe's task result in."""
    return ImageResult if isinstance(recipe, ClassificationRecipe) else TranslationResult


def _as_trained(recipe: Recipe) -> Recipe:
    """Return the recipe with the keys of `training` that the run was trained with."""
    if (newest := newest_checkpoint(recipe)) is None:
        return recipe
    with suppress(CheckpointError):  # it is damaged; who reads it will say so
        if changed := changed_keys(recipe.training, newest, LEARNT_WITH):
            keys = ", ".join(f"training.{key}" for key in changed)
            log.warning("%s was trained with other values of %s; those count", recipe.run_dir, keys)
        return as_trained(recipe, newest)
    return recipe


def _evaluate(recipe: Recipe, arguments: argparse.Namespace) -> Evaluation[Any]:
    """Evaluate the model of the run's checkpoints, or the export that `--model` names; warn of keys
    on the command line that do not apply to that."""
    given = evaluation_keys(recipe, arguments)
    search = {key: value for key, value in given.items() if key in SearchConfig.model_fields}
    if arguments.model:
        for key in sorted(given.keys() - search.keys() - {"test_sets", "batch_size", "comet"}):
            log.warning("evaluation.%s does not apply to an exported model: left out", key)
    if isinstance(recipe, ClassificationRecipe):
        return evaluate_images(recipe, arguments.model)
    assert isinstance(recipe, TranslationRecipe)
    return evaluate(recipe, arguments.model, search)


def _servable(recipe: Recipe, evaluation: Evaluation[Any]) -> Servable:
    """Return what to register."""
    checkpoints, result = evaluation.model.checkpoints, evaluation.results[0]
    if isinstance(recipe, ClassificationRecipe):
        return servable_classifier(recipe, checkpoints, result)
    assert isinstance(recipe, TranslationRecipe)
    return servable_translation(recipe, checkpoints, result)


def _publish(
    recipe: Recipe, evaluation: Evaluation[Any], baseline: Mapping[str, LoggedEvaluation]
) -> None:
    """Log the results to MLflow, compare them with the baseline, register the model, print scores.

    :param baseline: evaluations to compare with, by the names of their folders; can be empty.
    """
    results, validation = evaluation.results, evaluation.validation
    tracker = open_tracker(recipe)
    data = task_of(recipe).data_facts()
    log_data(tracker, recipe, data)
    for result in evaluation.all_results:
        result.log(tracker)
    if not evaluation.model.export:
        log_note(tracker, recipe, data, _scores(recipe, evaluation))
    compared = compare_all(results, baseline) if baseline else []
    for result, comparison in compared:
        tracker.log_json(f"{result.artifact_folder}/{comparison.file_name}", comparison.content)
        tracker.log_tags({f"compared.{result.folder.name}": str(comparison)})
    tracker.close(status=None)  # whether the run is finished is training's to say
    if validation is not None:
        register(recipe, _servable(recipe, evaluation), results[0], validation)
    lines = [f"{result.test_set_name}: {comparison}" for result, comparison in compared]
    print("\n".join([*lines, summary(recipe, results)]))


def _scores(recipe: Recipe, evaluation: Evaluation[Any]) -> str:
    """Return what the run's note says of its scores, and where all answers are."""
    results: list[Result] = evaluation.all_results
    translates = isinstance(recipe, TranslationRecipe)
    table_of = translations.table_of if translates else images.table_of
    table = table_of([result.scores for result in results])
    interval = "± is half of the 95% interval." if translates else ""
    pages = ", ".join(
        f"[{result.test_set_name}](artifact:{result.artifact_folder}/{result.page_file})"
        for result in results
    )
    tags = ", ".join(checkpoint.tag for checkpoint in evaluation.model.checkpoints)
    return f"{table}\n\nWeights: {tags}. {interval} All answers, to search and sort: {pages}."


def summary(recipe: Recipe, results: Sequence[Result]) -> str:
    """Return the last lines that a run prints: the scores, those of the recipe's test set last."""
    own, *others = results
    run = run_id_of(recipe) or "not sent yet"
    last = f"{own.line} | MLflow run {run} | dashboard: {_dashboard_hint(recipe)}"
    return "\n".join([*(other.line for other in others), last])


def things_to_try(recipe: Recipe, arguments: argparse.Namespace, result: Result) -> str:
    """Return commands that show what a new model can do.

    :param result: on a test set; its first sentence of words that the model knows is an example.
    """
    overrides = overrides_on_command_line(type(recipe), arguments)
    given = [word for key, value in overrides for word in (f"--{key}", value)]
    if arguments.config.resolve() != DEFAULT_RECIPE:
        given[:0] = ["--config", str(arguments.config)]
    options = "".join(f" {shlex.quote(word)}" for word in given)
    commands = [f"./run.sh export{options} --output my-model"]
    if isinstance(result, TranslationResult):
        answers = zip(result.test_set.sources, result.answers, strict=True)
        pairs, seen = [pair for pair in answers if pair[0].strip()], seen_words(recipe.shards)
        known = (pair for pair in pairs if not unseen_words(pair[:1], seen))
        commands = [f"{commands[0]} && ./run.sh serve --model my-model   # a page to type on"]
        for sentence, translation in islice(chain(known, pairs), 1):
            echo = f"echo {shlex.quote(sentence)} | ./run.sh translate{options}"
            commands.insert(0, f"{echo}   # {translation}")
    return "\n".join(["try:", *(f"  {line}" for line in (*commands, _dashboard_hint(recipe)))])


def _dashboard_hint(recipe: Recipe) -> str:
    """Return the command that shows the dashboard, or the address of the tracking server."""
    uri = recipe.tracking_uri
    if uri.startswith(("http://", "https://")):
        return uri
    is_default = uri == load_recipe(DEFAULT_RECIPE).tracking_uri
    return "./run.sh dashboard" + ("" if is_default else f" --tracking.uri {shlex.quote(uri)}")


if __name__ == "__main__":
    run_command(
        "evaluate",
        "Score a model on test sets.",
        main,
        add_arguments,
        kind=Recipe,
    )
