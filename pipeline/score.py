"""`./run.sh score`: read sentences with translations, and write how likely a model finds them, or
with `--rerank` the best translation of each."""

# Functions import what leads models themselves: --help and a wrong argument do not need it.

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.files import DataError
from pipeline.command_line import path_argument, run_command
from pipeline.recipe import UsageError
from pipeline.translation import lines
from pipeline.translation.lines import Lines, Progress
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.serving import Forced, Pair, TextTranslator

log = logging.getLogger("score")

LONGEST_NUMBER = 18  # digits of the number of a sentence


class Row(NamedTuple):
    """A row of an n-best list."""

    line: int
    """Its number, from 1."""

    sentence: int
    """The number of the source sentence, from 0."""

    translation: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    lines.add_arguments(parser, "source sentences, each with a tab and its translation")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="also print the translation's tokens with EOS: a tab before each, and behind it a "
        "space and its log-probability",
    )
    parser.add_argument(
        "--rerank",
        type=path_argument,
        metavar="SOURCES",
        help="print the best translation of each sentence in this file, of those that `translate "
        "--n_best` has printed, which are the input",
    )
    parser.add_argument(
        "--prefix",
        action="store_true",
        help="with --rerank: SOURCES is what `translate --prefix` has read, and what follows a "
        "sentence and a tab is not part of it",
    )


def main(recipe: TranslationRecipe, arguments: argparse.Namespace) -> None:
    """Score the input line by line, or choose from it."""
    sources: Path | None = arguments.rerank
    if sources and arguments.tokens:
        raise UsageError("--rerank prints translations, for which there are no --tokens")
    if sources and arguments.alignment:
        raise UsageError("--rerank prints translations, for which there is no --alignment")
    if arguments.prefix and not sources:
        raise UsageError("--prefix goes with --rerank")
    if sources and (sources.is_dir() or not sources.exists()):
        raise UsageError(f"--rerank {sources}: there is no such file")
    streams = lines.open_streams(arguments.input, "scores")
    translator = lines.load_translator(recipe, arguments)
    if arguments.alignment:
        from pipeline.translation.alignment import check_engine

        check_engine(translator)
    log.info("model ready: %s", translator.backend)
    if sources:
        choose = partial(rerank, translator, sources, arguments.prefix, streams.name)
        lines.convert_lines(streams, choose, log, "reranking", "translations")
    else:
        rate = partial(score, translator, streams.name, arguments.tokens, arguments.alignment)
        lines.convert_lines(streams, rate, log, "scoring", "pairs")


def score(
    translator: TextTranslator,
    name: str,
    tokens: bool,
    alignment: bool,
    batches: Iterator[Lines],
    progress: Progress,
) -> Iterator[list[str]]:
    """Return the log-probability of each line's translation; an empty line stays empty.

    :param name: of the input, for errors.
    :param tokens: also return those of its tokens.
    :param alignment: also return which words it comes from.
    :raises DataError: a line is not a pair. What belongs to those before it has been returned.
    """
    from pipeline.translation.serving import Pair

    for first, texts in lines.up_to_fault(batches, name, pair_fault):
        full = [i for i, text in enumerate(texts) if text.strip()]
        progress(len(texts) - len(full))
        pairs = [Pair(*texts[i].split("\t")) for i in full]
        rows = [""] * len(texts)
        found = translator.score(pairs, progress, [first + i for i in full])
        links = _alignments(translator, pairs, found) if alignment else [None] * len(pairs)
        for i, forced, of_pair in zip(full, found, links, strict=True):
            rows[i] = _row(forced, of_pair, tokens)
        yield rows


def pair_fault(text: str) -> str | None:
    """Return what is wrong with a line, if it is no pair; an empty one may stand between pairs."""
    good = not text.strip() or text.count("\t") == 1
    return None if good else "expected a sentence, one tab, and a translation"


