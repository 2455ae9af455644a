"""`./run.sh export`: write a trained model to a folder that needs nothing else of the run."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import get_args

from data_prep.files import only_command_in
from models.export_format import ClassifierFormat, Format
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import path_argument, run_command
from pipeline.publishing.exports import export, serving_format
from pipeline.publishing.image_exports import export_classifier
from pipeline.recipe import Recipe, UsageError
from pipeline.translation_recipe import TranslationRecipe

log = logging.getLogger("export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--output", type=path_argument, help="folder to write; default: RUN_DIR/export"
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        help="onnx: the ring as it is, for ONNX Runtime: small, and fast for one sentence; "
        "ctranslate2: a standard Transformer, for fast translation on CPUs; "
        "safetensors: our weights, for PyTorch and for training.init_from; "
        "huggingface: a MarianMTModel, for the library transformers; "
        "default: what serves the model best where sentences come one at a time",
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        help="for many sentences at a time: format ctranslate2, with the level signals folded into "
        "the weights of each level",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8", "float32"),
        help="int8 is a quarter of the size, and the default without --format; float32 with it",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Export the model that the recipe's `evaluation` names."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    folder = arguments.output or recipe.run_dir / "export"
    with only_command_in(recipe.run_dir, make=False):
        if isinstance(recipe, ClassificationRecipe):
            _export_classifier(recipe, folder, arguments)
        else:
            assert isinstance(recipe, TranslationRecipe)
            _export_translation(recipe, folder, arguments)


def _export_translation(
    recipe: TranslationRecipe, folder: Path, arguments: argparse.Namespace
) -> None:
    format: Format | None = "ctranslate2" if arguments.fold else arguments.format
    if arguments.fold and arguments.format not in (None, format):
        raise UsageError(f"--fold is --format {format}, not {arguments.format}")
    if format is None:
        format = serving_format(recipe.model)
    chosen = arguments.format is None and format != "safetensors"
    precision = arguments.quantization or ("int8" if chosen else "float32")
    export(recipe, folder, format, "int8" if precision == "int8" else None)
    log.info("exported to %s in format %s, %s", folder, format, precision)
    if not arguments.fold and format == "onnx":
        log.info("for many sentences at a time --fold is faster")
    if format == "huggingface":
        log.info('try, in Python: transformers.pipeline("translation", model="%s")', folder)
    else:
        log.info("try: ./run.sh translate --model %s", folder)


def _export_classifier(
    recipe: ClassificationRecipe, folder: Path, arguments: argparse.Namespace
) -> None:
    format: ClassifierFormat = arguments.format or "onnx"
    if format not in get_args(ClassifierFormat):
        raise UsageError(
            f"--format {format} is for translation; a classifier's are onnx and safetensors"
        )
    if arguments.fold or arguments.quantization == "int8":
        raise UsageError("--fold and --quantization int8 are for translation")
    export_classifier(recipe, folder, format)
    log.info("exported to %s in format %s", folder, format)
    log.info("try: ./run.sh classify --model %s IMAGE", folder)


if __name__ == "__main__":
    run_command("export", "Export the trained model.", main, add_arguments, kind=Recipe)
