"""`./run.sh sweep`: train a recipe with other values of some keys, and find the best."""

# Optuna is imported when the sweep starts: that takes a second.

from __future__ import annotations

import argparse
import logging
import signal

from data_prep.files import only_command_in
from pipeline.command_line import (
    on_signals,
    overrides_on_command_line,
    path_argument,
    positive_argument,
    run_command,
)
from pipeline.evaluation.test_sets import check_training_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import Draft
from pipeline.sweeping.config import read_sweep
from pipeline.tasks import task_of
from pipeline.tracking.tracker import run_id_of
from pipeline.training.deepspeed_config import deepspeed_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--sweep",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="what is searched, and how (YAML): docs/sweep.md",
    )
    parser.add_argument(
        "--jobs",
        type=positive_argument,
        default=1,
        metavar="N",
        help="trainings at once [default 1]",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Run the trials that are left, and say which was the best."""
    on_signals(signal.default_int_handler)  # before the first training nothing has to be saved
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    draft = Draft(arguments.config, overrides_on_command_line(type(recipe), arguments))
    config, criterion = read_sweep(arguments.sweep, draft)
    deepspeed_config(recipe.training, accumulation_steps=1)
    task_of(recipe).check_recipe()
    check_training_text(recipe)
    from pipeline.sweeping.run import Sweep
    from pipeline.sweeping.trial import home_of

    home = home_of(recipe)
    with only_command_in(recipe.run_dir), only_command_in(home.run_dir):
        best = Sweep(draft, config, criterion, arguments.jobs).run()
    print(
        f"best: trial {best.number}, {criterion.metric} {best.value:.4f} | {best.recipe} | "
        f"MLflow run {run_id_of(home) or 'not sent yet'}"
    )


if __name__ == "__main__":
    run_command("sweep", "Search good values of a recipe's keys.", main, add_arguments, kind=Recipe)
