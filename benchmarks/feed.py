"""Measure what is between shards and the model: opening them, the batch plan, collation.

The batch plan is for as many pairs as WMT14 De→En has; their lengths are those of real ones,
repeated. The program needs prepared shards:

    ./run.sh prepare --config recipes/multi30k_de_en.yaml --run_dir runs/m30k
    python -m benchmarks.feed --run_dir runs/m30k [--rounds 5]
"""

from __future__ import annotations

import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.rounds import create_parser, print_table, progress, seconds_of, spread
from data_prep.batch_plan import BatchPlan
from data_prep.files import read_json, write_json
from data_prep.shards import ShardReader, open_shard, read_shards_manifest, write_shard
from data_prep.vocabulary import vocabulary_files
from pipeline.translation.batches import collate

Row = tuple[str, str]

PAIRS_A_SHARD = 16
MAX_TOKENS, MICRO_BATCH_TOKENS = 32768, 4096


def many_shards(shards: Path, number: int, folder: Path) -> None:
    """Write a data set of `number` small shards, cut from the first of `shards`."""
    for path in vocabulary_files(shards):
        shutil.copyfile(path, folder / path.name)
    first = read_shards_manifest(shards).of_split("train")[0]
    pairs = open_shard(shards / first.name)
    cut = [
        first.model_copy(update={"name": f"train-{i:05d}.arrow", "pairs": PAIRS_A_SHARD})
        for i in range(number)
    ]
    for i, shard in enumerate(cut):
        begin = i * PAIRS_A_SHARD % (len(pairs) - PAIRS_A_SHARD)
        write_shard(folder / shard.name, pairs.slice(begin, PAIRS_A_SHARD))
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
        cache=cache,
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
    rows = []
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


def main() -> None:
    """Measure all three, and print a table."""
    parser = create_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=2000, help="to open")
    parser.add_argument("--pairs", type=int, default=4_500_000, help="to plan for")
    parser.add_argument("--steps", type=int, default=200, help="micro-batches to collate")
    arguments = parser.parse_args()
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
