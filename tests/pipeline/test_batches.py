"""The batch plan: which sentences a step sees, whoever shares the work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.shards import ShardReader
from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX
from pipeline.batches import BatchPlan, GlobalBatch, collate
from pipeline.config import Recipe

BUDGET, MICRO = 4096, 512


@pytest.fixture
def reader(prepared: Recipe) -> ShardReader:
    return ShardReader(prepared.run_dir / "shards", "train")


def plan_of(reader: ShardReader, seed: int = 1, micro: int | None = MICRO) -> BatchPlan:
    return BatchPlan(*reader.lengths(), max_tokens=BUDGET, micro_batch_tokens=micro, seed=seed)


def sentences(batch: GlobalBatch) -> list[int]:
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
        seen.update(sentences(batch))
    assert seen == set(range(len(reader)))


def test_the_plan_is_a_function_of_seed_and_step(reader: ShardReader) -> None:
    plan, same, other = plan_of(reader), plan_of(reader), plan_of(reader, seed=2)
    steps = [0, plan.steps_per_epoch + 1, 1, 0]  # any order, over epochs
    assert [sentences(plan[s]) for s in steps] == [sentences(same[s]) for s in steps]
    assert sentences(plan[0]) != sentences(other[0])
    assert sentences(plan[0]) != sentences(plan[plan.steps_per_epoch])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("micro", [MICRO, None])
def test_ranks_share_a_global_batch_without_overlap(
    reader: ShardReader, world_size: int, micro: int | None
) -> None:
    batch = plan_of(reader, micro=micro)[0]
    shares = [batch.share(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # equally many forward passes
    shared = sorted(int(i) for share in shares for piece in share for i in piece)
    assert shared == sentences(batch)


def test_collation(reader: ShardReader) -> None:
    indices = plan_of(reader)[0].micro_batches[0]
    batch = collate(reader, indices, torch.device("cpu"))
    for row, index in enumerate(indices):
        source, target = (ids.tolist() for ids in reader[int(index)])
        assert source[-1] == target[-1] == EOS_IDX
        assert batch.source_layout.seq_lens[row] == len(source)
        assert [i for i in batch.source[row].tolist() if i != PAD_IDX] == source
        assert [i for i in batch.targets[row].tolist() if i != PAD_IDX] == target
        assert batch.target_input[row, : len(target)].tolist() == [BOS_IDX, *target[:-1]]


def test_an_empty_share_predicts_nothing(reader: ShardReader) -> None:
    batch = collate(reader, np.empty(0, dtype=np.int64), torch.device("cpu"))
    assert (batch.targets == PAD_IDX).all()
    assert batch.source.numel() > 0
