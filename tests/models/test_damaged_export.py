"""An export.json that is damaged is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.export_format import ModelError, read_settings

WHOLE = {"format": "ctranslate2", "model": {"max_seq_len": 96}, "evaluation": {"beam_size": 4}}


def test_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps(WHOLE))
    assert read_settings(tmp_path).model.max_seq_len == 96


@pytest.mark.parametrize(
    "changed",
    [{"format": None}, {"format": []}, {"model": None}, {"model": "x"},
     {"model": {"max_seq_len": "96"}}, {"evaluation": 3}, {"evaluation": {"beam_size": None}},
     {"evaluation": {"beam_size": True}}, {"evaluation": {"beam": 4}}, {"max_source_tokens": "96"}],
    ids=str,
)  # fmt: skip
def test_a_section_of_another_type(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "export.json").write_text(json.dumps({**WHOLE, **changed}))
    with pytest.raises(ModelError, match="not an exported model") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "[" * 100_000, "\x00"])
def test_nonsense(tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ModelError, match="not an exported model"):
        read_settings(tmp_path)
