"""The batch plan says which examples a step sees, whoever shares the work."""

from __future__ import annotations

import gzip
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.batch_plan import BatchPlan, GlobalBatch
from data_prep.shards import ShardReader
from pipeline.translation_recipe import TranslationRecipe

BUDGET, MICRO = 4096, 512


@pytest.fixture
def reader(prepared: TranslationRecipe) -> ShardReader:
    """Return the training pairs of the tiny recipe."""
    return ShardReader(prepared.shards, "train")


def plan_of(
    reader: ShardReader, seed: int = 1, micro: int | None = MICRO, cache: Path | None = None
) -> BatchPlan:
    """Return a plan for the training pairs; `micro` is the budget of a micro-batch."""
    return BatchPlan(
        *reader.lengths(),
        max_tokens=BUDGET,
        micro_batch_tokens=micro,
        seed=seed,
        cache=(cache, "these") if cache else None,
    )


def examples(batch: GlobalBatch) -> list[int]:
    """Return the numbers of all examples of a batch, in order."""
    return sorted(int(i) for micro in batch.micro_batches for i in micro)


def test_an_epoch_holds_every_pair_and_keeps_the_budget(reader: ShardReader) -> None:
    plan = plan_of(reader)
    longest = np.stack(reader.lengths()).max(0)
    seen: set[int] = set()
    for step in range(plan.steps_per_epoch):
        batch = plan[step]
        assert len(batch.micro_batches) == BUDGET // MICRO
        for micro in batch.micro_batches:
            assert len(micro) * longest[micro].max() <= MICRO
        assert batch.target_tokens == reader.lengths()[1][np.concatenate(batch.micro_batches)].sum()
        seen.update(examples(batch))
    assert seen == set(range(len(reader)))


def test_the_plan_is_a_function_of_seed_and_step(reader: ShardReader) -> None:
    plan, same, other = plan_of(reader), plan_of(reader), plan_of(reader, seed=2)
    steps = [0, plan.steps_per_epoch + 1, 1, 0]  # any order, over epochs
    assert [examples(plan[s]) for s in steps] == [examples(same[s]) for s in steps]
    assert examples(plan[0]) != examples(other[0])
    assert examples(plan[0]) != examples(plan[plan.steps_per_epoch])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("micro", [MICRO, None])
def test_ranks_share_a_global_batch_without_overlap(
    reader: ShardReader, world_size: int, micro: int | None
) -> None:
    plan = plan_of(reader, micro=micro)
    batch = plan[0]
    shares = [batch.share(rank, world_size) for rank in range(world_size)]
    # Equally many forward passes.
    assert {len(share) for share in shares} == {plan.micro_batches_per_rank(world_size)}
    shared = sorted(int(i) for share in shares for micro in share for i in micro)
    assert shared == examples(batch)


def test_the_plan_is_the_one_of_earlier_releases() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=(2, 5000)).astype(np.int32)
    plan = BatchPlan(*lengths, max_tokens=BUDGET, micro_batch_tokens=MICRO, seed=1)
    digest = hashlib.sha256()
    for step in range(2 * plan.steps_per_epoch):
        for micro in plan[step].micro_batches:
            digest.update(f"{micro.tolist()}".encode())
    # Another plan needs another `BATCH_PLAN_VERSION`: checkpoints count its steps.
    assert digest.hexdigest()[:16] == "d9c0d0cb48a33a95"


def test_real_sentences_are_padded_little(shared: Path) -> None:
    sides = [shared / "data" / "multi30k" / f"train.{language}.gz" for language in ("de", "en")]
    source, target = (
        np.array(
            [len(line.split()) + 1 for line in gzip.decompress(side.read_bytes()).splitlines()]
        )
        for side in sides
    )
    plan = BatchPlan(source, target, max_tokens=4096, micro_batch_tokens=None, seed=1)
    assert plan.padding_share() < 0.05


# ── The cache ───────────────────────────────────────────────────────────────────────────────────


def test_a_cached_plan_is_the_same_plan(reader: ShardReader, tmp_path: Path) -> None:
    plain, cached, again = (plan_of(reader, cache=cache) for cache in (None, tmp_path, tmp_path))
    for step in (0, 1, plain.steps_per_epoch - 1, plain.steps_per_epoch, 0):
        assert examples(plain[step]) == examples(cached[step]) == examples(again[step])
        assert plain[step].target_tokens == again[step].target_tokens


def test_ranks_share_one_file(reader: ShardReader, tmp_path: Path) -> None:
    plans = [plan_of(reader, cache=tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as ranks:
        batches = list(ranks.map(lambda plan: examples(plan[0]), plans))
    assert all(batch == batches[0] for batch in batches)
    (file,) = tmp_path.glob("epoch-*")
    inode = file.stat().st_ino
    plan_of(reader, cache=tmp_path)[0]
    assert file.stat().st_ino == inode  # not written again


def test_the_cache_keeps_two_epochs_of_one_plan(reader: ShardReader, tmp_path: Path) -> None:
    plan = plan_of(reader, cache=tmp_path)
    for epoch in range(4):
        plan[epoch * plan.steps_per_epoch]
    assert {file.name.split("-")[1] for file in tmp_path.glob("epoch-*")} == {"2", "3"}
    other = plan_of(reader, seed=2, cache=tmp_path)
    assert examples(other[0]) == examples(plan_of(reader, seed=2)[0])
    assert len(list(tmp_path.glob("epoch-*"))) == 1


def test_a_damaged_cache_is_made_again(reader: ShardReader, tmp_path: Path) -> None:
    expected = examples(plan_of(reader, cache=tmp_path)[0])
    (file,) = tmp_path.glob("epoch-*")
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:1000], whole[:middle] + b"\1\2\3\4" + whole[middle + 4 :]):
        file.write_bytes(damaged)
        assert examples(plan_of(reader, cache=tmp_path)[0]) == expected
        assert file.read_bytes() == whole
