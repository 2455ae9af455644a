"""`./run.sh translate`: source sentences in, one translation a line out."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.stage import DataError
from pipeline.config import Recipe, UsageError, run_command

log = logging.getLogger("translate")

READ_BYTES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, help="file of source sentences; default: stdin")
    parser.add_argument(
        "--n_best",
        type=int,
        metavar="N",
        help="print N translations of each sentence: its number from 0, the score (log-probability "
        "by length), and the text, with tabs between; at most evaluation.beam_size",
    )
    parser.add_argument(
        "--model", type=Path, help="folder written by `export`; default: the run's checkpoints"
    )


def batches_of_lines(descriptor: int, name: str) -> Iterator[list[str]]:
    """Whole lines as they arrive: a fast producer gives large batches, a slow one single lines.

    :raises DataError: invalid UTF-8, with the line.
    """
    number, rest = 0, b""
    while True:
        block = os.read(descriptor, READ_BYTES)
        *raw, rest = (rest + block).split(b"\n")
        if not block and rest:
            raw = [rest]
        lines = []
        for line in raw:
            number += 1
            try:
                lines.append(line.decode("utf-8").rstrip("\r"))
            except UnicodeDecodeError as error:
                raise DataError(f"{name}:{number}: not valid UTF-8: {error.reason}") from error
        if lines:
            yield lines
        if not block:
            return


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    # Libraries that print to stdout must not get between the translations.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", newline="\n")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    descriptor, name = sys.stdin.fileno(), "stdin"
    if arguments.input:
        descriptor, name = os.open(arguments.input, os.O_RDONLY), str(arguments.input)

    if arguments.n_best is not None and arguments.n_best < 1:
        raise UsageError("--n_best must be at least 1")

    from pipeline.checkpoint import checkpoints_to_average
    from pipeline.translator import Translator

    if arguments.model:
        given = {key.partition(".")[2] for key in vars(arguments) if key.startswith("evaluation.")}
        search = {name: getattr(recipe.evaluation, name) for name in given}
        translator = Translator.of_export(arguments.model, **search)
    else:
        translator = Translator.of_run(recipe, checkpoints_to_average(recipe))
    if (arguments.n_best or 1) > translator.search.beam_size:
        raise UsageError(
            f"--n_best {arguments.n_best} exceeds evaluation.beam_size "
            f"({translator.search.beam_size})"
        )
    log.info("model ready on %s", translator.device)
    started, count = time.monotonic(), 0
    for lines in batches_of_lines(descriptor, name):
        for number, best in enumerate(translator.n_best(lines), start=count):
            for score, translation in best[: arguments.n_best or 1]:
                prefix = f"{number}\t{score:.4f}\t" if arguments.n_best else ""
                output.write(f"{prefix}{translation}\n")
        output.flush()
        count += len(lines)
    seconds = time.monotonic() - started
    log.info("%d sentences in %.1f s (%.1f a second)", count, seconds, count / max(seconds, 1e-9))


if __name__ == "__main__":
    run_command("translate", "Translate sentences from stdin or a file.", main, add_arguments)
