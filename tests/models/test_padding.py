"""A layout made at once is what fairseq2 makes row by row, whatever the number of sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fairseq2.nn import BatchLayout
from torch.profiler import profile

from models.padding import PaddedLayout, padding_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[3, 1, 5, 2], [4, 4], [1], [7]])
def test_it_says_what_fairseq2s_says(lengths: list[int]) -> None:
    width = max(lengths)
    theirs = BatchLayout((len(lengths), width), lengths)
    ours = PaddedLayout(np.array(lengths), width, CPU)
    properties = [name for name, kind in vars(BatchLayout).items() if isinstance(kind, property)]
    assert "position_indices" in properties
    for name in properties:
        expected, found = getattr(theirs, name), getattr(ours, name)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        else:
            assert found == expected, name
    assert str(ours) == str(theirs)
    mask = padding_mask(ours)
    assert (mask is None) == (len(set(lengths)) == 1)
    if mask is not None:
        assert mask[:, 0, 0].sum(1).tolist() == lengths


@pytest.mark.parametrize("lengths", [[0, 2], [3, 4]])
def test_lengths_that_cannot_be_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="Lengths must be from 1 to 3"):
        PaddedLayout(np.array(lengths), 3, CPU)


def test_more_sequences_take_no_more_operators() -> None:
    def operators(count: int) -> int:
        lengths = np.arange(count) % 7 + 1
        with profile() as profiled:
            padding_mask(PaddedLayout(lengths, 7, CPU))
        return sum(event.count for event in profiled.key_averages() if "aten::" in event.key)

    assert operators(2000) == operators(10) > 0
