"""Shards: Arrow IPC files of token ids, memory-mapped, readable by any Arrow tool.

Columns `source` and `target`, both `list<uint16>` (`uint32` for a vocabulary over 65,536): token
ids that end with EOS, without BOS or padding. One record batch a file.
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

from data_prep.files import DataError, sha256_of
from data_prep.stage import Manifest, read_manifest
from data_prep.vocabulary import vocabulary_digest, vocabulary_files

TokenIds = NDArray[np.unsignedinteger[Any]]
Column = tuple[TokenIds, NDArray[np.int32]]
"""Token ids of all sequences `[tokens]`, and where each begins `[pairs + 1]`."""

REMEDY = "without that file, `./run.sh prepare` makes it again"


def write_shard(path: Path, *batches: pa.RecordBatch) -> None:
    """Write record batches of pairs (a shard is one); the same pairs give the same bytes."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def id_type(vocab_sizes: Sequence[int]) -> np.dtype[Any]:
    """The narrowest type of token ids."""
    return np.dtype(np.uint16 if max(vocab_sizes) <= 1 << 16 else np.uint32)


def open_shard(path: Path) -> pa.RecordBatch:
    """The pairs of a shard, memory-mapped.

    :raises OSError, pa.ArrowInvalid: missing or damaged.
    """
    with pa.memory_map(str(path)) as file:  # the map outlives the file: no descriptor a shard
        return pa.ipc.open_file(file).get_batch(0)


class ShardReader:
    """The pairs of one split over all its shards; `reader[i]` copies nothing.

    A shard is opened when it is first read: opening thousands of them reads the manifest only.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = False) -> None:
        """
        :param verify: also compare each shard with its checksum (reads all of it).
        :raises DataError: the folder is not a finished data set, its vocabulary is not the one
            that the shards were made with, or a shard is damaged.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder}: no prepared data here; run `./run.sh prepare` first")
        self.manifest: Manifest = manifest
        self._folder = folder
        self._check_vocabulary()
        self._shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        if verify:
            self._verify()
        self._columns: list[tuple[Column, Column] | None] = [None] * len(self._shards)
        self._first: list[int] = [0, *accumulate(shard["pairs"] for shard in self._shards)]

    def _check_vocabulary(self) -> None:
        names = " and ".join(path.name for path in vocabulary_files(self._folder))
        try:
            digest = vocabulary_digest(self._folder)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read the vocabulary; {REMEDY}") from error
        if digest != self.manifest["vocabulary"]["sha256"]:
            raise DataError(
                f"{self._folder}: {names} is not the vocabulary of these shards; {REMEDY}"
            )

    def _verify(self) -> None:
        paths = [self._folder / shard["name"] for shard in self._shards]
        try:
            with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
                digests = pool.map(sha256_of, paths)
                for path, shard, digest in zip(paths, self._shards, digests, strict=True):
                    if digest != shard["sha256"]:
                        raise DataError(f"{path}: checksum is not the manifest's; {REMEDY}")
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read the shard; {REMEDY}") from error

    def _opened(self, number: int) -> tuple[Column, Column]:
        """Source and target of a shard."""
        columns = self._columns[number]
        if columns is None:
            shard = self._shards[number]
            path = self._folder / shard["name"]
            try:
                pairs = open_shard(path)
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{path}: damaged or missing shard: {error}; {REMEDY}") from error
            if len(pairs) != shard["pairs"]:
                raise DataError(
                    f"{path}: {len(pairs)} pairs, the manifest says {shard['pairs']}; {REMEDY}"
                )
            source, target = (
                (side.values.to_numpy(), side.offsets.to_numpy()) for side in pairs.columns
            )
            self._columns[number] = columns = source, target
        return columns

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> tuple[TokenIds, TokenIds]:
        """Source and target token ids of pair `index`, each `[length]` and ending with EOS.

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
        """Source and target lengths of all pairs, each `[pairs]`.

        :raises DataError: a shard is missing or damaged.
        """
        lengths = np.empty((2, len(self)), dtype=np.int32)
        for number, begin in enumerate(self._first[:-1]):
            for side, (_, offsets) in zip(lengths, self._opened(number), strict=True):
                side[begin : begin + len(offsets) - 1] = np.diff(offsets)
        return lengths[0], lengths[1]
