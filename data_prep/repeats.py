"""Finding repeats over all corpora, in memory that grows by one byte a pair.

The hashes of the pairs of each piece are written to a file, sorted. A task then takes one range of
hash values from the files of all pieces: it sees every pair whose hash lies in the range, and so
knows which of them are repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import hash_text
from data_prep.files import save_array
from data_prep.filters import Duplicates, Filter, RepeatedSide
from data_prep.pieces import map_pieces

PAIRS_PER_TASK = 500_000  # a task needs about 40 bytes for each


class Round(NamedTuple):
    """A round looks at all pairs, and drops all but the first `most` of those with the same key."""

    filter: str
    key: str  # pair, source or target
    most: int


def rounds_of(filters: Sequence[Filter]) -> Iterator[Round]:
    """Yield the rounds that the filters over all corpora take, in order."""
    for each in filters:
        if isinstance(each, Duplicates):
            yield Round(each.filter, "pair", 1)
        elif isinstance(each, RepeatedSide):
            yield Round(each.filter, "source", each.max)
            yield Round(each.filter, "target", each.max)


def write_keys(folder: Path, pairs: Sequence[tuple[str, str]], rounds: Sequence[Round]) -> None:
    """Write `KEY.npy`, sorted hashes (uint64), and `KEY-rows.npy`, whose they are (uint32)."""
    for key in {each.key for each in rounds}:
        if key == "pair":
            hashes = (hash_text(f"{source}\n{target}") for source, target in pairs)
        else:
            hashes = (hash_text(pair[key == "target"]) for pair in pairs)
        values = np.fromiter(hashes, np.uint64, len(pairs))
        order = np.argsort(values, kind="stable")
        save_array(folder / f"{key}.npy", values[order])
        save_array(folder / f"{key}-rows.npy", order.astype(np.uint32))


def find_repeats(
    executor: Executor,
    rounds: Sequence[Round],
    pieces: Path,
    counts: Sequence[int],
    scratch: Path,
) -> Path:
    """Find the pairs that each round drops.

    :param pieces: folder with the keys of every piece, see `write_keys`.
    :param counts: pairs of each piece.
    :returns: folder with a file `NNNNN.npy` for each piece, uint8 `[pairs]`: the round, from 1,
        that drops a pair; 0 for one that stays.
    """
    scratch.mkdir(exist_ok=True)
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    fate = np.zeros(first[-1], np.uint8)
    tasks = list(range(-(-len(fate) // PAIRS_PER_TASK)))
    for number, each in enumerate(rounds, start=1):
        save_array(scratch / f"before-{number}.npy", fate)
        work = bind(_repeats, pieces, first, scratch / f"before-{number}.npy", each, len(tasks))
        found = scratch / f"repeats-{number}"
        map_pieces(executor, work, tasks, found)
        for task in tasks:
            fate[np.load(found / f"{task:05d}" / "rows.npy")] = number
    for piece, fate_of_piece in enumerate(np.split(fate, first[1:-1])):
        save_array(scratch / f"{piece:05d}.npy", fate_of_piece)
    return scratch


def _repeats(
    pieces: Path,
    first: NDArray[np.int64],
    fate_before: Path,
    each: Round,
    tasks: int,
    task: int,
    folder: Path,
) -> dict[str, Any]:
    """Write `rows.npy`: which pairs, counted over all pieces, repeat within a range of hashes."""
    bounds = np.array([((task + end) << 64) // tasks - end for end in (0, 1)], np.uint64)
    fate = np.load(fate_before, mmap_mode="r")
    hashes, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for piece in np.flatnonzero(np.diff(first)):
        values, order = (
            np.load(pieces / f"{piece:05d}" / f"{each.key}{kind}.npy", mmap_mode="r")
            for kind in ("", "-rows")
        )
        begin = np.searchsorted(values, bounds[0])
        end = np.searchsorted(values, bounds[1], side="right")
        here = order[begin:end] + first[piece]
        alive = fate[here] == 0
        hashes.append(values[begin:end][alive])
        rows.append(here[alive])
    value, row = np.concatenate(hashes), np.concatenate(rows)
    by_value = np.argsort(value, kind="stable")  # of equal values, the first row stays first
    value, row = value[by_value], row[by_value]
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]])[: len(value)])
    lengths = np.diff(np.append(starts, len(value)))
    nth = np.arange(len(value)) - np.repeat(starts, lengths)
    save_array(folder / "rows.npy", np.sort(row[nth >= each.most]))
    return {}
