"""Shards: Arrow IPC files of token ids, memory-mapped, readable by any Arrow tool.

They have the columns `source` and `target`, both `list<uint16>` (`uint32` for a vocabulary over
65,536): token ids that end with EOS, without BOS or padding. Each file is one record batch.
`manifest.json` beside them says what they hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from data_prep.files import DataError, first_line, sha256_of
from data_prep.stage import Record, read_manifest
from data_prep.vocabulary import Lost, VocabularyInfo, vocabulary_digest, vocabulary_files

TokenIds = NDArray[np.unsignedinteger[Any]]
Column = tuple[TokenIds, NDArray[np.int32]]
"""Token ids of all sequences `[tokens]`, and where each begins `[pairs + 1]`."""

REMEDY = "without that file, `./run.sh prepare` makes it again"


def write_shard(path: Path, *batches: pa.RecordBatch) -> None:
    """Write record batches of pairs, of which a shard has one. Equal pairs give equal bytes."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def id_type(vocab_sizes: Sequence[int]) -> np.dtype[Any]:
    """Return the narrowest type that holds all token ids."""
    return np.dtype(np.uint16 if max(vocab_sizes) <= 1 << 16 else np.uint32)


def open_shard(path: Path) -> pa.RecordBatch:
    """Return the pairs of a shard, memory-mapped.

    :raises OSError, pa.ArrowInvalid: the shard is missing or damaged.
    """
    with pa.memory_map(str(path)) as file:  # the map outlives it: open shards hold no descriptors
        return pa.ipc.open_file(file).get_batch(0)


# ── The manifest ────────────────────────────────────────────────────────────────────────────────


class Counts(Record):
    """The record counts pairs and tokens, EOS included."""

    pairs: int
    source_tokens: int
    target_tokens: int


class ShardInfo(Record):
    """The record says what a shard holds."""

    name: str
    """Name of the file."""

    split: str
    """The split it belongs to: train, valid or test."""

    pairs: int
    source_tokens: int
    target_tokens: int
    sha256: str


class CorpusInfo(Record):
    """The record says what cleaning left of a training corpus, and what of it is in the shards."""

    corpus: str
    """Its name."""

    read: int
    """Pairs before cleaning."""

    kept: int
    """Pairs after cleaning."""

    dropped: dict[str, int]
    """Pairs that each filter dropped."""

    weight: int | float  # `float` alone would turn the 1 of a default into 1.0: other bytes
    """How often an epoch has each of its pairs."""

    too_long: int
    """Pairs dropped for `data.max_tokens_per_side`."""

    pairs: int
    source_tokens: int
    target_tokens: int


class ShardsManifest(Record):
    """The record is `manifest.json` of the shards; its fields are in the order on disk."""

    languages: tuple[str, str]
    """Source and target language."""

    vocabulary: VocabularyInfo
    totals: dict[str, Counts]
    """Counts of each split."""

    corpora: tuple[CorpusInfo, ...]
    lost: dict[str, Lost]
    """Of the sides of validation and test set, by `SPLIT.LANG`: what the vocabulary cannot read of
    sources, and what no model with it can write of references."""

    files: dict[str, str]
    """The sha256 of every corpus file."""

    seed: int
    versions: dict[str, str]
    """Versions of the libraries that made the shards."""

    shards: tuple[ShardInfo, ...]

    def of_split(self, split: str) -> tuple[ShardInfo, ...]:
        """Return the shards of train, valid or test."""
        return tuple(shard for shard in self.shards if shard.split == split)


def read_shards_manifest(folder: Path) -> ShardsManifest:
    """Read what `folder` says about its shards.

    :raises DataError: the folder is not a finished data set, or its manifest lacks something.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: no prepared data here; run `./run.sh prepare` first")
    try:
        return ShardsManifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        wrong = " is missing" if first["type"] == "missing" else f": {first['msg']}"
        raise DataError(
            f"{folder / 'manifest.json'}: key `{key}`{wrong}; remove {folder} and run "
            "`./run.sh prepare`"
        ) from error


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


class ShardReader:
    """The reader maps the pairs of one split, over all its shards; `reader[i]` copies nothing.

    A shard is opened when it is first read, so opening a data set of thousands reads its manifest
    and vocabulary only.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = False) -> None:
        """Open the pairs of a split.

        :param verify: also compare each shard with its checksum (reads all of it).
        :raises DataError: the folder is not a finished data set, its vocabulary is not the one
            that the shards were made with, or a shard is damaged.
        """
        self.data = read_shards_manifest(folder)
        self._folder = folder
        self._check_vocabulary()
        self._shards = self.data.of_split(split)
        if verify:
            self._check_shards()
        self._columns: list[tuple[Column, Column] | None] = [None] * len(self._shards)
        self._first: list[int] = [0, *accumulate(shard.pairs for shard in self._shards)]

    def _check_vocabulary(self) -> None:
        names = " and ".join(path.name for path in vocabulary_files(self._folder))
        try:
            digest = vocabulary_digest(self._folder)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read the vocabulary; {REMEDY}") from error
        if digest != self.data.vocabulary.sha256:
            raise DataError(
                f"{self._folder}: {names} is not the vocabulary of these shards; {REMEDY}"
            )

    def _check_shards(self) -> None:
        paths = [self._folder / shard.name for shard in self._shards]
        try:
            with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
                digests = pool.map(sha256_of, paths)
                for path, shard, digest in zip(paths, self._shards, digests, strict=True):
                    if digest != shard.sha256:
                        raise DataError(f"{path}: checksum is not the manifest's; {REMEDY}")
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read the shard; {REMEDY}") from error

    def _opened(self, number: int) -> tuple[Column, Column]:
        """Return source and target of a shard, and open it the first time."""
        columns = self._columns[number]
        if columns is None:
            shard = self._shards[number]
            path = self._folder / shard.name
            try:
                pairs = open_shard(path)
            except (OSError, pa.ArrowInvalid) as error:
                reason = first_line(error)
                raise DataError(f"{path}: damaged or missing shard: {reason}; {REMEDY}") from error
            if len(pairs) != shard.pairs:
                raise DataError(
                    f"{path}: {len(pairs)} pairs, the manifest says {shard.pairs}; {REMEDY}"
                )
            source, target = (
                (side.values.to_numpy(), side.offsets.to_numpy()) for side in pairs.columns
            )
            self._columns[number] = columns = source, target
        return columns

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> tuple[TokenIds, TokenIds]:
        """Return source and target token ids of a pair, each `[length]` and ending with EOS.

        :raises IndexError: there is no such pair.
        :raises DataError: its shard is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        row = index - self._first[shard]
        (source, source_at), (target, target_at) = self._opened(shard)
        return (
            source[source_at[row] : source_at[row + 1]],
            target[target_at[row] : target_at[row + 1]],
        )

    def lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return source and target lengths of all pairs in tokens, each `[pairs]`.

        :raises DataError: a shard is missing or damaged.
        """
        lengths = np.empty((2, len(self)), dtype=np.int32)
        for number, begin in enumerate(self._first[:-1]):
            for side, (_, offsets) in zip(lengths, self._opened(number), strict=True):
                side[begin : begin + len(offsets) - 1] = np.diff(offsets)
        return lengths[0], lengths[1]
