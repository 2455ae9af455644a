"""`pipeline.load`: the door for Python."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from models.export_format import Format, ModelError
from pipeline import load
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import ROOT
from tests.pipeline.conftest import exported
from tests.test_docs import FENCE


@pytest.mark.parametrize("format", ["safetensors", "ctranslate2", "onnx"])
def test_any_export_translates_and_scores_for_many_threads(
    format: Format, talkative_run: TranslationRecipe, sentences: list[str]
) -> None:
    translator = load(str(exported(talkative_run, format)))
    expected = translator.translate(sentences)
    assert expected == load(exported(talkative_run, "safetensors")).translate(sentences)
    pairs = list(zip(sentences, expected, strict=True))
    scores = translator.score(pairs)
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(translator.translate, [sentences] * 8):
            assert found == expected
        for scored in threads.map(translator.score, [pairs] * 8):
            assert scored == scores
    with pytest.raises(TypeError, match="a list of sentences"):
        translator.translate("Ja.")
    for prefixes in (["A"], ["A", "B", "C"], "AB"):
        with pytest.raises(ValueError, match="as many prefixes as sentences"):
            translator.n_best(["Ja.", "Nein."], prefixes=prefixes)
    for pair in ("ab", ("Ja.",), ("Ja.", "Yes.", "No.")):
        with pytest.raises(TypeError, match="pairs of a sentence and a translation"):
            translator.score([pair])  # type: ignore[list-item]


@pytest.mark.parametrize("format", ["safetensors", "ctranslate2", "onnx"])
@pytest.mark.parametrize(
    "search",
    [
        {"beam_size": 0}, {"beam_size": True}, {"beam_size": "x"}, {"length_penalty": math.nan},
        {"max_length_ratio": 0}, {"sampling_topk": -1}, {"no_repeat_ngram_size": None},
        {"sampling_temperature": 0.5}, {"sampling_topk": 0, "sampling_temperature": 0.0},
        {"sampling_seed": 2},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_search_cannot_have_are_refused(
    format: Format, search: dict[str, Any], talkative_run: TranslationRecipe
) -> None:
    with pytest.raises(ValueError, match=list(search)[-1]):
        load(exported(talkative_run, format), **search)


def test_the_code_of_the_page_runs(
    ctranslate2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = (block for _, block in FENCE.findall(page) if "from pipeline import load" in block)
    (tmp_path / "my-model").symlink_to(ctranslate2_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert [type(names[name]) for name in ("texts", "lists", "scores")] == [list] * 3
    with pytest.raises(ModelError, match="not an exported model"):
        load(tmp_path)
