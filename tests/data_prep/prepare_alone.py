"""Prepare data as `./run.sh prepare` does, but without its records for MLflow (some seconds)."""

from __future__ import annotations

import argparse
import logging

from data_prep.prepare import prepare
from pipeline.command_line import run_command
from pipeline.translation.teacher import open_teacher
from pipeline.translation_recipe import TranslationRecipe


def main(recipe: TranslationRecipe, _: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    prepare(recipe.data, recipe.run_dir, open_teacher=open_teacher)


if __name__ == "__main__":
    run_command("prepare", "Prepare data and tell nobody.", main, kind=TranslationRecipe)
