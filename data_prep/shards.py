"""Shards: Arrow IPC files of token ids, memory-mapped, readable by any Arrow tool.

Columns `source` and `target`, both `list<uint16>` (`uint32` for a vocabulary over 65,536): token
ids that end with EOS, without BOS or padding. One record batch a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.stage import DataError, Manifest, read_manifest, sha256_of

TokenIds = NDArray[np.unsignedinteger[Any]]


def write_shard(
    path: Path, source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], vocab_size: int
) -> None:
    """Write one shard; the same ids give the same bytes."""
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    columns = [pa.array(side, type=pa.list_(ids)) for side in (source, target)]
    batch = pa.record_batch(columns, names=["source", "target"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


class ShardReader:
    """The pairs of one split over all its shards; `reader[i]` copies nothing."""

    def __init__(self, folder: Path, split: str, *, verify: bool = False) -> None:
        """
        :param verify: also compare each shard with its checksum (reads all of it).
        :raises DataError: the folder is not a finished data set, or a shard is damaged.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder}: no prepared data here; run `./run.sh prepare` first")
        self.manifest: Manifest = manifest
        self._values: list[tuple[TokenIds, TokenIds]] = []
        self._offsets: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        pairs = []
        for shard in manifest["shards"]:
            if shard["split"] != split:
                continue
            path = folder / shard["name"]
            source, target = self._open(path, shard, verify)
            self._values.append((source.values.to_numpy(), target.values.to_numpy()))
            self._offsets.append((source.offsets.to_numpy(), target.offsets.to_numpy()))
            pairs.append(len(source))
        self._first = np.concatenate([[0], np.cumsum(pairs, dtype=np.int64)])

    @staticmethod
    def _open(path: Path, shard: dict[str, Any], verify: bool) -> tuple[pa.Array, pa.Array]:
        try:
            if verify and sha256_of(path) != shard["sha256"]:
                raise DataError(f"{path}: checksum differs from the manifest's; prepare it again")
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batch = reader.get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: damaged or missing shard: {error}") from error
        if batch.num_rows != shard["pairs"]:
            raise DataError(f"{path}: {batch.num_rows} pairs, the manifest says {shard['pairs']}")
        return batch.column("source"), batch.column("target")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> tuple[TokenIds, TokenIds]:
        """Source and target token ids of pair `index`, each `[length]` and ending with EOS."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        row = index - int(self._first[shard])
        (source, target), (source_at, target_at) = self._values[shard], self._offsets[shard]
        return (
            source[source_at[row] : source_at[row + 1]],
            target[target_at[row] : target_at[row + 1]],
        )

    def lengths(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Source and target lengths of all pairs, each `[pairs]`."""
        sides = zip(*self._offsets, strict=True)
        source, target = (np.concatenate([np.diff(offsets) for offsets in side]) for side in sides)
        return source, target
