"""Batches of pairs are padded, and the decoder reads its targets shifted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.batch_plan import BatchPlan
from data_prep.shards import ShardReader
from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from pipeline.translation.batches import collate
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe


@pytest.fixture
def reader(prepared: TranslationRecipe) -> ShardReader:
    """Return the training pairs of the tiny recipe."""
    return ShardReader(prepared.shards, "train")


@pytest.fixture
def plan(reader: ShardReader) -> BatchPlan:
    """Return the plan of their batches."""
    return BatchPlan(*reader.lengths(), max_tokens=4096, micro_batch_tokens=512, seed=1)


def test_collation(reader: ShardReader, plan: BatchPlan) -> None:
    indices = plan[0].micro_batches[0]
    batch = collate(reader, indices, torch.device("cpu"))
    for row, index in enumerate(indices):
        source, target = (ids.tolist() for ids in reader[int(index)])
        assert source[-1] == target[-1] == EOS_IDX
        assert batch.source_seqs_layout.seq_lens[row] == len(source)
        assert [i for i in batch.source_seqs[row].tolist() if i != PAD_IDX] == source
        assert [i for i in batch.targets[row].tolist() if i != PAD_IDX] == target
        assert batch.target_seqs[row, : len(target)].tolist() == [BOS_IDX, *target[:-1]]


def test_an_empty_share_predicts_nothing(reader: ShardReader) -> None:
    batch = collate(reader, np.empty(0, dtype=np.int64), torch.device("cpu"))
    assert (batch.targets == PAD_IDX).all()
    assert batch.source_seqs.numel() > 0


def test_the_plan_knows_the_padding(reader: ShardReader, plan: BatchPlan) -> None:
    batches = [collate(reader, micro, torch.device("cpu")) for micro in plan.sorted_micro_batches()]
    padding, positions = 0, 0
    for batch in batches:
        for side in (batch.source_seqs, batch.targets):
            padding += int((side == PAD_IDX).sum())
            positions += side.numel()
    assert plan.padding_share() == pytest.approx(padding / positions)


def test_a_batch_larger_than_the_text_is_told_of(
    prepared: TranslationRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    for batches, told in ((4, ""), (1000, "a step sees each pair")):
        training = prepared.training.model_copy(update={"max_tokens": 512 * batches})
        TranslationTask(prepared.model_copy(update={"training": training})).check_data()
        assert bool(told) == bool(caplog.messages)
        assert told in caplog.text
    fitting = int(caplog.messages[0].split("training.max_tokens ")[1].split()[0])
    caplog.clear()
    training = prepared.training.model_copy(update={"max_tokens": fitting})
    task = TranslationTask(prepared.model_copy(update={"training": training}))
    task.check_data()
    assert not caplog.messages
    assert task.plan.steps_per_epoch == 1
