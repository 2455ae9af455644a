"""The batch plan: which pairs each step of training sees.

The plan is a pure function of (lengths, seed, epoch, token budgets). Micro-batches of pairs of
similar length are shuffled and grouped into global batches; how many ranks and accumulation steps
share a global batch does not change what is in it. So a position in training is one number: the
step.

Processes that are given the same folder for it share one plan: the first that needs a file makes
it, all map it, and none but the maker reads the lengths.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.arrow import open_rows, write_rows
from data_prep.files import digest_of, fsync, locked, read_json, write_json
from data_prep.fingerprints import fingerprint_of
from data_prep.shards import ShardReader

BATCH_PLAN_VERSION = 3  # raise it when the same shards and seed would give other batches
FILES_VERSION = 2  # raise it when the files of the same plan would look otherwise

PAIRS_AT_ONCE = 1 << 22  # pairs whose lengths are worked on together, which bounds memory

Indices = NDArray[np.signedinteger[Any]]
"""Indices of pairs, `[pairs]`."""

Lengths = NDArray[np.integer[Any]]
"""Tokens of each pair on one side, EOS included, `[pairs]`."""

Result = TypeVar("Result")

# What reading a file that is missing or damaged raises.
DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile)


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch is what one optimizer step sees."""

    micro_batches: list[Indices]
    """Indices of the pairs of each micro-batch, longest pair last."""

    source_tokens: int
    """Source tokens in all micro-batches, EOS included."""

    target_tokens: int
    """Target tokens in all micro-batches, EOS included: what the summed loss is divided by."""

    def share(self, rank: int, world_size: int) -> list[Indices]:
        """Return the micro-batches of one of `world_size` ranks, equally many for each.

        Number n of a rank is number `rank + n * world_size` of the global batch. Where there is
        none any more, it is empty.
        """
        own = self.micro_batches[rank::world_size]
        missing = passes(len(self.micro_batches), world_size) - len(own)
        return [*own, *(np.empty(0, dtype=np.int32) for _ in range(missing))]


