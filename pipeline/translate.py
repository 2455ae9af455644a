"""`./run.sh translate`: read source sentences, and write one translation a line."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline.command_line import path_argument, positive_argument, run_command
from pipeline.recipe import UsageError
from pipeline.translation import lines
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.glossary import Glossary
    from pipeline.translation.serving import TextTranslator, Translation

log = logging.getLogger("translate")

SHOWN = 5  # words that a warning names


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
        "--constraints",
        type=path_argument,
        metavar="GLOSSARY",
        help="file of terms, each with a tab and what must stand for it in translations",
    )
    parser.add_argument(
        "--scores", action="store_true", help="print a translation's score and a tab before it"
    )


def main(recipe: TranslationRecipe, arguments: argparse.Namespace) -> None:
    """Translate the input line by line."""
    streams = lines.open_streams(arguments.input, "translations")
    wanted = arguments.n_best or 1
    translator, glossary = load(recipe, arguments)
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

    warn = warner(translator)

    def translate(batches: Iterator[lines.Lines], progress: lines.Progress) -> Iterator[list[str]]:
        if arguments.prefix or glossary:
            fault = partial(line_fault, translator, glossary, arguments.prefix)
            batches = lines.up_to_fault(batches, streams.name, fault)
        for first, texts in batches:
            sentences, prefixes = texts, list[str]()
            if arguments.prefix:
                sides = [text.partition("\t") for text in texts]
                sentences, prefixes = [side[0] for side in sides], [side[2] for side in sides]
            warn(sentences)
            found = translator.n_best(sentences, progress, first, prefixes, glossary)
            found = [best[:wanted] for best in found]
            rows = [row(i, one) for i, best in enumerate(found, start=first - 1) for one in best]
            if arguments.alignment:
                links = align_translations(aligned, sentences, found)
                each = (pharaoh(of_one) for of_line in links for of_one in of_line)
                rows = [f"{begin}\t{links}" for begin, links in zip(rows, each, strict=True)]
            yield rows

    lines.convert_lines(streams, translate, log, "translating", "sentences")


def load(
    recipe: TranslationRecipe, arguments: argparse.Namespace
) -> tuple[TextTranslator, Glossary | None]:
    """Load the model, and the glossary if there is one."""
    path = arguments.constraints
    if path is None:
        return lines.load_translator(recipe, arguments), None
    from pipeline.translation.glossary import Glossary, read_entries

    entries = read_entries(path)  # which takes less time than loading the model
    translator = lines.load_translator(recipe, arguments)
    glossary = Glossary(path, entries, translator)
    log.info("%s: %d terms", path, len(entries))
    return translator, glossary


def warner(translator: TextTranslator) -> Callable[[Sequence[str]], None]:
    """Return what warns, once, of words in sentences that the model was never trained on."""
    told = False

    def warn(sentences: Sequence[str]) -> None:
        nonlocal told
        if told or not (unseen := translator.unseen(sentences)):
            return
        told = True
        more = f" and {len(unseen) - SHOWN} more" if len(unseen) > SHOWN else ""
        log.warning(
            "words that the model has never seen in training, and can only guess: %s%s",
            ", ".join(unseen[:SHOWN]), more,
        )  # fmt: skip

    return warn


def line_fault(
    translator: TextTranslator, glossary: Glossary | None, may_have_prefix: bool, text: str
) -> str | None:
    """Return what is wrong with a line, which may have a tab and a prefix; None: nothing."""
    sentence, _, prefix = text.partition("\t") if may_have_prefix else (text, "", "")
    if "\t" in prefix:
        return "expected a sentence, and behind one tab what its translation begins with"
    return translator.fault(sentence, prefix, glossary)


if __name__ == "__main__":
    run_command(
        "translate", "Translate sentences from stdin or a file.", main, add_arguments,
        kind=TranslationRecipe, continues=False,
    )  # fmt: skip
