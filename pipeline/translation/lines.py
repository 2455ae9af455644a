"""What `translate` and `score` do alike: lines come in as they arrive, and answers go out."""

# Functions import the translator and rich themselves: --help and a wrong argument need neither.

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from data_prep.files import DataError
from models.search_config import SearchConfig
from pipeline.command_line import evaluation_keys, on_signals, path_argument, warn_of_left_out
from pipeline.recipe import UsageError
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator

READ_BYTES = 1 << 16
MAX_LINES = 2048  # at most so many are taken together; sorted by length, they pad little
MAX_BYTES = 1 << 20
PATIENCE = 0.02  # seconds to wait for more lines; someone who types should not notice

Progress = Callable[[int], None]
"""Is called with the number of lines just finished."""


class Lines(NamedTuple):
    """Some lines of the input."""

    first: int
    """Number of the first one, from 1."""

    texts: list[str]


class Streams(NamedTuple):
    """Where lines come from, and where they go."""

    descriptor: int
    """Of the input."""

    path: Path | None
    """Of the input; None: stdin."""

    output: TextIO

    @property
    def name(self) -> str:
        """Return the name of the input, for errors."""
        return str(self.path or "stdin")


def add_arguments(parser: argparse.ArgumentParser, content: str) -> None:
    """Add the arguments of commands that read lines.

    :param content: what a line is, in the plural.
    """
    parser.add_argument("--input", type=path_argument, help=f"file of {content}; default: stdin")
    parser.add_argument(
        "--model",
        type=path_argument,
        action="append",
        default=[],
        help="folder written by `export`, in any format but huggingface; default: the run's "
        "checkpoints. Given several times: an ensemble, of format safetensors",
    )
    parser.add_argument(
        "--alignment",
        action="store_true",
        help="also print which word of the sentence each word of the translation comes from, as "
        "`i-j`: a tab, and word i of the sentence with word j of the translation, from 0. It "
        "needs PyTorch: the run's checkpoints, or an export in format safetensors",
    )


def open_streams(path: Path | None, content: str) -> Streams:
    """Open input and output, and have signals end this process.

    What libraries print to stdout goes to stderr from now on: what is asked for has it to itself.

    :param path: of the input; None for stdin.
    :param content: what is written, in the plural.
    :raises UsageError: one of them cannot be opened, or they are one file, which would never end.
    """
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    on_signals(signal.default_int_handler)
    if sys.stdout is None:
        raise UsageError(f"stdout is closed; {content} are written there")
    descriptor = open_input(path)
    read, written = os.fstat(descriptor), os.fstat(sys.stdout.fileno())
    if stat.S_ISREG(read.st_mode) and os.path.samestat(read, written):
        raise UsageError(f"{path or 'stdin'} is the file that {content} are written to")
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    return Streams(descriptor, path, output)


def open_input(path: Path | None) -> int:
    """Open what is to be read.

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
        select.select([descriptor], [], [])  # some parents leave a pipe that does not wait itself
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


def up_to_fault(
    batches: Iterator[Lines], name: str, fault: Callable[[str], str | None]
) -> Iterator[Lines]:
    """Return the lines before the first that is wrong.

    :param name: of the input, for errors.
    :param fault: tells what is wrong with a line; None: nothing.
    :raises DataError: a line is wrong, and what. The lines before it have been returned.
    """
    for first, texts in batches:
        for good, found in enumerate(map(fault, texts)):
            if found is not None:
                yield Lines(first, texts[:good])
                raise DataError(f"{name}:{first + good}: {found}")
        yield Lines(first, texts)


def search_keys(recipe: TranslationRecipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the `evaluation` keys on the command line, which replace those of an export.

    :raises UsageError: a key does not apply to an export.
    """
    warn_of_left_out(arguments, but="evaluation")
    search = evaluation_keys(recipe, arguments)
    if other := sorted(search.keys() - SearchConfig.model_fields.keys()):
        raise UsageError(f"evaluation.{other[0]} does not apply to an exported model")
    return search


def load_translator(recipe: TranslationRecipe, arguments: argparse.Namespace) -> TextTranslator:
    """Load the exports that `--model` names, or the model of the run's checkpoints.

    :raises ModelError: a folder is not an exported model, or two do not go together.
    :raises CheckpointError: the run has no checkpoint that can be used.
    :raises UsageError: a key on the command line does not apply to an export.
    """
    from pipeline.translation.translator import Translator, load_exports

    if arguments.model:
        return load_exports(*arguments.model, **search_keys(recipe, arguments))
    from pipeline.translation.run_model import checkpoints_of_run

    return Translator.of_run(recipe, checkpoints_of_run(recipe))


def convert_lines(
    streams: Streams,
    convert: Callable[[Iterator[Lines], Progress], Iterator[Iterable[str]]],
    log: logging.Logger,
    doing: str,
    content: str,
) -> None:
    """Write what becomes of the lines of the input, some of them at a time.

    :param convert: gets lines as they arrive, and a function to tell progress; returns lines to
        write, as soon as there are some.
    :param doing: what the progress bar says.
    :param content: what lines are, in the plural, for the log.
    :raises DataError: a line is not valid UTF-8. What becomes of those before it was written.
    """
    started, count = time.monotonic(), 0

    def counted() -> Iterator[Lines]:
        nonlocal count
        for texts in batches_of_lines(streams.descriptor, streams.name):
            yield Lines(count + 1, texts)
            count += len(texts)

    with progress_bar(streams.path, doing) as progress:
        for found in convert(counted(), progress):
            streams.output.writelines(f"{line}\n" for line in found)
            streams.output.flush()
    seconds = time.monotonic() - started
    rate = count / max(seconds, 1e-9)
    log.info("%d %s in %.1f s (%.1f a second)", count, content, seconds, rate)


@contextmanager
def progress_bar(path: Path | None, doing: str) -> Iterator[Progress]:
    """Show rate and time left, if stderr is a terminal and the number of lines can be counted.

    :param path: of the input; None for stdin.
    :param doing: what the bar says.
    """
    if path is None or not path.is_file() or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with path.open("rb") as file:
        total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    rate = TextColumn("{task.speed:.1f} a second, ETA")
    columns = (TextColumn(doing), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
