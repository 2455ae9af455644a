"""`./run.sh prepare`: raw corpora become shards of token ids."""

from __future__ import annotations

import argparse
import logging
import time

from data_prep.prepare import prepare
from data_prep.stage import log
from pipeline.command_line import run_command
from pipeline.evaluation.test_sets import held_out_of
from pipeline.recipe import Recipe
from pipeline.tracking.provenance import log_data
from pipeline.tracking.tracker import open_tracker


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Bring the shards of `run_dir` up to date, and log what they were made from to MLflow."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # we report what its retries end in
    logging.getLogger("matplotlib").setLevel(
        logging.ERROR
    )  # it reports that it builds a font cache
    started = time.monotonic()
    totals = prepare(recipe.data, recipe.run_dir, held_out_of(recipe)).totals["train"]
    tracker = open_tracker(recipe)
    log_data(tracker, recipe)
    log.info(
        "done in %.1f s: %d training pairs, %d target tokens in %s",
        time.monotonic() - started,
        totals.pairs,
        totals.target_tokens,
        recipe.shards,
    )
    tracker.close(status=None)


if __name__ == "__main__":
    run_command("prepare", "Turn raw corpora into binarized shards.", main)
