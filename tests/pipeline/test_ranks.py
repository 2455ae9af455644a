"""Ranks share the lines of a text, and say how a GPU's memory is managed."""

from __future__ import annotations

import os

import pytest

from pipeline.ranks import choose_allocator, share_of


def test_every_rank_has_its_lines_and_all_are_shared_out() -> None:
    for lines in ([], ["a"], ["long " * 20, "b", "c", "d"], [str(n) * n for n in range(40)]):
        for world_size in (1, 2, 3, 8):
            shares = [lines[share_of(lines, rank, world_size)] for rank in range(world_size)]
            assert [line for share in shares for line in share] == lines
    sizes = [len("".join(part)) for part in (lines[share_of(lines, rank, 2)] for rank in (0, 1))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_the_allocator_is_chosen_under_both_names(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], expected: str
) -> None:
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    for name in names:
        monkeypatch.setenv(name, "")  # put back when this ends
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    choose_allocator()
    assert {os.environ[name] for name in names} == {expected}
