"""An export.json that is damaged is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.export_format import ModelError, read_settings
from models.search_config import SearchConfig

SEARCH = {"beam_size": 4, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
          "max_length_ratio": 1.5, "max_length_offset": 20, "batch_tokens": 4096}  # fmt: skip
WHOLE = {"format": "ctranslate2", "model": {"max_seq_len": 96}, "evaluation": SEARCH}


def test_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps(WHOLE))
    found = read_settings(tmp_path)
    assert found.evaluation == SearchConfig.model_validate(SEARCH)
    assert found.model.max_seq_len == 96


@pytest.mark.parametrize(
    "changed",
    [{"format": None}, {"format": []}, {"model": None}, {"model": {}}, {"model": "x"},
     {"evaluation": None}, {"evaluation": 3}, {"evaluation": {**SEARCH, "beam_size": None}},
     {"evaluation": {**SEARCH, "beam_size": True}}, {"evaluation": {**SEARCH, "beam": 4}},
     {"evaluation": {"beam_size": 4}}, {"max_source_tokens": "many"}, {"max_source_tokens": "96"},
     {"model": {"max_seq_len": "96"}}],
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
