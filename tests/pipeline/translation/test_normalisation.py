"""Lines to translate are normalised as training text was."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import sentencepiece

from data_prep.text import normalise, normalise_lines
from models.search_config import SearchConfig
from pipeline.publishing.servable import SERVED_TRANSLATION
from pipeline.recipe import ROOT
from pipeline.translation.serving import Hypothesis, Pair, PairIds, Part, TextTranslator
from tests.conftest import run_process


class Echo(TextTranslator):
    """Its translation of a sentence is the sentence."""

    def search_batches(self, batches: Iterable[list[Part]]) -> Iterator[list[list[Hypothesis]]]:
        for batch in batches:
            yield [[Hypothesis(part.source, 0.0)] for part in batch]

    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[list[list[float]]]:
        for _, targets in batches:
            yield [[-float(token) for token in ids] for ids in targets]


@pytest.fixture(scope="module")
def echo() -> Echo:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_writer=model, vocab_size=300,
        normalization_rule_name="identity", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return Echo((vocabulary, vocabulary), SearchConfig(), 40, "echo")


@pytest.mark.parametrize("limit", [40, 6])  # 6: in parts
@pytest.mark.parametrize("place", ["{}a b", "a{}b", "a {} b", "ab{}", "{}"])
def test_translation_sees_what_training_saw(echo: Echo, place: str, limit: int) -> None:
    echo.max_source_tokens = limit
    codes = [*range(0x20), *range(0x7F, 0xA1), 0xAD, 0x0301, 0x2028, 0x3000]
    codes += [*range(0x2000, 0x2010), 0x2060, 0xFEFF, 0xFFFD, 0xFF0C, 0x2026, 0x212B]
    lines = [place.format(chr(code)) for code in codes]
    translations = echo.translate(lines)
    if limit == 40:
        assert translations == [normalise(line) for line in lines]
        assert translations == normalise_lines("\n".join(line.replace("\n", " ") for line in lines))
    else:
        in_parts = ["".join(normalise(line).split()) for line in lines]
        assert ["".join(line.split()) for line in translations] == in_parts
    assert len(translations) == len(lines)
    if limit == 40:
        echo.max_target_tokens = limit
        raw, clean = ([Pair("", text) for text in texts] for texts in (lines, translations))
        assert echo.score(raw) == echo.score(clean)


def test_bytes_spell_nothing_that_nobody_sees(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """With byte fallback a model can write any character; its line is a line that it could read."""
    ids = [echo.target_vocabulary.piece_to_id(f"<0x{byte:02X}>") for byte in (0x61, 0, 0x0A, 0xC3)]
    found = Hypothesis([*ids, ids[0]], 0.0)
    monkeypatch.setattr(echo, "search_batches", lambda batches: [[[found]] for _ in batches])
    assert echo.translate(["a"]) == ["a a"]


def test_served_code_is_all_that_serving_needs(tmp_path: Path) -> None:
    for name in SERVED_TRANSLATION:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pipeline.translation.ctranslate2_translator\n"
        "print(*sorted(m for m in sys.modules if m.split('.')[0] in"
        " ('data_prep', 'models', 'pipeline')))"
    )
    done = run_process([sys.executable, "-I", "-c", code])
    assert set(done.stdout.split()) == {
        "data_prep", "data_prep.section", "data_prep.text", "models", "models.config",
        "models.export_format", "models.search_config", "pipeline", "pipeline.translation",
        "pipeline.translation.ctranslate2_translator", "pipeline.translation.serving",
    }, done.stderr  # fmt: skip
