"""`./run.sh prepare`: raw corpora become shards of token ids, images become shards of pixels."""

from __future__ import annotations

import argparse
import logging
import time

from data_prep.files import only_command_in
from data_prep.prepare import prepare
from data_prep.stage import log
from pipeline.checkpoints.folder import CheckpointError
from pipeline.checkpoints.trained_with import as_trained, newest_checkpoint
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import run_command
from pipeline.evaluation.test_sets import held_out_of
from pipeline.recipe import Recipe
from pipeline.tasks import task_of
from pipeline.tracking.provenance import log_data
from pipeline.tracking.tracker import open_tracker
from pipeline.translation.teacher import open_teacher
from pipeline.translation_recipe import TranslationRecipe


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Bring the shards of `run_dir` up to date, and log what they were made from to MLflow."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # we report what its retries end in
    started = time.monotonic()
    made = _prepare(recipe)
    with only_command_in(recipe.run_dir):
        _log(recipe)
    log.info("done in %.1f s: %s in %s", time.monotonic() - started, made, recipe.shards)


def _log(recipe: Recipe) -> None:
    """Log what the shards were made from."""
    tracker = open_tracker(recipe)
    task = task_of(recipe)
    told = recipe
    if (newest := newest_checkpoint(recipe)) is not None:
        try:
            told = as_trained(recipe, newest)
            newest.refuse_other(task.identity())
        except CheckpointError as error:
            log.warning("%s", error)
    log_data(tracker, told, task.data_facts())
    tracker.close(status=None)


def _prepare(recipe: Recipe) -> str:
    """Bring the shards up to date.

    :returns: what there is to train on, in words.
    """
    if isinstance(recipe, ClassificationRecipe):
        from data_prep.images.prepare import prepare_images

        images = prepare_images(recipe.data, recipe.run_dir)
        return f"{images.totals['train'].images} training images of {len(images.classes)} classes"
    assert isinstance(recipe, TranslationRecipe)
    made = prepare(
        recipe.data, recipe.run_dir, held_out_of(recipe), open_teacher,
        trained=newest_checkpoint(recipe) is not None,
    )  # fmt: skip
    totals = made.totals["train"]
    return f"{totals.pairs} training pairs, {totals.target_tokens} target tokens"


if __name__ == "__main__":
    run_command("prepare", "Turn raw corpora, or images, into binarized shards.", main, kind=Recipe)
