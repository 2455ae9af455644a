"""`pipeline.load`: the door for Python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
