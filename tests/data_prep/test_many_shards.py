"""Few pairs for many shards: what is written and read grows with the pairs alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.feed import many_shards
from data_prep.arrow import open_rows, write_rows
from data_prep.binarize import _encode
from data_prep.config import DataConfig
from data_prep.shards import ShardReader
from pipeline.translation_recipe import TranslationRecipe


@pytest.fixture
def shards(prepared: TranslationRecipe) -> Path:
    return prepared.run_dir / "shards"


@pytest.mark.parametrize("rows", [0, 1, 600])
def test_a_slice_is_written_without_what_it_was_cut_from(
    shards: Path, tmp_path: Path, rows: int
) -> None:
    pairs = open_rows(shards / "train-00000.arrow")
    write_rows(tmp_path / "some.arrow", pairs.slice(0, rows))
    written = open_rows(tmp_path / "some.arrow")
    assert written.equals(pairs.slice(0, rows))
    whole = (shards / "train-00000.arrow").stat().st_size
    assert (tmp_path / "some.arrow").stat().st_size <= 1000 + whole * rows // len(pairs) * 2
    if rows == len(pairs):
        assert (tmp_path / "some.arrow").read_bytes() == (shards / "train-00000.arrow").read_bytes()


def test_a_piece_takes_no_more_room_for_many_shards(
    prepared: TranslationRecipe, shards: Path, tmp_path: Path
) -> None:
    pairs = open_rows(shards / "train-00000.arrow")
    text = prepared.run_dir / "clean" / "train"
    config: DataConfig = prepared.data
    sizes = []
    for number in (1, 4000):
        folder = tmp_path / str(number)
        folder.mkdir()
        _encode(config, text, shards, lambda lines: pairs, number, (0, 1.0), folder)
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
    assert sizes[1] - sizes[0] <= 4000 * 8


def test_reading_many_pairs_is_reading_each(shards: Path, tmp_path: Path) -> None:
    many_shards(shards, 50, tmp_path)
    reader = ShardReader(tmp_path, "train")
    chosen = np.random.default_rng(0).integers(0, len(reader), 200)
    before = len(os.listdir("/proc/self/fd"))
    for index, pair in zip(chosen.tolist(), reader.read(chosen), strict=True):
        for ours, one in zip(pair, reader[index], strict=True):
            assert ours.tolist() == one.tolist()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(chosen[:0]) == []
