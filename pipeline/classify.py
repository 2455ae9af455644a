"""`./run.sh classify IMAGE…`: say what is on images, with probabilities."""

from __future__ import annotations

import argparse
import logging
import sys

from data_prep.files import first_line
from data_prep.images.read import Refused
from pipeline.classification.classifier import classifier_of_export, classifier_of_run
from pipeline.classification.run_model import checkpoints_of_run
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import path_argument, positive_argument, run_command, warn_of_left_out
from pipeline.recipe import UsageError

ESCAPES = str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r"})  # a line is one image's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "images", nargs="+", type=path_argument, metavar="IMAGE", help="JPEG or PNG files"
    )
    parser.add_argument(
        "--model",
        type=path_argument,
        help="folder written by `export`; default: the run's checkpoints",
    )
    parser.add_argument(
        "--top",
        type=positive_argument,
        default=3,
        help="classes to name for each image [default 3]",
    )


def main(recipe: ClassificationRecipe, arguments: argparse.Namespace) -> None:
    """Print a line for each image: its path, then classes and their probabilities."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if sys.stdout is None:
        raise UsageError("stdout is closed; classes are written there")
    if arguments.model:
        warn_of_left_out(arguments)
        classifier = classifier_of_export(arguments.model)
    else:
        classifier = classifier_of_run(recipe, checkpoints_of_run(recipe))
    refused = 0
    for path in arguments.images:
        try:
            found = list(classifier.classify(path).items())[: arguments.top]
        except Refused as error:
            refused += 1
            detail = f" ({error.detail})" if error.detail else ""
            print(f"classify: {path}: {error}{detail}", file=sys.stderr)
            continue
        except (OSError, MemoryError) as error:  # of this file, now
            refused += 1
            print(f"classify: {path}: cannot be read: {first_line(error)}", file=sys.stderr)
            continue
        name_of_file = str(path).translate(ESCAPES)
        line = "\t".join([name_of_file, *(f"{name} {share:.4f}" for name, share in found)])
        # A path may be of any bytes.
        sys.stdout.buffer.write(f"{line}\n".encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()
    if refused:
        sys.exit(1)


if __name__ == "__main__":
    run_command(
        "classify", "Say what is on images.", main, add_arguments, kind=ClassificationRecipe,
        continues=False,
    )  # fmt: skip
