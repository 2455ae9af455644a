"""Make the lexical shortlist of a run: the likely translations of each source token.

They are those of IBM Model 1 (Brown et al. 1993), trained on the pairs of the training shards: the
probabilities of target tokens, given a source token, that make the target sentences most likely.
Counts of common occurrence alone would need a third more tokens for as much of the references; the
source's EOS stands for the model's empty word. Sums are in one order, whatever the number of
threads: equal pairs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from data_prep.shards import ShardReader, TokenIds
from data_prep.text import EOS_IDX, UNK_IDX
from data_prep.vocabulary import load_vocabularies
from models.export_format import SHORTLISTS, Format
from pipeline.ranks import share_progress
from pipeline.translation.serving import tokens_of
from pipeline.translation.shortlist import Shortlist
from pipeline.translation_recipe import TranslationRecipe

# docs/serving.md has what was measured to choose these.
LARGE_VOCABULARY = 16_000  # tokens; with 8,000 a sentence takes 0.8 of its time, with 32,000 half
FREQUENT = 1 / 16  # of the target tokens, which are always allowed
LIKELY = 50  # target tokens that a source token allows besides; of 100 the file is twice as large
CANDIDATES = 256  # target tokens of a source token that the model considers
ITERATIONS = 3  # a fourth adds nothing
MOST_PAIRS = 1_000_000  # of 15 tokens a side they take 0.8 GB
PAIRS_AT_ONCE = 20_000
ROWS_AT_ONCE = 256  # of a matrix as wide as the vocabulary
TINY = 1e-9


class Coverage(NamedTuple):
    """How much of some references a shortlist allows."""

    size: float
    """Target tokens that it allows a sentence, on average."""

    covered: float
    """Share of the references' tokens that it allows their own sentences."""


def wants_shortlist(recipe: TranslationRecipe, format: Format) -> bool:
    """Tell whether an export of a run is to have a shortlist, if the vocabulary is large enough."""
    wanted = recipe.evaluation.shortlist
    return format == "onnx" if wanted is None else wanted and format in SHORTLISTS


def has_large_vocabulary(shards: Path) -> bool:
    """Tell whether a shortlist pays."""
    _, target = load_vocabularies(shards)
    large: bool = target.get_piece_size() >= LARGE_VOCABULARY
    return large


def coverage(shortlist: Shortlist, reader: ShardReader) -> Coverage:
    """Compare a shortlist with the references of pairs that it was not made from."""
    size = covered = tokens = 0
    for index in range(len(reader)):
        source, target = reader[index]
        allowed = shortlist.allowed(source)
        size += len(allowed)
        covered += int(np.isin(target, allowed).sum())
        tokens += len(target)
    return Coverage(size / max(1, len(reader)), covered / max(1, tokens))


def make_shortlist(shards: Path) -> Shortlist:
    """Make a shortlist from the training pairs.

    Besides its likely translations a source token allows the target token that is written alike, so
    that names and numbers can be copied, whether training had them or not.

    :param shards: folder of the shards, with their vocabulary.
    :raises DataError: a shard is missing or damaged.
    """
    source_tokens, target_tokens = map(tokens_of, load_vocabularies(shards))
    sizes = len(source_tokens), len(target_tokens)
    source, target = _occurrences(ShardReader(shards, "train"), sizes)
    always = np.zeros(len(target_tokens), bool)
    counts = np.bincount(target.indices, minlength=len(always))
    always[np.argsort(-counts, kind="stable")[: round(FREQUENT * len(always))]] = True
    always[[UNK_IDX, EOS_IDX]] = True
    table = _translation_table(source, target)
    table.data[always[table.indices]] = 0
    ids = {token: number for number, token in enumerate(target_tokens)}
    of_token = []
    for token, (likely, _) in zip(source_tokens, _best(table, LIKELY), strict=True):
        alike = ids.get(token)
        own = [] if alike is None or always[alike] else [alike]
        of_token.append(np.union1d(likely, np.array(own, likely.dtype)))
    return Shortlist.of_lists([np.flatnonzero(always), *of_token])