def _alignments(
    translator: TextTranslator, pairs: Sequence[Pair], found: Sequence[Forced | None]
) -> list[str]:
    """Return each pair's alignment as text; of one that the model cannot take none."""
    from pipeline.translation.alignment import align_pairs, check_engine, pharaoh

    taken = [pair for pair, forced in zip(pairs, found, strict=True) if forced]
    links = iter(align_pairs(check_engine(translator), taken))
    return [pharaoh(next(links)) if forced else "" for forced in found]


def _row(forced: Forced | None, alignment: str | None, tokens: bool) -> str:
    fields = [f"{forced.log_prob:.6f}" if forced else "nan"]
    if alignment is not None:
        fields.append(alignment)
    if forced and tokens:
        each = zip(forced.tokens, forced.log_probs, strict=True)
        fields += [f"{token} {value:.6f}" for token, value in each]
    return "\t".join(fields)


def rerank(
    translator: TextTranslator,
    sources: Path,
    prefix: bool,
    name: str,
    batches: Iterator[Lines],
    progress: Progress,
) -> Iterator[list[str]]:
    """Return the translation of each sentence that the model gives the best score, as a search
    does; of equal ones the first.

    :param sources: the file of the sentences.
    :param prefix: a tab and more may follow a sentence there.
    :param name: of the input, for errors.
    :raises DataError: a line is not of an n-best list, or its sentence is not the next one.
    """
    from data_prep.corpora import read_lines

    texts_of = read_lines(sources)
    sentences = enumerate(text.partition("\t")[0] if prefix else text for text in texts_of)
    last: list[Row] = []  # of a sentence that may have more
    for first, texts in lines.up_to_fault(batches, name, row_fault):
        rows = [_parse(text, line) for line, text in enumerate(texts, start=first)]
        *groups, last = _by_sentence([*last, *rows])
        yield _best(translator, groups, sentences, name, progress)
    yield _best(translator, [last] if last else [], sentences, name, progress)
    for number, _ in sentences:
        raise DataError(f"{sources}:{number + 1}: {name} has no translation of this sentence")


def row_fault(text: str) -> str | None:
    """Return what is wrong with a line, if it is no row of an n-best list."""
    number, *rest = text.split("\t")
    if number.isdecimal() and len(number) <= LONGEST_NUMBER and len(rest) == 2:
        return None
    return "expected the number of a sentence, a score, and a translation, with tabs between"


def _parse(text: str, line: int) -> Row:
    number, _, translation = text.split("\t")
    return Row(line, int(number), translation)


def _by_sentence(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each sentence; at least one list, which may be empty."""
    groups = [list(group) for _, group in groupby(rows, lambda row: row.sentence)]
    return groups or [[]]


def _best(
    translator: TextTranslator,
    groups: list[list[Row]],
    sentences: Iterator[tuple[int, str]],
    name: str,
    progress: Progress,
) -> list[str]:
    """Return the best row's translation of each group.

    :param groups: the rows of one sentence after the other.
    :param sentences: those of the groups come next.
    """
    from pipeline.translation.serving import Pair

    rows = [row for group in groups for row in group]
    pairs = []
    for group in groups:
        number, source = next(sentences, (None, ""))
        if group[0].sentence != number:
            expected = "there is none left" if number is None else f"{number} comes next"
            raise DataError(
                f"{name}:{group[0].line}: a translation of sentence {group[0].sentence}, but "
                f"{expected}"
            )
        pairs += [Pair(source, row.translation) for row in group]
    penalty = translator.search.length_penalty
    scores = [
        forced.score(penalty) if forced else -math.inf
        for forced in translator.score(pairs, progress, [row.line for row in rows])
    ]
    of_row = dict(zip(rows, scores, strict=True))
    return [max(group, key=of_row.__getitem__).translation for group in groups]


if __name__ == "__main__":
    run_command(
        "score", "Score translations from stdin or a file.", main, add_arguments,
        kind=TranslationRecipe, continues=False,
    )  # fmt: skip
