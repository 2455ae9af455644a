"""Shards: Arrow IPC files of token ids, memory-mapped, readable by any Arrow tool.

They have the columns `source` and `target`, both `list<uint16>` (`uint32` for a vocabulary over
65,536): token ids that end with EOS, without BOS or padding. Each file is one record batch.
`manifest.json` beside them says what they hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.arrow import REMEDY, check_shards, open_whole, read_manifest_of
from data_prep.files import DataError, write_array_head
from data_prep.stage import Record
from data_prep.text import vocabulary_files
from data_prep.vocabulary import Lost, Unknown, VocabularyInfo, vocabulary_digest

TokenIds = NDArray[np.unsignedinteger[Any]]
Column = tuple[TokenIds, NDArray[np.int32]]
"""Token ids of all sequences `[tokens]`, and where each begins `[pairs + 1]`."""


def id_type(vocab_sizes: Sequence[int]) -> np.dtype[Any]:
    """Return the narrowest type that holds all token ids."""
    return np.dtype(np.uint16 if max(vocab_sizes) <= 1 << 16 else np.uint32)


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

    unknown: Mapping[str, Unknown] = {}
    """By language, what of the pairs after cleaning is unknown to the vocabulary."""


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
    return read_manifest_of(folder, ShardsManifest)


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


class OpenShard(NamedTuple):
    """A shard that was opened, memory-mapped."""

    pairs: pa.RecordBatch
    source: Column
    target: Column


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
        self.shards = self.data.of_split(split)
        if verify:
            check_shards(folder, self.shards)
        self._open: list[OpenShard | None] = [None] * len(self.shards)
        self._first: list[int] = [0, *accumulate(shard.pairs for shard in self.shards)]

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

    def _opened(self, number: int) -> OpenShard:
        """Return a shard, and open it the first time."""
        opened = self._open[number]
        if opened is None:
            shard = self.shards[number]
            pairs = open_whole(self._folder / shard.name, shard.pairs, "pairs")
            source, target = (
                (side.values.to_numpy(), side.offsets.to_numpy()) for side in pairs.columns
            )
            self._open[number] = opened = OpenShard(pairs, source, target)
        return opened

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
        _, (source, source_at), (target, target_at) = self._opened(shard)
        return (
            source[source_at[row] : source_at[row + 1]],
            target[target_at[row] : target_at[row + 1]],
        )

    def read(self, pairs: NDArray[np.integer[Any]]) -> list[tuple[TokenIds, TokenIds]]:
        """Return source and target token ids of many pairs, copied, in the order of `pairs`.

        Arrow copies them without Python's lock: when the disk lets one thread wait, others go on.

        :raises DataError: a shard is missing or damaged.
        """
        shards = np.searchsorted(self._first, pairs, side="right") - 1
        token_ids: dict[int, tuple[TokenIds, TokenIds]] = {}
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            rows = pa.array(pairs[places] - self._first[shard])
            sides = (side.take(rows) for side in self._opened(shard).pairs.columns)
            source, target = (
                np.split(side.values.to_numpy(), side.offsets.to_numpy()[1:-1]) for side in sides
            )
            token_ids.update(zip(places.tolist(), zip(source, target, strict=True), strict=True))
        return [token_ids[place] for place in range(len(pairs))]

    def lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return source and target lengths of all pairs in tokens, each `[pairs]`.

        :raises DataError: a shard is missing or damaged.
        """
        lengths = np.empty((len(self), 2), dtype=np.int32)
        for begin, shard in zip(self._first, self._lengths_by_shard(), strict=False):
            lengths[begin : begin + len(shard)] = shard
        return lengths[:, 0], lengths[:, 1]

    def save_lengths(self, path: Path) -> None:
        """Write the lengths as a NumPy array `[pairs, 2]`, holding those of one shard in memory.

        :raises DataError: a shard is missing or damaged.
        """
        longest = max((int(shard.max(initial=0)) for shard in self._lengths_by_shard()), default=0)
        dtype = np.dtype(np.min_scalar_type(longest))
        with path.open("wb") as file:
            write_array_head(file, dtype, (len(self), 2))
            for shard in self._lengths_by_shard():
                file.write(shard.astype(dtype).tobytes())

    def _lengths_by_shard(self) -> Iterator[NDArray[np.int32]]:
        """Yield source and target lengths of each shard's pairs, `[pairs, 2]`."""
        for number in range(len(self.shards)):
            _, source, target = self._opened(number)
            yield np.stack([np.diff(source[1]), np.diff(target[1])], axis=1)
