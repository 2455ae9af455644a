"""Binarize cleaned text: it becomes shards of token ids, in a random order.

It takes two passes: first every pair of a piece goes to a shard that is drawn for it, then every
shard is shuffled. A worker holds no more than a piece (times its weight) or a shard in memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial as bind
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.arrow import open_rows, write_rows
from data_prep.clean import Cleaned
from data_prep.config import DataConfig
from data_prep.corpora import read_text
from data_prep.files import DataError, save_array, sha256_of, write_atomically
from data_prep.pieces import Result, map_pieces
from data_prep.shards import CorpusInfo, Counts, ShardInfo, ShardsManifest, id_type
from data_prep.stage import log, run_stage
from data_prep.text import EOS_IDX, SOURCE_WORDS, UNK_IDX, normalise, vocabulary_files, words_of
from data_prep.vocabulary import (
    Lost,
    PreparedVocabulary,
    Unknown,
    VocabularyInfo,
    load_vocabularies,
    lost_by,
    unknown_characters,
)

TokenIdsOf = Callable[[Sequence[Sequence[str]]], pa.RecordBatch]

CLOSED_VOCABULARY = 5000  # different words; any larger text of people's own has more
LINES_AT_ONCE = 10_000
MANY_UNKNOWN = 0.001  # share of tokens from which they are worth a warning
COUNTED = ("pairs", "source_tokens", "target_tokens")  # of pieces and shards
VERSION = 9  # raise it when the same inputs would give other bytes


def binarize(
    config: DataConfig,
    cleaned: Cleaned,
    vocabulary: PreparedVocabulary,
    text: Path,
    models: Path,
    folder: Path,
    executor: Executor,
) -> ShardsManifest:
    """Write `SPLIT-NNNNN.arrow` for every split, and the vocabulary beside them.

    Training pairs over `max_tokens_per_side` are dropped and counted; validation and test pairs
    are cut to it, and keep their order.

    :param text: folder of the cleaning stage.
    :param models: folder of the vocabulary stage.
    :raises DataError: no training pair is left.
    """
    inputs = {
        "cleaned": cleaned.digest,
        "weights": [corpus.weight for corpus in config.train],
        "vocabulary": vocabulary.sha256,
        "max_tokens_per_side": config.max_tokens_per_side,
        "pairs_per_shard": config.pairs_per_shard,
        "seed": config.seed,
        "version": VERSION,
    }
    if config.vocabulary.taken_from is not None:
        inputs["vocabulary_is_taken"] = True  # see `_write_words`

    def build(partial: Path) -> dict[str, Any]:
        token_ids = bind(_token_ids, models, vocabulary.sizes)
        encoded, train = _write_train(config, cleaned, text, models, token_ids, executor, partial)
        held_out = [
            _write_held_out(config, text, split, token_ids, partial) for split in ("valid", "test")
        ]
        for path in vocabulary_files(models):
            shutil.copyfile(path, partial / path.name)
        _write_words(config, encoded, partial)
        shards = (*train, *held_out)
        made = ShardsManifest(
            languages=config.languages,
            vocabulary=VocabularyInfo(sizes=vocabulary.sizes, sha256=vocabulary.sha256),
            totals={split: _total(shards, split) for split in ("train", "valid", "test")},
            lost=_lost(config, text, models),
            corpora=_corpora(config, cleaned, encoded),
            files=dict(cleaned.files),
            seed=config.seed,
            versions={"pyarrow": pa.__version__, **vocabulary.versions},
            shards=shards,
        )
        _check_and_log(config, made)
        return made.model_dump()

    return ShardsManifest.model_validate(run_stage(folder, inputs, build))


def _write_train(
    config: DataConfig,
    cleaned: Cleaned,
    text: Path,
    models: Path,
    token_ids: TokenIdsOf,
    executor: Executor,
    folder: Path,
) -> tuple[list[Result], list[ShardInfo]]:
    """Write the training shards, `train-NNNNN.arrow`.

    :returns: what `_encode` said of each piece, and the shards.
    """
    weights = [config.train[piece.corpus].weight for piece in cleaned.pieces]
    wanted = sum(weight * kept for weight, kept in zip(weights, cleaned.kept, strict=True))
    number_of_shards = max(1, round(wanted / config.pairs_per_shard))
    encode = bind(_encode, config, text / "train", models, token_ids, number_of_shards)
    pairs, gathered = folder / "scratch-token-ids", folder / "scratch-train"
    encoded = map_pieces(executor, encode, list(enumerate(weights)), pairs)
    gather = bind(_gather, config, pairs, len(encoded))
    shards = []
    for number, counts in enumerate(
        map_pieces(executor, gather, range(number_of_shards), gathered)
    ):
        name = f"train-{number:05d}.arrow"
        made = gathered / f"{number:05d}" / "shard.arrow"
        if made.exists():  # an interrupted call may have moved it
            made.replace(folder / name)
        shards.append(ShardInfo(name=name, split="train", **counts))
    return encoded, shards


def _write_held_out(
    config: DataConfig, text: Path, split: str, token_ids: TokenIdsOf, folder: Path
) -> ShardInfo:
    """Write the one shard of validation or test set, in its order."""
    lines = [list(map(normalise, read_text(text / f"{split}.{lang}"))) for lang in config.languages]
    pairs = token_ids(lines)
    limit = config.max_tokens_per_side
    if too_long := len(pairs) - len(_within(limit, pairs)):
        log.info("shards: cut %d %s pairs at the token limit", too_long, split)
    columns = [
        pa.array([_cut(ids, limit) for ids in side.to_pylist()], side.type)
        for side in pairs.columns
    ]
    pairs = pa.record_batch(columns, pairs.schema)
    path = folder / f"{split}-00000.arrow"
    write_rows(path, pairs)
    return ShardInfo(name=path.name, split=split, **_counts(pairs), sha256=sha256_of(path))


def _write_words(config: DataConfig, encoded: Sequence[Result], folder: Path) -> None:
    """Write the words of the training source text, one a line, if it has few different ones.

    A model of such text can guess nothing about any other word, and `translate` says so. In other
    text words without end are new, and a model learns to make sense of their subwords; and who
    takes a vocabulary goes on from what was trained with it, on text that is not here.

    :param encoded: what `_encode` said of each piece.
    """
    if config.vocabulary.taken_from is not None:
        return
    words = set[str]()
    for made in encoded:
        if made["words"] is None or len(words := words.union(made["words"])) > CLOSED_VOCABULARY:
            return
    write_atomically(folder / SOURCE_WORDS, "".join(f"{word}\n" for word in sorted(words)))


def _words(lines: Sequence[str]) -> list[str] | None:
    """Return the different words of some lines; None: they are too many to be all that a language
    has."""
    words = set[str]()
    for line in lines:
        words.update(words_of(line))
        if len(words) > CLOSED_VOCABULARY:
            return None
    return sorted(words)


def _lost(config: DataConfig, text: Path, models: Path) -> dict[str, Lost]:
    """Compare validation and test text with what the vocabulary gives back of it, and log it."""
    lost = {}
    for split in ("valid", "test"):
        for lang, vocabulary in zip(config.languages, load_vocabularies(models), strict=True):
            lines = read_text(text / f"{split}.{lang}")
            if lang == config.source_lang:  # a reference is compared with translations as it is
                lines = list(map(normalise, lines))
            lost[f"{split}.{lang}"] = found = lost_by(vocabulary, lines)
            if found.lines:
                verb = "read" if lang == config.source_lang else "write"
                log.warning(
                    "shards: the vocabulary cannot %s %d of the %d lines of %s.%s as they are: %s",
                    verb, found.lines, len(lines), split, lang, found,
                )  # fmt: skip
    return lost


def _corpora(
    config: DataConfig, cleaned: Cleaned, encoded: Sequence[Result]
) -> tuple[CorpusInfo, ...]:
    """Return what became of each training corpus.

    :param encoded: what `_encode` said of each piece.
    """
    corpora = []
    for number, (corpus, trained) in enumerate(zip(cleaned.corpora, config.train, strict=True)):
        own = [
            made
            for piece, made in zip(cleaned.pieces, encoded, strict=True)
            if piece.corpus == number
        ]
        sums = {key: sum(made[key] for made in own) for key in ("too_long", *COUNTED)}
        unknown = {
            lang: Unknown.total([Unknown.model_validate(made["unknown"][side]) for made in own])
            for side, lang in enumerate(config.languages)
        }
        corpora.append(
            CorpusInfo(**corpus.model_dump(), weight=trained.weight, **sums, unknown=unknown)
        )
    return tuple(corpora)


def _check_and_log(config: DataConfig, made: ShardsManifest) -> None:
    """Log what is in the shards, and refuse data without training pairs.

    :raises DataError: no training pair is left.
    """
    too_long = sum(corpus.too_long for corpus in made.corpora)
    if not made.totals["train"].pairs:
        raise DataError(
            f"No training pair is left: {too_long} are longer than data.max_tokens_per_side "
            f"({config.max_tokens_per_side}), the weights of data.train leave out the rest"
        )
    log.info("shards: %s", ", ".join(f"{n} {t.pairs} pairs" for n, t in made.totals.items()))
    if any(corpus.weight != 1 for corpus in made.corpora):
        mix = (f"{c.pairs} of {c.corpus} (× {c.weight:g})" for c in made.corpora)
        log.info("shards: training pairs by weight: %s", ", ".join(mix))
    for corpus in made.corpora:
        for lang, unknown in corpus.unknown.items():
            if unknown.unknown_tokens or config.vocabulary.taken_from is not None:
                level = logging.WARNING if unknown.share >= MANY_UNKNOWN else logging.INFO
                said = "shards: %s.%s: the vocabulary lacks %s"
                log.log(level, said, corpus.corpus, lang, unknown)
    if too_long:
        log.info("shards: dropped %d training pairs over the token limit", too_long)


def _encode(
    config: DataConfig,
    text: Path,
    models: Path,
    token_ids: TokenIdsOf,
    shards: int,
    numbered: tuple[int, float],
    folder: Path,
) -> dict[str, Any]:
    """Write the pairs of a piece, sorted by their shards, to `pairs.arrow`.

    `begins.npy` says where each shard's begin, and the end: int64 `[shards + 1]`.

    :param numbered: number of the piece, and how often each of its pairs is wanted.
    :returns: pairs that are over the token limit, counts of those that go to shards, what is
        unknown to the vocabulary on either side, and the words of the source.
    """
    piece, weight = numbered
    lines = [read_text(text / f"{piece:05d}" / f"text.{lang}") for lang in config.languages]
    pairs = token_ids(lines)
    short = _within(config.max_tokens_per_side, pairs)
    kept = short.take(pa.array(_drawn(len(short), weight, [config.seed, 4, piece])))
    shard = np.random.default_rng([config.seed, 2, piece]).integers(shards, size=len(kept))
    write_rows(folder / "pairs.arrow", kept.take(pa.array(np.argsort(shard, kind="stable"))))
    begins = np.searchsorted(np.sort(shard), np.arange(shards + 1))
    save_array(folder / "begins.npy", begins)
    unknown = [each.model_dump() for each in _unknown(models, lines, pairs)]
    return {
        "too_long": len(pairs) - len(short),
        **_counts(kept),
        "unknown": unknown,
        "words": _words(lines[0]),
    }


def _unknown(
    models: Path, sides: Sequence[Sequence[str]], pairs: pa.RecordBatch
) -> Iterator[Unknown]:
    """Yield what of source and target lines is unknown to the vocabulary.

    :param pairs: what `_token_ids` has made of them.
    """
    for vocabulary, lines, column in zip(
        load_vocabularies(models), sides, pairs.columns, strict=True
    ):
        ids, begins = column.flatten().to_numpy(), column.offsets.to_numpy()
        places = np.flatnonzero(ids == UNK_IDX)
        rows = np.unique(np.searchsorted(begins, places, side="right") - 1)
        characters = unknown_characters(vocabulary, [lines[row] for row in rows])
        yield Unknown(
            characters=sum(map(len, lines)),
            unknown_characters=characters.total(),
            tokens=len(ids),
            unknown_tokens=len(places),
            unknown=characters,
        )


def _drawn(pairs: int, weight: float, seed: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Draw pairs by weight: 2.3 is all of them twice, and three tenths of them once more."""
    whole, share = divmod(weight, 1)
    once_more = np.random.default_rng(seed).permutation(pairs) < round(share * pairs)
    return np.repeat(np.arange(pairs), int(whole) + once_more)


