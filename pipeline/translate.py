"""`./run.sh translate`: read source sentences, and write one translation a line."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pipeline.command_line import positive_argument, run_command
from pipeline.recipe import UsageError
from pipeline.translation import lines
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator, Translation

log = logging.getLogger("translate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    lines.add_arguments(parser, "source sentences")
    parser.add_argument(
        "--n_best",
        type=positive_argument,
        metavar="N",
        help="print N translations of each sentence: its number from 0, the score (log-probability "
        "by length), and the text, with tabs between; at most evaluation.beam_size. A line that is "
        "translated in parts has one",
    )
    parser.add_argument(
        "--prefix",
        action="store_true",
        help="after a sentence there may be a tab and what its translation begins with",
    )
    parser.add_argument(
        "--scores", action="store_true", help="print a translation's score and a tab before it"
    )


def main(recipe: TranslationRecipe, arguments: argparse.Namespace) -> None:
    """Translate the input line by line."""
    streams = lines.open_streams(arguments.input, "translations")
    wanted = arguments.n_best or 1
    translator = lines.load_translator(recipe, arguments)
    if arguments.alignment:
        from pipeline.translation.alignment import align_translations, check_engine, pharaoh

        aligned = check_engine(translator)
    beam_size = translator.search.beam_size
    if wanted > beam_size:
        raise UsageError(f"--n_best {wanted} exceeds evaluation.beam_size ({beam_size})")
    log.info("model ready: %s", translator.backend)
    if translator.one_by_one and arguments.input:
        log.info("--evaluation.shortlist false translates in batches, which is faster for a file")

    def row(number: int, translation: Translation) -> str:
        begin = f"{number}\t" if arguments.n_best else ""
        if arguments.n_best or arguments.scores:
            begin += f"{translation.score:.4f}\t"
        return begin + translation.text

    def translate(batches: Iterator[lines.Lines], progress: lines.Progress) -> Iterator[list[str]]:
        if arguments.prefix:
            fault = partial(prefix_fault, translator)
            batches = lines.up_to_fault(batches, streams.name, fault)
        for first, texts in batches:
            sentences, prefixes = texts, list[str]()
            if arguments.prefix:
                sides = [text.partition("\t") for text in texts]
                sentences, prefixes = [side[0] for side in sides], [side[2] for side in sides]
            found = translator.n_best(sentences, progress, first, prefixes)
            found = [best[:wanted] for best in found]
            rows = [row(i, one) for i, best in enumerate(found, start=first - 1) for one in best]
            if arguments.alignment:
                links = align_translations(aligned, sentences, found)
                each = (pharaoh(of_one) for of_line in links for of_one in of_line)
                rows = [f"{begin}\t{links}" for begin, links in zip(rows, each, strict=True)]
            yield rows

    lines.convert_lines(streams, translate, log, "translating", "sentences")


def prefix_fault(translator: TextTranslator, text: str) -> str | None:
    """Return what is wrong with a line that may have a tab and a prefix; None: nothing."""
    _, *prefix = text.split("\t")
    if len(prefix) > 1:
        return "expected a sentence, and behind one tab what its translation begins with"
    return translator.prefix_fault(prefix[0]) if prefix else None


if __name__ == "__main__":
    run_command(
        "translate", "Translate sentences from stdin or a file.", main, add_arguments,
        kind=TranslationRecipe, continues=False,
    )  # fmt: skip
