"""A glossary: terms of the source language, and what must stand for each in a translation.

It is a file with a term, a tab, and what stands for it on each line. `constrained_search.py`
searches for translations that have it.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from data_prep.corpora import read_lines
from data_prep.files import DataError
from data_prep.text import EOS_IDX, UNK_IDX, normalise
from pipeline.recipe import UsageError
from pipeline.translation.constrained_search import Terms, Tokens
from pipeline.translation.serving import TextTranslator

SPACE = "▁"  # in tokens


class Entry(NamedTuple):
    """A line of a glossary, normalised as training text is."""

    line: int
    """Its number, from 1."""

    source: str
    target: str


class Match(NamedTuple):
    """A term in a line of text."""

    begin: int
    """Its first character."""

    target: Tokens
    """The tokens of what must stand for it."""


class Glossary:
    """Finds the terms of sentences."""

    def __init__(self, path: Path, entries: Sequence[Entry], translator: TextTranslator) -> None:
        """Have the target terms spelled by the translator's vocabulary.

        :param path: of the entries, for errors.
        :raises UsageError: the translator cannot search for given terms.
        :raises DataError: a term cannot be spelled, or is too long for the model.
        """
        if translator.search.sampling_topk is not None:
            raise UsageError(
                "--constraints are for beam search; leave evaluation.sampling_topk out"
            )
        if not translator.takes_terms:
            raise UsageError(
                f"--constraints: {translator.backend} cannot search for given terms; take an "
                "export in format safetensors or onnx, or the run's checkpoints without --model"
            )
        self._breaks = word_breaks(translator.target_vocabulary)
        self._targets: dict[str, Tokens] = {}
        for entry in entries:
            if fault := _fault(entry, translator):
                raise DataError(f"{path}:{entry.line}: {fault}")
            self._targets[entry.source] = tuple(translator.target_vocabulary.encode(entry.target))
        self._longest = max((len(_words(source)) for source in self._targets), default=0)

    def find(self, text: str) -> list[Match]:
        """Find terms as whole words, from left to right, of those that begin at a word the longest;
        they do not overlap.

        :param text: normalised.
        """
        words = _words(text)
        matches, number = [], 0
        while number < len(words):
            begin = words[number].start
            for last in range(min(number + self._longest, len(words)) - 1, number - 1, -1):
                target = self._targets.get(text[begin : words[last].stop])
                if target is not None:
                    matches.append(Match(begin, target))
                    number = last
                    break
            number += 1
        return matches

    def of_parts(self, text: str, parts: Sequence[str]) -> list[Terms | None]:
        """Return the terms of each part of a text; one that is cut is of the part it begins in.

        :param text: normalised; `parts` of it come one after the other.
        """
        if not parts:
            return []
        begins, end = [], 0
        for part in parts:
            begins.append(text.index(part, end))
            end = begins[-1] + len(part)
        required: list[list[Tokens]] = [[] for _ in parts]
        for match in self.find(text):
            required[max(bisect_right(begins, match.begin) - 1, 0)].append(match.target)
        return [Terms(terms, self._breaks) if terms else None for terms in required]


def read_entries(path: Path) -> list[Entry]:
    """Read a glossary; empty lines say nothing.

    :raises UsageError: the file cannot be read.
    :raises DataError: a line is no entry, or contradicts another one.
    """
    entries: dict[str, Entry] = {}
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            sides = [normalise(side) for side in line.split("\t")]
            where = f"{path}:{number}"
            if len(sides) != 2:
                raise DataError(f"{where}: expected a term, one tab, and what must stand for it")
            if not all(sides):
                raise DataError(
                    f"{where}: the {'source' if not sides[0] else 'target'} term is empty"
                )
            entry = Entry(number, *sides)
            first = entries.setdefault(entry.source, entry)
            if first.target != entry.target:
                raise DataError(
                    f'{where}: "{entry.source}" is "{entry.target}" here, and "{first.target}" in '
                    f"line {first.line}"
                )
    except OSError as error:
        raise UsageError(f"--constraints {path}: cannot be read: {error.strerror}") from error
    return list(entries.values())


def _fault(entry: Entry, translator: TextTranslator) -> str | None:
    """Return why the model cannot write a term or read its source; None: it can."""
    if not translator.source_vocabulary.encode(entry.source):
        return f'the source vocabulary makes no token of "{entry.source}"'
    vocabulary, limit = translator.target_vocabulary, translator.max_target_tokens
    ids, texts = (vocabulary.encode(entry.target, out_type=kind) for kind in (int, str))
    for token, text in zip(ids, texts, strict=True):
        if token == UNK_IDX:  # as text it is what it stands for
            return f'the target vocabulary does not know "{text}" of "{entry.target}"'
    spelled = vocabulary.decode(ids)
    if spelled != entry.target:
        return f'the target vocabulary makes "{spelled}" of "{entry.target}"'
    if not vocabulary.id_to_piece(ids[0]).startswith(SPACE):
        return f'the target vocabulary does not begin a word with "{entry.target}"'
    if len(ids) >= limit:
        return (
            f"the target term has {len(ids)} tokens, and the model can produce {limit} in all, "
            "with the end of the sentence"
        )
    return None


def word_breaks(vocabulary: SentencePieceProcessor) -> NDArray[np.bool_]:
    """Return whether a word is over where a token follows: at a space, at what is no letter or
    digit, and at EOS. `[vocabulary]`"""
    ids = list(range(vocabulary.get_piece_size()))
    silent = zip(vocabulary.is_control(ids), vocabulary.is_byte(ids), strict=True)
    tokens = zip(vocabulary.id_to_piece(ids), silent, strict=True)
    breaks = np.array([not any(each) and not _in_word(text[0]) for text, each in tokens])
    breaks[EOS_IDX] = True
    return breaks


def _in_word(character: str) -> bool:
    """Tell whether a character is a letter, a digit, or a mark on one."""
    return unicodedata.category(character)[0] in "LMN"


def _words(text: str) -> list[slice]:
    """Return the words of a text, and other characters, each by itself, without spaces."""
    words, end = [], 0
    for is_word, characters in groupby(text, _in_word):
        begin, end = end, end + len(list(characters))
        cuts = [begin, end] if is_word else range(begin, end + 1)
        words += [slice(a, b) for a, b in pairwise(cuts) if text[a:b] != " "]
    return words
