"""`./run.sh prepare`: fetch → clean → vocabulary → binarize."""

from __future__ import annotations

import argparse
import logging
import time

from data_prep.binarize import binarize
from data_prep.clean import clean
from data_prep.corpora import fetch
from data_prep.engine import executor_of
from data_prep.stage import Manifest, log, only_command_in
from data_prep.vocabulary import train_vocabulary
from pipeline.checkpoint import open_tracker
from pipeline.command_line import run_command
from pipeline.provenance import log_data
from pipeline.recipe import Recipe


def prepare(recipe: Recipe) -> Manifest:
    """Bring `RUN_DIR/{fetch,clean,vocabulary,shards}` up to date.

    :returns: the manifest of the shards.
    """
    config, folder = recipe.data, recipe.run_dir.absolute()
    text, models = folder / "clean", folder / "vocabulary"
    with only_command_in(folder), executor_of(config) as executor:
        fetched = fetch(config, folder / "fetch", executor)
        cleaned = clean(config, fetched, folder / "fetch", text, executor)
        vocabulary = train_vocabulary(config, cleaned, text, models, executor)
        return binarize(config, cleaned, vocabulary, text, models, folder / "shards", executor)


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries end in our one message
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it says that it makes a font cache
    started = time.monotonic()
    totals = prepare(recipe)["totals"]["train"]
    tracker = open_tracker(recipe)
    log_data(tracker, recipe)
    log.info(
        "done in %.1f s: %d training pairs, %d target tokens in %s",
        time.monotonic() - started,
        totals["pairs"],
        totals["target_tokens"],
        recipe.run_dir / "shards",
    )
    tracker.close(status=None)


if __name__ == "__main__":
    run_command("prepare", "Turn raw corpora into binarized shards.", main)
