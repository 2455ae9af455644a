"""Ranks share the lines of a text."""

from __future__ import annotations

import pytest

from pipeline.ranks import share_of


def test_every_rank_has_its_lines_and_all_are_shared_out() -> None:
    for lines in ([], ["a"], ["long " * 20, "b", "c", "d"], [str(n) * n for n in range(40)]):
        for world_size in (1, 2, 3, 8):
            shares = [lines[share_of(lines, rank, world_size)] for rank in range(world_size)]
            assert [line for share in shares for line in share] == lines
    sizes = [len("".join(part)) for part in (lines[share_of(lines, rank, 2)] for rank in (0, 1))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