def _occurrences(reader: ShardReader, sizes: Sequence[int]) -> list[csr_matrix]:
    """Return for each side which tokens are in which pairs: ones in `[pairs, vocabulary]`.

    The shards are in random order, so that the first pairs are a sample of all.

    :param sizes: of the vocabularies.
    """
    pairs = min(len(reader), MOST_PAIRS)
    blocks = []
    for begin in range(0, pairs, PAIRS_AT_ONCE):
        found = reader.read(np.arange(begin, min(begin + PAIRS_AT_ONCE, pairs)))
        sides = zip(*found, strict=True)
        blocks.append([_ones(ids, size) for ids, size in zip(sides, sizes, strict=True)])
    return [vstack(side, "csr") for side in zip(*blocks, strict=True)]


def _ones(sentences: Sequence[TokenIds], size: int) -> csr_matrix:
    offsets = np.cumsum([0, *map(len, sentences)])
    ids = np.concatenate(sentences)
    matrix = csr_matrix((np.ones(len(ids), np.float32), ids, offsets), (len(sentences), size))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _translation_table(source: csr_matrix, target: csr_matrix) -> csr_matrix:
    """Return the probabilities of target tokens, given a source token, as a matrix
    `[source vocabulary, target vocabulary]`. It has those of the `CANDIDATES` that are likeliest
    after the first iteration.

    :param source: which source tokens are in which pairs.
    :param target: which target tokens are.
    """
    by_token = source.T.tocsr()
    rows = by_token.shape[0]
    with share_progress("shortlist", rows + (ITERATIONS - 1) * (source.shape[0] + rows)) as advance:
        weights = target.copy()  # all source tokens of a pair are as likely
        weights.data /= np.repeat(np.diff(source.indptr), np.diff(target.indptr))
        table = vstack([_pruned(block @ weights) for block in _blocks(by_token, advance)], "csr")
        _normalise(table)
        for _ in range(1, ITERATIONS):
            weights.data = 1 / np.maximum(_product_at(target, source, table, advance), TINY)
            table.data *= _product_at(table, by_token, weights, advance)
            _normalise(table)
    return table


def _product_at(
    places: csr_matrix, left: csr_matrix, right: csr_matrix, advance: Callable[[int], None]
) -> NDArray[np.float32]:
    """Return those entries of `left @ right` where `places` has some."""
    found = []
    begin = 0
    for block in _blocks(left, advance):
        some = places[begin : begin + block.shape[0]]
        begin += block.shape[0]
        row = np.repeat(np.arange(block.shape[0]), np.diff(some.indptr))
        found.append((block @ right).toarray()[row, some.indices])
    return np.concatenate(found)


def _blocks(matrix: csr_matrix, advance: Callable[[int], None]) -> Iterator[csr_matrix]:
    """Yield the rows, some at once."""
    for begin in range(0, matrix.shape[0], ROWS_AT_ONCE):
        block = matrix[begin : begin + ROWS_AT_ONCE]
        yield block
        advance(block.shape[0])


def _pruned(matrix: csr_matrix) -> csr_matrix:
    """Keep the largest entries of each row."""
    best = list(_best(matrix, CANDIDATES))
    offsets = np.cumsum([0, *(len(ids) for ids, _ in best)])
    ids, values = (np.concatenate(part) for part in zip(*best, strict=True))
    return csr_matrix((values, ids, offsets), matrix.shape)


def _best(matrix: csr_matrix, count: int) -> Iterator[tuple[NDArray[np.int32], NDArray[Any]]]:
    """Yield columns and values of each row's largest entries that are not 0, the largest first."""
    for begin, end in pairwise(matrix.indptr.tolist()):
        ids, values = matrix.indices[begin:end], matrix.data[begin:end]
        best = np.lexsort((ids, -values))[:count]
        best = best[values[best] > 0]
        yield ids[best], values[best]


def _normalise(table: csr_matrix) -> None:
    """Make rows sum to 1."""
    sums = np.asarray(table.sum(axis=1)).ravel()
    table.data /= np.repeat(np.maximum(sums, TINY), np.diff(table.indptr))
