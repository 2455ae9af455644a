"""Word alignment: which word of a sentence each word of its translation comes from.

A PyTorch model is led through translations that are there, and shows where it looks meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from data_prep.text import EOS_IDX, normalise, visible
from pipeline.recipe import UsageError
from pipeline.translation.beam_search import cross_attention
from pipeline.translation.search import Floats
from pipeline.translation.serving import Pair, TextTranslator, Translation, batches_by_length
from pipeline.translation.translator import Translator


class Side(NamedTuple):
    """A sentence or a translation, or a part of one."""

    ids: list[int]
    """Of its tokens, with EOS."""

    words: list[int]
    """Of each token but EOS the number of its word, from 0."""

    texts: list[str]
    """Of each token but EOS what it stands for."""


class Link(NamedTuple):
    """A word of a translation comes from a word of the sentence."""

    source: int
    """Its number, from 0."""

    target: int


def check_engine(translator: TextTranslator) -> Translator:
    """Return the translator, if it can show where its model looks.

    :raises UsageError: it cannot.
    """
    if not isinstance(translator, Translator):
        raise UsageError(
            f"--alignment reads the attention of a PyTorch model, which {translator.backend} does "
            "not show; take an export in format safetensors, or the run's checkpoints without "
            "--model"
        )
    return translator


def pharaoh(links: Sequence[Link]) -> str:
    """Return links as text, in Pharaoh's format: `0-0 1-2`."""
    return " ".join(f"{link.source}-{link.target}" for link in sorted(links))


def align_pairs(translator: Translator, pairs: Sequence[Pair]) -> list[list[Link]]:
    """Align sentences with translations that are given.

    :param pairs: as they are scored; none is too long for the model.
    """
    vocabularies = translator.source_vocabulary, translator.target_vocabulary
    columns = (
        [_encoded(vocabulary, pair[side], [normalise(pair[side])])[0] for pair in pairs]
        for side, vocabulary in enumerate(vocabularies)
    )
    return _align(translator, list(zip(*columns, strict=True)))


def align_translations(
    translator: Translator, sentences: Sequence[str], found: Sequence[Sequence[Translation]]
) -> list[list[list[Link]]]:
    """Align translations with their sentences, token by token as a search has found them.

    Where a sentence was translated in parts, the translation of a part is aligned with that part.

    :param sentences: as they were given.
    :param found: translations of each.
    :returns: the links of each translation, in the same order.
    """
    sides: list[tuple[Side, Side]] = []
    parts_of: list[list[range]] = []
    for sentence, translations in zip(sentences, found, strict=True):
        parts_of.append([])
        for translation in translations:
            begin, words = len(sides), 0
            texts = [part.text for part, _ in translation.found]
            sources = _encoded(translator.source_vocabulary, sentence, texts)
            for source, (_, hypothesis) in zip(sources, translation.found, strict=True):
                target = _decoded(translator.target_vocabulary, hypothesis.tokens, words)
                words = max([words - 1, *target.words]) + 1
                sides.append((source, target))
            parts_of[-1].append(range(begin, len(sides)))
    links = _align(translator, sides)
    return [
        [[link for part in parts for link in links[part]] for parts in of_sentence]
        for of_sentence in parts_of
    ]


def _encoded(vocabulary: SentencePieceProcessor, line: str, parts: Sequence[str]) -> list[Side]:
    """Encode the parts of a line, with the words of the line.

    :param line: as it was given.
    :param parts: what it was cut into, normalised.
    """
    text, end = normalise(line), 0
    # Characters that nobody sees become spaces when a line is normalised, inside a word too.
    numbers = [i for i, word in enumerate(line.split()) for _ in normalise(word).split()]
    sides = []
    for part in parts:
        begin = text.index(part, end)
        end = begin + len(part)
        before = len(text[:begin].split())
        if begin and not text[begin - 1].isspace():  # cut inside a word
            before -= 1
        tokens = vocabulary.encode(part, return_type="proto").pieces
        texts = [token.surface for token in tokens]
        words = [numbers[before + word] for word in words_of_tokens(texts)]
        sides.append(Side([*(token.id for token in tokens), EOS_IDX], words, texts))
    return sides


def _decoded(vocabulary: SentencePieceProcessor, ids: list[int], first_word: int) -> Side:
    """Return what a search has found, with the words of its text.

    :param ids: with EOS.
    :param first_word: the number of its first word.
    """
    tokens = vocabulary.decode(ids[:-1], return_type="proto").pieces
    texts = [visible(token.surface) for token in tokens]
    return Side(ids, [first_word + word for word in words_of_tokens(texts)], texts)


def words_of_tokens(texts: Iterable[str]) -> list[int]:
    """Return the number of each token's word: the first word that it has a character of.

    A token of white space alone belongs to the word behind it.

    :param texts: of one token after the other; together, the text.
    :returns: nothing if there is no word.
    """
    words, count, inside = [], 0, False
    for text in texts:
        if text[:1].isspace():
            inside = False
        words.append(count - inside)
        if begun := len(text.split()):
            count += begun - inside
            inside = not text[-1].isspace()
    return [min(word, count - 1) for word in words] if count else []


def _align(translator: Translator, sides: Sequence[tuple[Side, Side]]) -> list[list[Link]]:
    """Align sources with targets, in batches of similar length."""
    links: list[list[Link]] = [[] for _ in sides]
    lengths = {
        number: max(len(source.ids), len(target.ids))
        for number, (source, target) in enumerate(sides)
        if source.words and target.words
    }
    for batch in batches_by_length(lengths, translator.search, beam_size=1):
        ids = [sides[i][0].ids for i in batch], [sides[i][1].ids for i in batch]
        attention = cross_attention(translator.models, ids)
        for number, matrix in zip(batch, attention, strict=True):
            links[number] = _links(matrix, *sides[number])
    return links


def _links(attention: Floats, source: Side, target: Side) -> list[Link]:
    """Link each word of a translation to the word of the sentence that it looks at most.

    :param attention: of each target token to each source token, `[T, S]`, padding included.
    """
    words, columns = np.array(target.words), np.array(source.words)
    # A full stop looks at the full stop, wherever that is; it says nothing of the word before it.
    spoken = np.array([any(map(str.isalnum, text)) for text in target.texts])
    counted = spoken | ~np.isin(words, words[spoken])
    rows = words[counted]
    sums = np.zeros((rows.max() + 1, columns.max() + 1), np.float32)
    seen = attention[: len(words), : len(columns)]  # of EOS, and what is on EOS, does not count
    np.add.at(sums, (rows[:, None], columns), seen[counted])
    return [Link(int(sums[word].argmax()), int(word)) for word in np.unique(rows)]
