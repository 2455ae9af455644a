"""Exports translate text: each sentence by itself, long lines in parts, as they were asked to."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from data_prep.text import split_to_fit
from models.export_format import Format, ModelError, Quantization
from pipeline.translation.serving import Part
from pipeline.translation.translator import load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import run_process
from tests.pipeline.conftest import encoded, exported


@pytest.mark.parametrize(
    # Not of int8 with ONNX Runtime: there the last digit of a float32 can move a code by one.
    ("format", "quantization"),
    [("ctranslate2", None), ("ctranslate2", "int8"), ("onnx", None)],
)
def test_a_translation_does_not_depend_on_its_neighbours(
    format: Format,
    quantization: Quantization | None,
    talkative_run: TranslationRecipe,
    sentences: list[str],
) -> None:
    folder = exported(talkative_run, format, quantization)
    together = load_exports(folder).translate(sentences)
    each = load_exports(folder, batch_tokens=1)
    assert together == each.translate(sentences)
    assert together == [each.translate([sentence])[0] for sentence in sentences]
    assert together[0] == ""


@pytest.mark.parametrize("format", ["ctranslate2", "onnx"])
def test_search_options_of_an_export(
    format: Format, talkative_run: TranslationRecipe, sentences: list[str]
) -> None:
    folder = exported(talkative_run, format)
    held = load_exports(folder, no_repeat_ngram_size=1, beam_size=2)
    for hypotheses in held.search_batches([[Part(ids)] for ids in encoded(held, sentences)]):
        assert len(hypotheses[0]) == 2
        for hypothesis in hypotheses[0]:
            assert len(set(hypothesis.tokens)) == len(hypothesis.tokens)
    with pytest.raises(ModelError, match=r"evaluation\.dtype is for PyTorch"):
        load_exports(folder, dtype="bfloat16")
    with pytest.raises(TypeError, match="no such search option: beams"):
        load_exports(folder, beams=2)


@pytest.mark.parametrize("format", ["safetensors", "ctranslate2", "onnx"])
def test_an_overlong_line_is_translated_in_parts(
    format: Format, talkative_run: TranslationRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    translator = load_exports(exported(talkative_run, format))
    assert translator.max_source_tokens == 64  # what it was trained on, not max_seq_len
    sentence = "Der Mann kauft ein Buch. "
    long = (sentence * 40).strip()
    first, found, last = translator.n_best(["Ja.", long, "Nein."], first_line=7)
    assert "line 8: " in caplog.text
    assert "more than the 64 that the model takes; translated in" in caplog.text
    assert len(found) == 1
    parts = split_to_fit(long, lambda text: len(translator.source_vocabulary.encode(text)) < 64)
    assert found[0][1] == " ".join(filter(None, translator.translate(parts)))
    assert [first[0][1], last[0][1]] == translator.translate(["Ja.", "Nein."])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Eins zwei. Drei vier.", ["Eins zwei.", "Drei vier."]),
        ("Eins, zwei drei vier", ["Eins,", "zwei", "drei vier"]),
        ("einszweidreivier", ["einszwei", "dreivier"]),
        ("一二三四五。六七八九十。", ["一二三四五。", "六七八九十。"]),
        ("kurz", ["kurz"]),
        ("", [""]),
    ],
)
def test_where_a_line_is_cut(text: str, expected: list[str]) -> None:
    assert split_to_fit(text, lambda part: len(part) <= 10) == expected


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("ctranslate2", "model.bin"),
        ("onnx", "encoder.onnx"),
        ("onnx", "decoder.onnx"),
        ("onnx", "weights.bin"),
        ("onnx", "spm.model"),
    ],
)
def test_a_damaged_or_foreign_folder(
    format: Format, file: str, talkative_run: TranslationRecipe, tmp_path: Path
) -> None:
    folder = exported(talkative_run, format)
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(b"not a model")
    shutil.copytree(folder, tmp_path / "partial")
    (tmp_path / "partial" / file).unlink()
    shutil.copytree(folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "export.json").write_text("[]")
    for name in ("damaged", "partial", "foreign", "nowhere"):
        with pytest.raises(ModelError, match=f"{name}: not an exported model: .+"):
            load_exports(tmp_path / name)


def test_plain_ctranslate2_and_sentencepiece_will_do(
    ctranslate2_folder: Path, sentences: list[str]
) -> None:
    """Translate with the lines that docs/serving.md shows."""
    import ctranslate2

    vocabulary = SentencePieceProcessor(model_file=str(ctranslate2_folder / "spm.model"))
    model = ctranslate2.Translator(str(ctranslate2_folder))
    expected = load_exports(ctranslate2_folder).translate(sentences[1:])
    short = [i for i, text in enumerate(expected, start=1) if len(text) < 20]  # ended by itself
    results = model.translate_batch(
        [vocabulary.encode(sentences[i], out_type=str) for i in short],
        beam_size=4, return_end_token=True, min_decoding_length=0, max_decoding_length=90,
    )  # fmt: skip
    tokens = [[token for token in r.hypotheses[0] if token != "</s>"] for r in results]
    texts = [" ".join(vocabulary.decode(line).split()) for line in tokens]
    assert texts == [expected[i - 1] for i in short]
    assert len(texts) > 1


def test_onnx_runs_without_pytorch(talkative_run: TranslationRecipe, sentences: list[str]) -> None:
    """Serving a ring needs onnxruntime, numpy, pydantic and sentencepiece."""
    folder = exported(talkative_run, "onnx", "int8")
    blocked = ["torch", "ctranslate2", "onnx", "safetensors", "fairseq2"]
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"  # importing one of them now fails
        "from pipeline.translation.onnx_translator import OnnxTranslator\n"
        f"print(*OnnxTranslator(Path({str(folder)!r})).translate({sentences!r}), sep='\\n')"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == load_exports(folder).translate(sentences)
