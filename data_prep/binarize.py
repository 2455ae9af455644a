"""Binarize: cleaned text and a vocabulary become shards of token ids, in a random order.

Two passes, neither with more than a piece (times its weight) or a shard in memory: every pair of a
piece goes to a shard drawn for it, then every shard is shuffled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial as bind
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.config import DataConfig
from data_prep.corpora import read_text
from data_prep.files import DataError, digest_of, sha256_of
from data_prep.pieces import map_pieces
from data_prep.shards import id_type, write_shard
from data_prep.stage import Manifest, log, run_stage
from data_prep.vocabulary import EOS_IDX, load_vocabularies, vocabulary_files

TokenIdsOf = Callable[[Sequence[Sequence[str]]], pa.RecordBatch]

LINES_AT_ONCE = 10_000
SIZES = ("pairs", "source_tokens", "target_tokens")  # what is counted of pieces and shards
VERSION = 5  # raise it when the same inputs would give other bytes


def binarize(
    config: DataConfig,
    cleaned: Manifest,
    vocabulary: Manifest,
    text: Path,
    models: Path,
    folder: Path,
    executor: Executor,
) -> Manifest:
    """Write `SPLIT-NNNNN.arrow` for every split, and the vocabulary beside them.

    Training pairs over `max_tokens_per_side` are dropped and counted; validation and test pairs
    are cut to it, and keep their order.

    :param text: folder of the cleaning stage.
    :param models: folder of the vocabulary stage.
    :returns: manifest with `shards` (pairs, tokens and sha256 of each), `vocabulary`, `totals`,
        and of each of `corpora` its cleaning, weight, and pairs and tokens in the shards.
    """
    pieces = cleaned["inputs"]["pieces"]
    weights = [config.train[piece["corpus"]].weight for piece in pieces]
    inputs = {
        "cleaned": digest_of(cleaned),
        "weights": [corpus.weight for corpus in config.train],
        "vocabulary": vocabulary["sha256"],
        "max_tokens_per_side": config.max_tokens_per_side,
        "pairs_per_shard": config.pairs_per_shard,
        "seed": config.seed,
        "version": VERSION,
    }
    wanted = sum(weight * kept for weight, kept in zip(weights, cleaned["kept"], strict=True))
    shards_of_train = max(1, round(wanted / config.pairs_per_shard))

    def build(partial: Path) -> dict[str, Any]:
        token_ids = bind(_token_ids, models, vocabulary["sizes"])
        encode = bind(_encode, config, text / "train", token_ids, shards_of_train)
        encoded = map_pieces(
            executor, encode, list(enumerate(weights)), partial / "scratch-encoded"
        )
        gather = bind(_gather, config, partial / "scratch-encoded", len(encoded))
        gathered = map_pieces(
            executor, gather, list(range(shards_of_train)), partial / "scratch-train"
        )
        shards = []
        for number, counts in enumerate(gathered):
            name = f"train-{number:05d}.arrow"
            made = partial / "scratch-train" / f"{number:05d}" / "shard.arrow"
            if made.exists():  # else an interrupted call moved it
                made.replace(partial / name)
            shards.append({"name": name, "split": "train", **counts})
        for split in ("valid", "test"):
            name = f"{split}-00000.arrow"
            pairs = _encode_in_order(config, text, split, token_ids)
            write_shard(partial / name, pairs)
            shards.append({"name": name, "split": split, **_counts(pairs, partial / name)})
        for path in vocabulary_files(models):
            shutil.copyfile(path, partial / path.name)
        totals = {split: _total(shards, split) for split in ("train", "valid", "test")}
        corpora = [
            {**corpus, "weight": trained.weight, **_in_an_epoch(number, pieces, encoded)}
            for number, (corpus, trained) in enumerate(
                zip(cleaned["corpora"], config.train, strict=True)
            )
        ]
        too_long = sum(corpus["too_long"] for corpus in corpora)
        if not totals["train"]["pairs"]:
            raise DataError(
                f"No training pair is left: {too_long} are longer than data.max_tokens_per_side "
                f"({config.max_tokens_per_side}), the weights of data.train leave out the rest"
            )
        log.info("shards: %s", ", ".join(f"{n} {t['pairs']} pairs" for n, t in totals.items()))
        if any(corpus["weight"] != 1 for corpus in corpora):
            mix = (f"{c['pairs']} of {c['corpus']} (× {c['weight']:g})" for c in corpora)
            log.info("shards: training pairs by weight: %s", ", ".join(mix))
        if too_long:
            log.info("shards: dropped %d training pairs over the token limit", too_long)
        return {
            "languages": config.languages,
            "vocabulary": {key: vocabulary[key] for key in ("sizes", "sha256")},
            "totals": totals,
            "corpora": corpora,
            "files": cleaned["inputs"]["files"],
            "seed": config.seed,
            "versions": {"pyarrow": pa.__version__, **vocabulary["versions"]},
            "shards": shards,
        }

    return run_stage(folder, inputs, build)


def _encode(
    config: DataConfig,
    text: Path,
    token_ids: TokenIdsOf,
    shards: int,
    numbered: tuple[int, float],
    folder: Path,
) -> dict[str, Any]:
    """One piece as `pairs.arrow`, a record batch for each of the shards that its pairs go to.

    :param numbered: the piece, and how often each of its pairs is wanted.
    """
    piece, weight = numbered
    lines = [read_text(text / f"{piece:05d}" / f"text.{lang}") for lang in config.languages]
    pairs = token_ids(lines)
    short = _within(config.max_tokens_per_side, pairs)
    kept = short.take(pa.array(_drawn(len(short), weight, [config.seed, 4, piece])))
    shard = np.random.default_rng([config.seed, 2, piece]).integers(shards, size=len(kept))
    in_order = kept.take(pa.array(np.argsort(shard, kind="stable")))
    counts = np.bincount(shard, minlength=shards)
    begins = np.cumsum(counts) - counts
    batches = (in_order.slice(*span) for span in zip(begins, counts, strict=True))
    write_shard(folder / "pairs.arrow", *batches)
    return {"too_long": len(pairs) - len(short), **_sizes(kept)}


def _drawn(pairs: int, weight: float, seed: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Which pairs a weight takes: all as often as it is whole, then a share drawn at random."""
    whole, share = divmod(weight, 1)
    once_more = np.random.default_rng(seed).permutation(pairs) < round(share * pairs)
    return np.repeat(np.arange(pairs), int(whole) + once_more)


