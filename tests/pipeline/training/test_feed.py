"""What ranks read ahead: the same in the same order, however many threads read it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.files import DataError
from data_prep.shards import ShardReader, TokenIds
from pipeline.training.feed import Share, feed
from pipeline.translation.batches import PairBatch
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe


class Unsteady(ShardReader):
    """Answers sooner or later, and not at all for one step's pairs."""

    def __init__(self, folder: Path, lost: set[int]) -> None:
        super().__init__(folder, "train")
        self.lost = lost
        self.threads: set[int] = set()
        self._random = np.random.default_rng(0)

    def read(self, pairs: NDArray[np.integer[Any]]) -> list[tuple[TokenIds, TokenIds]]:
        self.threads.add(threading.get_ident())
        time.sleep(self._random.random() / 50)
        if self.lost & set(pairs.tolist()):
            raise DataError("the disk is gone")
        return super().read(pairs)


def shares(
    prepared: TranslationRecipe, ahead: int, lost: set[int]
) -> tuple[list[Share[PairBatch]], int]:
    """The first shares of rank 0 of 2, and how many threads have read them."""
    task = TranslationTask(prepared)
    task.__dict__["pairs"] = reader = Unsteady(prepared.shards, lost)
    steps = feed(
        task, torch.device("cpu"), rank=0, world_size=2, first_step=3, read_ahead_steps=ahead
    )
    found: list[Share[PairBatch]] = []
    with suppress(DataError):
        found.extend(islice(steps, 20))
    steps.close()  # type: ignore[attr-defined]
    return found, len(reader.threads)


@pytest.mark.parametrize("ahead", [2, 8])
def test_reading_ahead_changes_neither_order_nor_content(
    prepared: TranslationRecipe, ahead: int
) -> None:
    (ours, threads), (theirs, one) = shares(prepared, ahead, set()), shares(prepared, 1, set())
    assert (len(ours), threads, one) == (20, ahead, 1)
    for a, b in zip(ours, theirs, strict=True):
        assert [x.tolist() for x in a.examples] == [x.tolist() for x in b.examples]
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert torch.equal(x.source_seqs, y.source_seqs)
            assert torch.equal(x.targets, y.targets)


def test_what_cannot_be_read_is_told_when_its_turn_comes(prepared: TranslationRecipe) -> None:
    whole, _ = shares(prepared, 1, set())
    seen = {int(pair) for share in whole[:2] for pairs in share.examples for pair in pairs}
    lost = {int(pair) for pairs in whole[2].examples for pair in pairs} - seen
    found, _ = shares(prepared, 8, lost)
    assert len(found) == 2
