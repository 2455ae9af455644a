"""One batch plan for any number of ranks, and one file of it for all that share a folder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep import batch_plan
from data_prep.batch_plan import BatchPlan, GlobalBatch, map_lengths, passes
from data_prep.shards import ShardReader
from pipeline.translation_recipe import TranslationRecipe


@pytest.fixture
def reader(prepared: TranslationRecipe) -> ShardReader:
    return ShardReader(prepared.run_dir / "shards", "train")


def some_lengths(pairs: int = 5000) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(1, 60, size=(2, pairs)).astype(np.int32)


def plan_of(lengths: NDArray[np.integer[Any]], cache: tuple[Path, str] | None = None) -> BatchPlan:
    return BatchPlan(
        *lengths,
        max_tokens=4096,
        micro_batch_tokens=512,
        seed=1,
        cache=cache,
    )


def batches(plan: BatchPlan) -> list[list[list[int]]]:
    """The pairs of each micro-batch of each step of two epochs, and the tokens of each step."""
    steps = [plan[step] for step in range(2 * plan.steps_per_epoch)]
    return [
        [*map(np.ndarray.tolist, step.micro_batches), [step.source_tokens, step.target_tokens]]
        for step in steps
    ]


# ── Ranks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "expected"),
    [(64, 56, 2), (512, 1000, 1), (4, 1, 4), (4, 2, 2), (4, 4, 1), (4, 3, 2), (1, 8, 1), (7, 2, 4)],
)
def test_every_micro_batch_stays_whole_and_keeps_its_number(
    micro_batches: int, ranks: int, expected: int
) -> None:
    batch = GlobalBatch([np.arange(3) + 3 * n for n in range(micro_batches)], 0, 0)
    assert passes(micro_batches, ranks) == expected
    found = {}
    for rank in range(ranks):
        share = batch.share(rank, ranks)
        assert len(share) == expected
        found.update({rank + n * ranks: pairs.tolist() for n, pairs in enumerate(share)})
    for number in range(expected * ranks):
        whole = batch.micro_batches[number].tolist() if number < micro_batches else []
        assert found[number] == whole


# ── Sorting ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_sorting_in_parts_is_sorting(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = some_lengths(1000)
    monkeypatch.setattr(batch_plan, "PAIRS_AT_ONCE", at_once)
    source, target = lengths
    longest = np.maximum(source, target)
    leaning = np.where(longest % 2, source - target, target - source)
    expected = np.lexsort([leaning, longest])
    assert np.concatenate(plan_of(lengths).sorted_micro_batches()).tolist() == expected.tolist()


def test_a_pair_over_the_budget_is_alone() -> None:
    lengths = np.array([[3, 600, 3, 600, 512], [600, 2, 2, 600, 1]], dtype=np.uint16)
    sizes = [len(micro) for micro in plan_of(lengths).sorted_micro_batches()]
    assert sizes == [1, 1, 1, 1, 1]


# ── One file for all ────────────────────────────────────────────────────────────────────────────


def test_only_the_maker_reads_lengths(tmp_path: Path) -> None:
    made = plan_of(some_lengths(), (tmp_path, "these lengths"))
    expected = batches(made)
    again = plan_of(np.zeros((2, 5000), dtype=np.int32), (tmp_path, "these lengths"))
    # The first of the two epochs was removed for the third's sake, and would be made again.
    assert again.padding_share() == made.padding_share()
    assert again.largest_micro_batch().tolist() == made.largest_micro_batch().tolist()
    for step in range(made.steps_per_epoch):
        there = again[made.steps_per_epoch + step]
        *pairs, tokens = expected[made.steps_per_epoch + step]
        assert [micro.tolist() for micro in there.micro_batches] == pairs
        assert [there.source_tokens, there.target_tokens] == tokens
    assert batches(plan_of(some_lengths())) == expected  # without a folder


def test_lengths_are_those_of_the_shards(reader: ShardReader, tmp_path: Path) -> None:
    for _ in range(2):
        source, target, digest = map_lengths(reader, tmp_path)
        assert [source.tolist(), target.tolist()] == [side.tolist() for side in reader.lengths()]
        assert isinstance(source.base, np.memmap)
        assert source.itemsize == 1
        assert len(digest) == 64
    assert len(list(tmp_path.glob("lengths-*"))) == 1


def plan_of_a_rank(shards: Path, folder: Path) -> list[list[list[int]]]:
    *lengths, digest = map_lengths(ShardReader(shards, "train"), folder)
    return batches(plan_of(np.stack(lengths), (folder, digest)))


@pytest.mark.slow
def test_processes_share_one_file_of_each_kind(prepared: TranslationRecipe, tmp_path: Path) -> None:
    shards = prepared.run_dir / "shards"
    with ProcessPoolExecutor(3, mp_context=get_context("forkserver")) as ranks:
        work = [ranks.submit(plan_of_a_rank, shards, tmp_path) for _ in range(3)]
        first, *others = [each.result() for each in work]
    assert all(other == first for other in others)
    kinds = sorted(file.name.split("-")[0] for file in tmp_path.glob("[a-z]*"))
    assert kinds == ["epoch", "epoch", "lengths", "outline"]
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("kind", ["lengths", "outline", "epoch"])
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:100], lambda content: b"", lambda content: b"nonsense" * 100],
    ids=["cut", "empty", "other bytes"],
)
def test_what_is_damaged_is_made_again(
    reader: ShardReader, tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]
) -> None:
    def made() -> list[list[list[int]]]:
        *lengths, digest = map_lengths(reader, tmp_path)
        return batches(plan_of(np.stack(lengths), (tmp_path, digest)))

    expected = made()
    for file in tmp_path.glob(f"{kind}-*"):
        file.write_bytes(damage(file.read_bytes()))
    assert made() == expected


def test_where_nothing_can_be_written_the_plan_is_the_same(
    reader: ShardReader, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    *lengths, digest = map_lengths(reader, tmp_path / "file")
    plan = plan_of(np.stack(lengths), (tmp_path / "file", digest))
    assert batches(plan) == batches(plan_of(np.stack(reader.lengths())))