def passes(micro_batches: int, world_size: int) -> int:
    """Return how many micro-batches each rank works on in a step, empty ones included."""
    return -(-micro_batches // world_size)


class Outline(NamedTuple):
    """The outline is what all epochs of a plan have in common."""

    cuts: Indices
    """Where micro-batches begin among the pairs in the order of their lengths, int64
    `[micro-batches]`."""

    largest: Indices
    """The pairs of a micro-batch that has most positions, padding included."""

    padding_share: float
    """The share of padding among the positions of an epoch."""


class Epoch(NamedTuple):
    """The micro-batches of an epoch in their order."""

    pairs: Indices
    """The pairs of all micro-batches, one micro-batch's after the other's."""

    begins: Indices
    """Where each begins in `pairs`, and the end: `[micro-batches + 1]`."""

    source_tokens: NDArray[np.int64]
    """Of each micro-batch, EOS included, `[micro-batches]`."""

    target_tokens: NDArray[np.int64]


class BatchPlan:
    """The plan gives the global batch of every step. Any number of threads may ask it."""

    def __init__(
        self,
        source_lengths: Lengths,
        target_lengths: Lengths,
        *,
        max_tokens: int,
        micro_batch_tokens: int | None,
        seed: int,
        cache: tuple[Path, str] | None = None,
    ) -> None:
        """Plan batches of pairs within a budget of tokens.

        :param source_lengths, target_lengths: tokens of each pair, EOS included, `[pairs]`. They
            are not copied.
        :param max_tokens: budget of a global batch: pairs × longest side, padding included, summed
            over its micro-batches.
        :param micro_batch_tokens: the same for one micro-batch; None: one micro-batch a step.
        :param cache: folder for the files of the plan, which ranks and later runs share; and a
            digest of what has the lengths.
        """
        self._sides = (source_lengths, target_lengths)
        self.max_tokens = max_tokens
        self._micro_batch_tokens = micro_batch_tokens or max_tokens
        self.micro_batches_per_step = max_tokens // self._micro_batch_tokens
        self._seed = seed
        self._cache = cache
        self._outline = self._shared(["outline.npz"], self._make_outline, _save_outline, _outline)
        self.micro_batches_per_epoch = len(self._outline.cuts)
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // self.micro_batches_per_step)
        self._epochs: dict[int, Epoch] = {}
        self._lock = Lock()

    def micro_batches_per_rank(self, world_size: int) -> int:
        """Return how many micro-batches, empty ones included, each rank gets in a step."""
        return passes(self.micro_batches_per_step, world_size)

    def __getitem__(self, step: int) -> GlobalBatch:
        """Return the batch of step 0, 1, …; steps go on into the epochs that follow."""
        number, index = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        begin = index * self.micro_batches_per_step
        # The last global batch of an epoch is completed with micro-batches from its start.
        numbers = np.arange(begin, begin + self.micro_batches_per_step)
        numbers %= self.micro_batches_per_epoch
        return GlobalBatch(
            [epoch.pairs[epoch.begins[i] : epoch.begins[i + 1]] for i in numbers],
            int(epoch.source_tokens[numbers].sum()),
            int(epoch.target_tokens[numbers].sum()),
        )

    def _epoch(self, number: int) -> Epoch:
        """Return an epoch; the last two are kept, for who reads ahead needs both."""
        with self._lock:
            if number not in self._epochs:
                # The epoch before stays: a slower rank may be reading it.
                names = [f"epoch-{number}.arrow", f"epoch-{number - 1}.arrow", "outline.npz"]
                made = self._shared(
                    names, lambda: self._make_epoch(number), _save_epoch, _open_epoch
                )
                older = sorted(self._epochs)[-1:]
                self._epochs = {**{key: self._epochs[key] for key in older}, number: made}
            return self._epochs[number]

    def sorted_micro_batches(self) -> list[Indices]:
        """Return the micro-batches from the shortest pairs to the longest, each pair once."""
        return list(np.split(self._sorted(self._all_pairs()), self._outline.cuts[1:]))

    def largest_micro_batch(self) -> Indices:
        """Return the micro-batch with most positions, padding included."""
        return self._outline.largest

    def padding_share(self) -> float:
        """Return the share of padding among the source and target positions of an epoch."""
        return self._outline.padding_share

    # ── Making it ───────────────────────────────────────────────────────────────────────────────

    def _make_outline(self) -> Outline:
        cuts = _cut_points(np.cumsum(self._count_by_length()), self._micro_batch_tokens)
        order = self._sorted(self._all_pairs())
        pairs = np.diff(cuts, append=len(order))
        widths = sum(np.maximum.reduceat(side[order], cuts).astype(int) for side in self._sides)
        positions = pairs * widths
        largest = int(np.argmax(positions))
        tokens = sum(int(side.sum(dtype=np.int64)) for side in self._sides)
        return Outline(
            cuts,
            order[cuts[largest] :][: pairs[largest]].copy(),
            1 - float(tokens) / float(positions.sum()),
        )

    def _make_epoch(self, number: int) -> Epoch:
        generator = np.random.default_rng([self._seed, number])
        order = self._all_pairs()
        generator.shuffle(order)
        order = self._sorted(order)
        ends = np.append(self._outline.cuts, len(order)).astype(np.int32)
        shuffled = generator.permutation(self.micro_batches_per_epoch)
        micro_batches = pa.ListArray.from_arrays(ends, order).take(pa.array(shuffled))
        source, target = (
            np.add.reduceat(side[order], ends[:-1], dtype=np.int64)[shuffled]
            for side in self._sides
        )
        pairs, begins = micro_batches.values.to_numpy(), micro_batches.offsets.to_numpy()
        return Epoch(pairs, begins, source, target)

    def _all_pairs(self) -> NDArray[np.int32]:
        return np.arange(len(self._sides[0]), dtype=np.int32)

    def _longer(self, pairs: Indices | slice) -> Lengths:
        """Return the length of the longer side of some pairs."""
        source, target = self._sides
        return np.maximum(source[pairs], target[pairs])

    def _count_by_length(self) -> NDArray[np.int64]:
        """Return how many pairs have a longer side of 0, 1, … tokens."""
        counts: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        for part in _parts(len(self._sides[0])):
            more: NDArray[np.int64] = np.bincount(self._longer(part), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        return counts

    def _sorted(self, order: NDArray[np.int32]) -> NDArray[np.int32]:
        """Sort pairs by their longer side, shortest first.

        Pairs with an equally long longer side go from the longest targets to the longest sources,
        and back in the next length: neighbours are alike on both sides. Pairs of equal lengths
        stay in the order that they have.
        """
        source, target = self._sides
        counts = self._count_by_length()
        narrow = np.min_scalar_type(2 * len(counts))  # narrow keys are sorted by radix
        ends = np.cumsum(counts)
        free = ends - counts  # where the next pair of each length goes
        result = np.empty_like(order)
        for part in _parts(len(order)):
            pairs = order[part]
            longer = self._longer(pairs).astype(narrow)
            by_length = np.argsort(longer, kind="stable")
            here = np.bincount(longer, minlength=len(counts))
            first = np.cumsum(here) - here
            places = np.repeat(free - first, here) + np.arange(len(pairs))
            result[places] = pairs[by_length]
            free += here
        for length in np.flatnonzero(counts):
            equal = result[ends[length] - counts[length] : ends[length]]
            leaning = source[equal].astype(np.int32) - target[equal]
            key = length + (leaning if length % 2 else -leaning)
            equal[:] = equal[np.argsort(key.astype(narrow), kind="stable")]
        return result

    # ── Sharing it ──────────────────────────────────────────────────────────────────────────────

    def _shared(
        self,
        names: Sequence[str],
        make: Callable[[], Result],
        save: Callable[[Path, Result], None],
        read: Callable[[Path], Result],
    ) -> Result:
        """Return a part of the plan from its file in the cache, or as `make` makes it.

        :param names: of its file, and of others that stay when it is made; to these a digest is
            added of what the plan depends on.
        """
        if self._cache is None:
            return make()
        folder, lengths = self._cache
        inputs = [FILES_VERSION, BATCH_PLAN_VERSION, lengths]
        plan = digest_of([*inputs, self._seed, self._micro_batch_tokens])[:16]
        path, *others = (folder / name.replace(".", f"-{plan}.") for name in names)
        made: list[Result] = []

        def build(path: Path) -> None:
            made.append(make())
            save(path, made[0])

        try:
            result = built_once(path, build, read)
        except OSError:  # a full disk, perhaps: training can go on without a cache
            return made[0] if made else make()
        if made:
            for kind in ("epoch", "outline"):
                remove_others(folder, kind, [file.name for file in (path, *others)])
        return result


def map_lengths(reader: ShardReader, folder: Path) -> tuple[Lengths, Lengths, str]:
    """Return the lengths of all pairs, in a file that all processes map, and a digest of them.

    :param folder: gets the file.
    """
    digest = digest_of([shard.sha256 for shard in reader.shards])
    path = folder / f"lengths-{digest[:16]}.npy"
    remove_others(folder, "lengths", [path.name])

    def read(path: Path) -> NDArray[Any]:
        lengths: NDArray[Any] = np.load(path, mmap_mode="r")
        if lengths.shape != (len(reader), 2):
            raise ValueError(f"{path}: other pairs")
        return lengths

    try:
        lengths = built_once(path, reader.save_lengths, read)
    except OSError:  # a full disk, perhaps: training can go on with lengths of its own
        return (*reader.lengths(), digest)
    return lengths[:, 0], lengths[:, 1], digest


def remove_others(cache: Path, kind: str, kept: Sequence[str]) -> None:
    """Remove the files of a kind that are not among those to keep, and their fingerprints."""
    for file in cache.glob(f"{kind}-*"):
        if file.name not in kept:
            file.unlink(missing_ok=True)
            note_of(file).unlink(missing_ok=True)


def note_of(path: Path) -> Path:
    """Return the file with the fingerprint of another: an array on disk has no checksum of its
    own."""
    return path.with_name(f".{path.name}.json")


def built_once(path: Path, build: Callable[[Path], None], read: Callable[[Path], Result]) -> Result:
    """Return `read(path)`. The first process that wants the file builds it, the others wait.

    :param build: writes the file under the name that it is given.
    :raises OSError: the file cannot be written. What `build` raises is raised too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note = note_of(path)
    with locked(path.parent / ".lock"):
        with suppress(*DAMAGED):
            known = read_json(note)
            if fingerprint_of(path, known).sha256 == known.get("sha256"):
                return read(path)
        # A name for each machine: where the file system has no locks, two may be writing.
        partial = path.parent / f".{socket.gethostname()}.partial"
        try:
            build(partial)
            fsync(partial)
            partial.replace(path)
            write_json(note, fingerprint_of(path, {}).model_dump())
        finally:
            partial.unlink(missing_ok=True)
        fsync(path.parent)
        return read(path)


def _save_outline(path: Path, outline: Outline) -> None:
    with path.open("wb") as file:
        np.savez(file, **outline._asdict())


def _outline(path: Path) -> Outline:
    with np.load(path) as arrays:
        return Outline(arrays["cuts"], arrays["largest"], float(arrays["padding_share"]))


def _save_epoch(path: Path, epoch: Epoch) -> None:
    pairs = pa.ListArray.from_arrays(epoch.begins, epoch.pairs)
    columns = [pairs, pa.array(epoch.source_tokens), pa.array(epoch.target_tokens)]
    names = ["pairs", "source_tokens", "target_tokens"]
    write_rows(path, pa.record_batch(columns, names=names))


def _open_epoch(path: Path) -> Epoch:
    pairs, source, target = open_rows(path).columns
    return Epoch(
        pairs.values.to_numpy(), pairs.offsets.to_numpy(), source.to_numpy(), target.to_numpy()
    )


def _parts(pairs: int) -> Iterator[slice]:
    for begin in range(0, pairs, PAIRS_AT_ONCE):
        yield slice(begin, min(begin + PAIRS_AT_ONCE, pairs))


def _cut_points(ends: NDArray[np.int64], budget: int) -> Indices:
    """Return where micro-batches begin so that pairs × longest side stays within the budget.

    :param ends: how many pairs have a longer side of at most 0, 1, … tokens.
    """
    until = ends.tolist()
    cuts = []
    begin = length = 0
    while begin < until[-1]:
        cuts.append(begin)
        while until[length] <= begin:
            length += 1
        end, longest = begin + 1, length  # a pair over the budget is alone
        while longest < len(until) and begin + budget // longest > end:
            end = min(until[longest], begin + budget // longest)
            longest += 1
        begin = end
    return np.array(cuts, dtype=np.int64)