def _in_an_epoch(
    corpus: int, pieces: Sequence[dict[str, Any]], encoded: Sequence[dict[str, Any]]
) -> dict[str, int]:
    """Pairs over the token limit, and the pairs and tokens of a corpus in the shards."""
    own = [made for piece, made in zip(pieces, encoded, strict=True) if piece["corpus"] == corpus]
    return {key: sum(piece[key] for piece in own) for key in ("too_long", *SIZES)}


def _gather(
    config: DataConfig, encoded: Path, pieces: int, shard: int, folder: Path
) -> dict[str, Any]:
    """One shard: its pairs of all pieces, shuffled."""
    files = (pa.OSFile(str(encoded / f"{piece:05d}" / "pairs.arrow")) for piece in range(pieces))
    pairs = pa.concat_batches([pa.ipc.open_file(file).get_batch(shard) for file in files])
    order = np.random.default_rng([config.seed, 3, shard]).permutation(len(pairs))
    path = folder / "shard.arrow"
    write_shard(path, pairs.take(pa.array(order)))
    return _counts(pairs, path)


def _encode_in_order(
    config: DataConfig, text: Path, split: str, token_ids: TokenIdsOf
) -> pa.RecordBatch:
    lines = [read_text(text / f"{split}.{lang}") for lang in config.languages]
    pairs = token_ids(lines)
    limit = config.max_tokens_per_side
    columns = [
        pa.array([_cut(ids, limit) for ids in side.to_pylist()], side.type)
        for side in pairs.columns
    ]
    if too_long := len(pairs) - len(_within(limit, pairs)):
        log.info("shards: cut %d %s pairs at the token limit", too_long, split)
    return pa.record_batch(columns, pairs.schema)


def _within(limit: int, pairs: pa.RecordBatch) -> pa.RecordBatch:
    longest = pc.max_element_wise(*(pc.list_value_length(side) for side in pairs.columns))
    return pairs.filter(pc.less_equal(longest, limit))


def _cut(ids: list[int], limit: int) -> list[int]:
    return ids if len(ids) <= limit else [*ids[: limit - 1], EOS_IDX]


def _token_ids(
    models: Path, vocab_sizes: Sequence[int], sides: Sequence[Sequence[str]]
) -> pa.RecordBatch:
    """Source and target lines as the columns of a shard."""
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


def _sizes(pairs: pa.RecordBatch) -> dict[str, int]:
    sizes = (len(pairs), *(len(pairs.column(side).flatten()) for side in ("source", "target")))
    return dict(zip(SIZES, sizes, strict=True))


def _counts(pairs: pa.RecordBatch, path: Path) -> dict[str, Any]:
    return {**_sizes(pairs), "sha256": sha256_of(path)}


def _total(shards: list[dict[str, Any]], split: str) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards if shard["split"] == split) for key in SIZES}
