"""Measure what is between shards and the model: opening them, the batch plan, collation.

The batch plan is for as many pairs as WMT14 De→En has; their lengths are those of real ones,
repeated. The program needs prepared shards:

    ./run.sh prepare --config recipes/multi30k_de_en.yaml --run_dir runs/m30k
    python -m benchmarks.feed --run_dir runs/m30k [--rounds 5]

With `--parts sharing slow` it measures instead what large data ask for: ranks that share one plan
of made lengths, and a feed from a file system that is slow to answer.
"""

from __future__ import annotations

import resource
import shutil
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rounds import create_parser, print_table, progress, seconds_of, spread
from data_prep.arrow import open_rows, write_rows
from data_prep.batch_plan import BatchPlan, map_lengths
from data_prep.files import read_json, write_json
from data_prep.shards import ShardReader, TokenIds, read_shards_manifest
from data_prep.text import vocabulary_files
from pipeline.command_line import DEFAULT_RECIPE
from pipeline.recipe_file import load_recipe
from pipeline.training.feed import feed
from pipeline.translation.batches import collate
from pipeline.translation.task import TranslationTask

Row = tuple[str, ...]

PAIRS_A_SHARD = 16
MAX_TOKENS, MICRO_BATCH_TOKENS = 32768, 4096


def many_shards(shards: Path, number: int, folder: Path) -> None:
    """Write a data set of `number` small shards, cut from the first of `shards`."""
    for path in vocabulary_files(shards):
        shutil.copyfile(path, folder / path.name)
    first = read_shards_manifest(shards).of_split("train")[0]
    pairs = open_rows(shards / first.name)
    cut = [
        first.model_copy(update={"name": f"train-{i:05d}.arrow", "pairs": PAIRS_A_SHARD})
        for i in range(number)
    ]
    for i, shard in enumerate(cut):
        begin = i * PAIRS_A_SHARD % (len(pairs) - PAIRS_A_SHARD)
        write_rows(folder / shard.name, pairs.slice(begin, PAIRS_A_SHARD))
    manifest = {**read_json(shards / "manifest.json"), "shards": [s.model_dump() for s in cut]}
    write_json(folder / "manifest.json", manifest)


def opening(shards: Path, number: int, rounds: int) -> list[Row]:
    """Time how long it takes to open `number` shards, and to read the lengths of their pairs."""
    with TemporaryDirectory() as folder:
        many_shards(shards, number, Path(folder))
        opened, read = [], []
        for _ in range(rounds):
            opened.append(seconds_of(lambda: ShardReader(Path(folder), "train")))
            reader = ShardReader(Path(folder), "train")
            read.append(seconds_of(reader.lengths))
    return [
        (f"opening {number:,} shards, s", spread(opened)),
        ("the lengths of all their pairs, s", spread(read)),
    ]


