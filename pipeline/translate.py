"""`./run.sh translate`: read source sentences, and write one translation a line."""

# Functions import the translator and rich themselves: --help and a wrong argument need neither.

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import DataError
from pipeline.command_line import keys_on_command_line, on_signals, path_argument, run_command
from pipeline.recipe import UsageError
from pipeline.translation_recipe import SearchConfig, TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator

log = logging.getLogger("translate")

READ_BYTES = 1 << 16
MAX_LINES = 2048  # at most so many are translated together; sorted by length, they pad little
MAX_BYTES = 1 << 20
PATIENCE = 0.02  # seconds to wait for more lines; someone who types should not notice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--input", type=path_argument, help="file of source sentences; default: stdin"
    )
    parser.add_argument(
        "--n_best",
        type=int,
        metavar="N",
        help="print N translations of each sentence: its number from 0, the score (log-probability "
        "by length), and the text, with tabs between; at most evaluation.beam_size. A line that is "
        "translated in parts has one",
    )
    parser.add_argument(
        "--model",
        type=path_argument,
        help="folder written by `export`, in any format; default: the run's checkpoints",
    )


def open_input(path: Path | None) -> int:
    """Open what is to be translated.

    :param path: None for stdin.
    :returns: a file descriptor.
    :raises UsageError: it cannot be read.
    """
    if path is None and sys.stdin is None:
        raise UsageError("stdin is closed; give sentences there, or --input FILE")
    try:
        descriptor = os.open(path, os.O_RDONLY) if path else sys.stdin.fileno()
        os.read(descriptor, 0)  # fails for a folder
    except OSError as error:
        name = f"--input {path}" if path else "stdin"
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
    return descriptor


def batches_of_lines(descriptor: int, name: str) -> Iterator[list[str]]:
    """Read whole lines as they arrive: a fast producer makes large batches, a slow one small ones.

    :param descriptor: of an open file.
    :param name: of the file, for errors.
    :raises DataError: a line is not valid UTF-8. The lines before it have been returned.
    """
    number, size = 0, 0
    rest: list[bytes] = []  # blocks of a line that has not ended
    lines: list[str] = []
    while True:
        if lines and (size >= MAX_BYTES or not select.select([descriptor], [], [], PATIENCE)[0]):
            yield lines
            lines, size = [], 0
        block = os.read(descriptor, READ_BYTES)
        size += len(block)
        *raw, last = block.split(b"\n")
        if raw or not block:
            raw[:1] = [b"".join([*rest, *raw[:1]])]
            rest = []
        rest.append(last)
        if not block and raw == [b""]:
            raw = []
        for line in raw:
            number += 1
            try:
                lines.append(line.decode("utf-8").rstrip("\r"))
            except UnicodeDecodeError as error:
                if lines:
                    yield lines
                raise DataError(f"{name}:{number}: not valid UTF-8: {error.reason}") from error
            if len(lines) == MAX_LINES:
                yield lines
                lines = []
        if not block:
            if lines:
                yield lines
            return


def load_translator(recipe: TranslationRecipe, arguments: argparse.Namespace) -> TextTranslator:
    """Load the export that `--model` names, or the model of the run's checkpoints.

    :raises ModelError: the folder is not an exported model.
    :raises CheckpointError: the run has no checkpoint that can be used.
    :raises UsageError: a key on the command line does not apply to an export.
    """
    from pipeline.translation.translator import Translator

    if arguments.model:
        search = keys_on_command_line("evaluation", recipe.evaluation, arguments)
        if other := sorted(search.keys() - SearchConfig.model_fields.keys()):
            raise UsageError(f"evaluation.{other[0]} does not apply to an exported model")
        return Translator.of_export(arguments.model, **search)
    from pipeline.translation.run_model import checkpoints_of_run

    return Translator.of_run(recipe, checkpoints_of_run(recipe))


@contextmanager
def progress_bar(path: Path | None) -> Iterator[Callable[[int], None]]:
    """Show rate and time left, if stderr is a terminal and the number of lines can be counted.

    :param path: of the input; None for stdin.
    :returns: a function to call with the number of sentences just translated.
    """
    if path is None or not path.is_file() or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with path.open("rb") as file:
        total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    rate = TextColumn("{task.speed:.1f} a second, ETA")
    columns = (TextColumn("translating"), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def main(recipe: TranslationRecipe, arguments: argparse.Namespace) -> None:
    """Translate the input line by line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    on_signals(signal.default_int_handler)
    if sys.stdout is None:
        raise UsageError("stdout is closed; translations are written there")
    descriptor = open_input(arguments.input)
    # Translations have a stdout of their own: what libraries print goes to stderr.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    wanted = arguments.n_best or 1
    if arguments.n_best is not None and arguments.n_best < 1:
        raise UsageError("--n_best must be at least 1")
    translator = load_translator(recipe, arguments)
    beam_size = translator.search.beam_size
    if wanted > beam_size:
        raise UsageError(f"--n_best {wanted} exceeds evaluation.beam_size ({beam_size})")
    log.info("model ready: %s", translator.backend)
    if translator.one_by_one and arguments.input:
        log.info("--evaluation.shortlist false translates in batches, which is faster for a file")
    started, count = time.monotonic(), 0
    with progress_bar(arguments.input) as progress:
        for lines in batches_of_lines(descriptor, str(arguments.input or "stdin")):
            found = translator.n_best(lines, progress, first_line=count + 1)
            for number, best in enumerate(found, start=count):
                for score, translation in best[:wanted]:
                    prefix = f"{number}\t{score:.4f}\t" if arguments.n_best else ""
                    output.write(f"{prefix}{translation}\n")
            output.flush()
            count += len(lines)
    seconds = time.monotonic() - started
    log.info("%d sentences in %.1f s (%.1f a second)", count, seconds, count / max(seconds, 1e-9))


if __name__ == "__main__":
    run_command(
        "translate", "Translate sentences from stdin or a file.", main, add_arguments,
        kind=TranslationRecipe, continues=False,
    )  # fmt: skip
