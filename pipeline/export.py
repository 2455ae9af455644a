"""`./run.sh export`: write a trained model to a folder that needs nothing else of the run."""

from __future__ import annotations

import argparse
import logging
from typing import get_args

from data_prep.files import only_command_in
from models.export_format import Format
from pipeline.command_line import path_argument, run_command
from pipeline.publishing.exports import export
from pipeline.recipe import Recipe

log = logging.getLogger("export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--output", type=path_argument, help="folder to write; default: RUN_DIR/export"
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="safetensors",
        help="safetensors (default): our weights, for PyTorch and for training.init_from; "
        "ctranslate2: a standard Transformer, for fast translation on CPUs; "
        "onnx: the ring as it is, for ONNX Runtime: small, and fast for one sentence",
    )
    parser.add_argument(
        "--quantization",
        choices=("int8",),
        help="of a CTranslate2 or ONNX model: a quarter of the size; default: float32",
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Export the model that the recipe's `evaluation` names."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    folder = arguments.output or recipe.run_dir / "export"
    with only_command_in(recipe.run_dir, make=False):
        export(recipe, folder, arguments.format, arguments.quantization)
    log.info("exported to %s; try: ./run.sh translate --model %s", folder, folder)


if __name__ == "__main__":
    run_command("export", "Export the trained model.", main, add_arguments)