def plan_once(shards: Path, pairs: int, cache: Path) -> tuple[float, float]:
    """Return the seconds until the first step's batch is known, and the peak in MB with lengths."""
    lengths = np.stack(ShardReader(shards, "train").lengths())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lengths = np.tile(lengths, -(-pairs // lengths.shape[1]))[:, :pairs]
    started = time.perf_counter()
    BatchPlan(
        *lengths,
        max_tokens=MAX_TOKENS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        seed=1,
        cache=(cache, str(pairs)),
    )[0]
    seconds = time.perf_counter() - started
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def planning(shards: Path, pairs: int, rounds: int) -> list[Row]:
    """Time the batch plan of so many pairs, when it is made and when it is in the cache."""
    made: list[tuple[float, float]] = []
    cached: list[tuple[float, float]] = []
    for _ in range(rounds):
        with TemporaryDirectory() as cache:
            for results in (made, cached):
                # It runs in a process of its own, so that its memory can be told apart.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    results.append(pool.submit(plan_once, shards, pairs, Path(cache)).result())
    rows: list[Row] = []
    for title, results in (("made", made), ("from the cache", cached)):
        seconds, megabytes = zip(*results, strict=True)
        rows.append((f"batch plan of {pairs:,} pairs, {title}, s", spread(seconds)))
        rows.append((f"batch plan of {pairs:,} pairs, {title}, MB", spread(megabytes)))
    return rows


def collation(shards: Path, steps: int, rounds: int) -> list[Row]:
    """Time the collation of the first micro-batches of an epoch, and count their padding."""
    reader = ShardReader(shards, "train")
    lengths = np.stack(reader.lengths())
    plan = BatchPlan(*lengths, max_tokens=MICRO_BATCH_TOKENS, micro_batch_tokens=None, seed=1)
    micro_batches = [
        plan[step].micro_batches[0] for step in range(min(steps, plan.steps_per_epoch))
    ]
    tokens = int(lengths[:, np.concatenate(micro_batches)].sum())

    def run() -> None:
        for pairs in micro_batches:
            collate(reader, pairs, torch.device("cpu"))

    run()  # reads the shards from the disk
    rates = [tokens / seconds_of(run) for _ in range(rounds)]
    return [
        (
            f"padding at {MICRO_BATCH_TOKENS:,} tokens a micro-batch, %",
            f"{100 * plan.padding_share():.2f}",
        ),
        ("collation by one process, source and target tokens/s", spread(rates, 0)),
    ]


class RankMemory(NamedTuple):
    """What a rank's plan takes, and how long the rank waits for it."""

    first: float
    """Seconds until the first batch of an epoch is known."""

    next_epoch: float
    """The same for the epoch that follows."""

    peak: float
    """MB of memory at the most, shared files included."""

    own: float
    """MB of memory that the rank alone holds afterwards."""


def plan_of_a_rank(folder: Path, pairs: int, shared: bool) -> RankMemory:
    """Plan for made lengths as a rank does."""
    before = memory_of_this_process()
    lengths = np.load(folder / "lengths.npy", mmap_mode="r")
    if not shared:
        lengths = np.array(lengths, dtype=np.int32)
    started = time.perf_counter()
    plan = BatchPlan(
        lengths[:, 0],
        lengths[:, 1],
        max_tokens=MAX_TOKENS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        seed=1,
        cache=(folder, str(pairs)) if shared else None,
    )
    seconds = []
    for step in (0, plan.steps_per_epoch):
        plan[step]
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    peak, own = (now - then for now, then in zip(memory_of_this_process(), before, strict=True))
    first, following = seconds
    return RankMemory(first, following, peak, own)


def memory_of_this_process() -> tuple[float, float]:
    """Return the MB it had at the most, mapped files included, and those it has without them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    peak, own = (int(status[key].split()[0]) * 1024 / 1e6 for key in ("VmHWM", "RssAnon"))
    return peak, own


def sharing(pairs: int, ranks: int, shared: bool, folder: Path) -> Row:
    """Plan on so many ranks of one machine, for sentences of 1 to 256 tokens."""
    generator = np.random.default_rng(1)
    # Newswire: half of the sentences have fewer than 25 tokens.
    lengths = np.minimum(1 + generator.lognormal(3.2, 0.6, (pairs, 2)), 256).astype(np.uint16)
    np.save(folder / "lengths.npy", lengths)
    del lengths
    context = get_context("spawn")
    with ProcessPoolExecutor(ranks, mp_context=context, initializer=_wait_for_all,
                             initargs=(context.Barrier(ranks),)) as pool:  # fmt: skip
        work = [pool.submit(plan_of_a_rank, folder, pairs, shared) for _ in range(ranks)]
        found = [each.result() for each in work]
    columns = ([getattr(each, field) for each in found] for field in RankMemory._fields)
    first, following, peak, own = columns
    return (
        f"{ranks} rank(s), {'one plan for all' if shared else 'a plan each'}",
        f"{max(first):.1f}",
        f"{max(following):.1f}",
        f"{max(peak):,.0f}",
        f"{sum(peak):,.0f}",
        f"{max(own):,.0f}",
    )


def _wait_for_all(barrier: Barrier) -> None:
    barrier.wait()


class SlowReader(ShardReader):
    """A reader of shards on a file system that takes its time for each pair."""

    seconds = 0.005

    def read(self, pairs: NDArray[np.integer[Any]]) -> list[tuple[TokenIds, TokenIds]]:
        """Read, and wait as long as the reads would take one after the other."""
        time.sleep(self.seconds * len(pairs))
        return super().read(pairs)


def slow_feed(shards: Path, read_ahead_steps: int, steps: int) -> Row:
    """Time how fast shares come from a slow file system."""
    recipe = load_recipe(
        DEFAULT_RECIPE,
        [
            ("run_dir", str(shards.parent)),
            ("training.max_tokens", str(MICRO_BATCH_TOKENS)),
        ],
    )
    task = TranslationTask(recipe)
    task.__dict__["pairs"] = SlowReader(shards, "train")  # a cached property
    with TemporaryDirectory() as folder:
        *lengths, _ = map_lengths(task.pairs, Path(folder))
        task.__dict__["plan"] = BatchPlan(
            *lengths,
            max_tokens=MICRO_BATCH_TOKENS,
            micro_batch_tokens=None,
            seed=1,
        )
    shares = feed(
        task, torch.device("cpu"),
        rank=0, world_size=1, first_step=0, read_ahead_steps=read_ahead_steps,
    )  # fmt: skip
    next(shares)
    started = time.perf_counter()
    units = sum(next(shares).units for _ in range(steps))
    return str(read_ahead_steps), f"{units / (time.perf_counter() - started):,.0f}"


def at_scale(arguments: Namespace) -> None:
    """Measure what large data ask for."""
    if "sharing" in arguments.parts:
        rows = []
        for ranks in arguments.ranks:
            for shared in (True, False):
                with TemporaryDirectory() as folder:
                    rows.append(sharing(arguments.pairs, ranks, shared, Path(folder)))
                progress(f"sharing: {rows[-1]}")
        caption = f"Batch plan of {arguments.pairs:,} pairs of made lengths on one machine"
        columns = [
            "", "first batch, s", "next epoch, s", "peak of a rank, MB", "peaks of all, MB",
            "a rank's own afterwards, MB",
        ]  # fmt: skip
        print_table(caption, columns, rows)
    if "slow" in arguments.parts:
        shards = arguments.run_dir / "shards"
        rows = [slow_feed(shards, ahead, arguments.steps) for ahead in arguments.ahead]
        caption = (
            f"Feed of a rank, {MICRO_BATCH_TOKENS:,} tokens a step, from a file system that takes "
            f"{1000 * SlowReader.seconds:.0f} ms for a pair"
        )
        print_table(caption, ["read_ahead_steps", "source and target tokens/s"], rows)


def main() -> None:
    """Measure all three, and print a table."""
    parser = create_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=["sharing", "slow"], default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="that share a plan")
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 8, 32], help="steps to read")
    parser.add_argument("--shards", type=int, default=2000, help="to open")
    parser.add_argument("--pairs", type=int, default=4_500_000, help="to plan for")
    parser.add_argument("--steps", type=int, default=200, help="micro-batches to collate")
    arguments = parser.parse_args()
    if arguments.parts:
        at_scale(arguments)
        return
    shards, rounds = arguments.run_dir / "shards", arguments.rounds
    rows = []
    for part, size in (
        (opening, arguments.shards),
        (planning, arguments.pairs),
        (collation, arguments.steps),
    ):
        rows += part(shards, size, rounds)
        progress(f"{part.__name__}: done")
    caption = f"Shards of {len(ShardReader(shards, 'train')):,} real pairs; rounds: {rounds}"
    print_table(caption, ["what", "median (min–max)"], rows)


if __name__ == "__main__":
    main()
