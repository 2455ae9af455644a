"""`./run.sh analyse`: what the levels of a trained model do, in pictures and numbers."""

from __future__ import annotations

import argparse
import logging

from data_prep.files import only_command_in
from pipeline.analysis.examples import Settings
from pipeline.analysis.report import Report
from pipeline.command_line import path_argument, positive_argument, run_command
from pipeline.recipe import Recipe
from pipeline.tracking.tracker import open_tracker

EXAMPLES = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--against",
        type=path_argument,
        metavar="RECIPE_OR_EXPORT",
        help="compare with the model of another recipe, or in a folder written by `export --format "
        "safetensors`",
    )
    parser.add_argument(
        "--examples",
        type=positive_argument,
        default=EXAMPLES,
        metavar="N",
        help=f"examples of the validation set that are looked at, at most [default {EXAMPLES}]",
    )
    parser.add_argument(
        "--head",
        type=positive_argument,
        metavar="H",
        help="draw the attention of this head, from 1; default: the mean over heads",
    )
    parser.add_argument(
        "--show",
        type=positive_argument,
        metavar="N",
        help="draw the attention in this example of the validation set; default: a short one",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Bring the analyses up to date, and log them to MLflow."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    settings = Settings(arguments.examples, arguments.head, arguments.show)
    with only_command_in(recipe.run_dir, make=False):
        report = Report.of(recipe, arguments.against, settings)
        report.bring_up_to_date()
        tracker = open_tracker(recipe)
        report.log(tracker)
        tracker.close(status=None)  # whether the run is finished is training's to say
    pictures = [path.name for path in report.files if path.suffix == ".png"]
    print(f"{report.folder}: {', '.join(pictures)}")


if __name__ == "__main__":
    run_command("analyse", "Analyse a trained model's levels.", main, add_arguments, kind=Recipe)