def _gather(
    config: DataConfig, encoded: Path, pieces: int, shard: int, folder: Path
) -> dict[str, Any]:
    """Write one training shard: its pairs from all pieces, shuffled."""
    pairs = pa.concat_batches(
        [_pairs_of(shard, encoded / f"{piece:05d}") for piece in range(pieces)]
    )
    order = np.random.default_rng([config.seed, 3, shard]).permutation(len(pairs))
    path = folder / "shard.arrow"
    write_rows(path, pairs.take(pa.array(order)))
    return {**_counts(pairs), "sha256": sha256_of(path)}


def _pairs_of(shard: int, piece: Path) -> pa.RecordBatch:
    """Return what `_encode` has written for a shard, memory-mapped.

    :param piece: the folder of a piece.
    """
    begin, end = np.load(piece / "begins.npy", mmap_mode="r")[shard : shard + 2].tolist()
    return open_rows(piece / "pairs.arrow").slice(begin, end - begin)


def _within(limit: int, pairs: pa.RecordBatch) -> pa.RecordBatch:
    """Return the pairs with at most `limit` tokens on either side."""
    longest = pc.max_element_wise(*(pc.list_value_length(side) for side in pairs.columns))
    return pairs.filter(pc.less_equal(longest, limit))


def _cut(ids: list[int], limit: int) -> list[int]:
    return ids if len(ids) <= limit else [*ids[: limit - 1], EOS_IDX]


def _token_ids(
    models: Path, vocab_sizes: Sequence[int], sides: Sequence[Sequence[str]]
) -> pa.RecordBatch:
    """Return source and target lines as the columns of a shard."""
    dtype = id_type(vocab_sizes)
    columns = []
    for vocabulary, lines in zip(load_vocabularies(models), sides, strict=True):
        encode = vocabulary.encode
        values, lengths = [np.empty(0, dtype)], [0]
        for begin in range(0, len(lines), LINES_AT_ONCE):
            ids = encode(list(lines[begin : begin + LINES_AT_ONCE]), add_eos=True, num_threads=1)
            values.append(np.fromiter(chain.from_iterable(ids), dtype))
            lengths += map(len, ids)
        offsets = pa.array(np.cumsum(lengths), pa.int32())
        columns.append(pa.ListArray.from_arrays(offsets, np.concatenate(values)))
    return pa.record_batch(columns, names=["source", "target"])


def _counts(pairs: pa.RecordBatch) -> dict[str, int]:
    tokens = (len(pairs.column(side).flatten()) for side in ("source", "target"))
    return dict(zip(COUNTED, (len(pairs), *tokens), strict=True))


def _total(shards: Sequence[ShardInfo], split: str) -> Counts:
    own = [shard for shard in shards if shard.split == split]
    return Counts(**{key: sum(getattr(shard, key) for shard in own) for key in COUNTED})
