"""Exports are written and loaded again, and all engines give the same translations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from sentencepiece import SentencePieceTrainer

from data_prep.files import sha256_of
from data_prep.prepare import prepare
from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX, UNK_IDX
from models.config import LevelSignals, ModelConfig
from models.export_format import Format, Quantization
from pipeline.publishing.exports import export, serving_format
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation.ctranslate2_translator import CTranslate2Translator
from pipeline.translation.run_model import untrained_model
from pipeline.translation.serving import (
    Hypothesis,
    Part,
    TextTranslator,
    batches_by_length,
)
from pipeline.translation.translator import load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import encoded, exported, run_of, save_checkpoint, talkative

DEPTHS = {"encoder_levels": "4", "decoder_levels": "2", "residual_scale": "1.5"}
RINGS: list[dict[str, str]] = [{"level_signals": signals} for signals in get_args(LevelSignals)]
RINGS += [DEPTHS]
TRANSFORMERS = [{"architecture": "transformer"}, {"architecture": "transformer", **DEPTHS}]


def best(translator: TextTranslator, sources: Sequence[list[int]]) -> list[Hypothesis]:
    """Return the first hypothesis of each source, found in batches as `translate` makes them."""
    order = list(
        batches_by_length({i: len(ids) for i, ids in enumerate(sources)}, translator.search)
    )
    found = translator.search_batches([Part(sources[i]) for i in batch] for batch in order)
    pairs = [
        (index, hypotheses[0])
        for batch, results in zip(order, found, strict=True)
        for index, hypotheses in zip(batch, results, strict=True)
    ]
    return [hypothesis for _, hypothesis in sorted(pairs, key=lambda pair: pair[0])]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [*TRANSFORMERS, *RINGS], ids=lambda keys: " ".join(keys.values()))
def test_both_formats_translate_alike(
    keys: dict[str, str],
    tied: bool,
    prepared: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    sentences: list[str],
) -> None:
    recipe = run_of(
        prepared, tiny_recipe, tmp_path / "run",
        tied_embeddings=str(tied), scale_embeddings=str(tied), **keys,
    )  # fmt: skip
    ours = load_exports(exported(recipe, "safetensors"))
    theirs = load_exports(exported(recipe, "ctranslate2"))
    sources = encoded(ours, sentences)
    expected, found = best(ours, sources), best(theirs, sources)
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-3)
    assert len({len(h.tokens) for h in found}) > 3
    assert theirs.translate(sentences) == ours.translate(sentences)


@pytest.mark.parametrize("joint", [True, False])
def test_a_vocabulary_that_spells_its_special_tokens_in_its_own_way(
    joint: bool,
    prepared: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    sentences: list[str],
) -> None:
    names = {"unk_piece": "[UNK]", "bos_piece": "<bos>", "eos_piece": "<eos>"}
    for name, spelt in {"usual": {}, "own": names}.items():
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "vocab_size": 200,
            "minloglevel": 2,
            **spelt,
        }
        SentencePieceTrainer.train(
            input=str(prepared.run_dir / "clean" / "test.de"), model_prefix=str(tmp_path / name),
            pad_id=PAD_IDX, unk_id=UNK_IDX, bos_id=BOS_IDX, eos_id=EOS_IDX, **settings,
        )  # fmt: skip
    usual, own = tmp_path / "usual.model", tmp_path / "own.model"
    taken = f"{{from: {own if joint else [str(usual), str(own)]}, joint: {joint}}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe.read_text().replace("{size: 300}", taken))
    keys = {"run_dir": str(tmp_path / "run"), "model.tied_embeddings": str(joint)}
    recipe = load_recipe(path, list(keys.items()))
    prepare(recipe.data, recipe.run_dir)
    save_checkpoint(talkative(untrained_model(recipe)), recipe)
    ours, theirs = (
        load_exports(exported(recipe, format)) for format in ("safetensors", "ctranslate2")
    )
    sources = encoded(ours, sentences)
    assert [h.tokens for h in best(theirs, sources)] == [h.tokens for h in best(ours, sources)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [*TRANSFORMERS, *RINGS], ids=lambda keys: " ".join(keys.values()))
def test_onnx_finds_every_hypothesis(
    keys: dict[str, str],
    tied: bool,
    prepared: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    sentences: list[str],
) -> None:
    recipe = run_of(
        prepared, tiny_recipe, tmp_path / "run",
        tied_embeddings=str(tied), scale_embeddings=str(tied), **keys,
    )  # fmt: skip
    ours = load_exports(exported(recipe, "safetensors"))
    theirs = load_exports(exported(recipe, "onnx"))
    sources = encoded(ours, sentences)
    differ = 0
    batch = [Part(ids) for ids in sources]
    for expected, found in zip(*(t.search_batches([batch]) for t in (ours, theirs)), strict=True):
        for own, other in zip(expected, found, strict=True):
            assert [h.score for h in other] == pytest.approx([h.score for h in own], abs=1e-3)
            differ += [h.tokens for h in other] != [h.tokens for h in own]
    assert differ <= 3  # of random weights some are nearly ties, which rounding decides
    lines = zip(theirs.translate(sentences), ours.translate(sentences), strict=True)
    assert sum(found != expected for found, expected in lines) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "signals"), [("ctranslate2", "all"), ("ctranslate2", "static"), ("onnx", "all")]
)
def test_a_thousand_real_sentences(
    format: Format,
    signals: LevelSignals,
    prepared: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    shared: Path,
) -> None:
    recipe = run_of(prepared, tiny_recipe, tmp_path / "run", level_signals=signals)
    path = shared / "data" / "multi30k" / "test_2016_flickr.de.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[:1000]
    ours = load_exports(exported(recipe, "safetensors"))
    theirs = load_exports(exported(recipe, format))
    sources = [ids[-40:] for ids in encoded(ours, lines)]
    pairs = list(zip(best(theirs, sources), best(ours, sources), strict=True))
    assert len(pairs) == 1000
    others = [(found, ours) for found, ours in pairs if found.tokens != ours.tokens]
    assert len(others) <= 2  # of random weights some are nearly ties, which rounding decides


def test_int8_is_a_quarter_and_close(
    talkative_run: TranslationRecipe, ctranslate2_folder: Path, sentences: list[str]
) -> None:
    small = exported(talkative_run, "ctranslate2", "int8")
    theirs, ours = load_exports(small), load_exports(ctranslate2_folder)
    assert "int8" in theirs.backend
    quarter = (ctranslate2_folder / "model.bin").stat().st_size / 4
    assert (small / "model.bin").stat().st_size < 1.6 * quarter  # positions and norms stay float32
    assert isinstance(theirs, CTranslate2Translator)
    assert isinstance(ours, CTranslate2Translator)
    encoded = theirs.source_vocabulary.encode(sentences[1:], out_type=str)
    tokens = [each for each in encoded if each]
    found, expected = (
        sum(sum(scores.log_probs) for scores in engine.model.score_batch(tokens, tokens))
        for engine in (theirs, ours)
    )
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("signals", get_args(LevelSignals))
def test_what_all_levels_share_is_stored_once(
    signals: LevelSignals, prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    """A level has of its own its LayerNorms; of q, k and v, and of the FFN's first matrix, what its
    signals make of them: other matrices, or biases."""
    dim, inner, levels = 32, 64, 3
    recipe = run_of(prepared, tiny_recipe, tmp_path / "run", level_signals=signals)
    qkv, up = 3 * dim * dim, inner * dim
    model = untrained_model(recipe)
    folded = {"all": qkv + up, "attention": qkv, "ffn": up}.get(signals, 0)
    biases = 3 * dim + inner if signals == "static" else 0
    shared = sum(p.numel() for name, p in model.named_parameters() if "signal" not in name)
    numbers = shared - 2 * folded + 2 * levels * (folded + biases)
    numbers += recipe.model.max_seq_len * dim
    names = 16_000  # bytes
    size = (exported(recipe, "ctranslate2") / "model.bin").stat().st_size
    assert 4 * numbers <= size <= 4 * numbers + names


@pytest.mark.parametrize(
    ("format", "quantization", "files"),
    [
        ("ctranslate2", "int8", {"spm.model", "source_words.txt", "model.bin", "config.json"}),
        (
            "onnx",
            "int8",
            {"spm.model", "source_words.txt", "encoder.onnx", "decoder.onnx", "weights.bin"},
        ),
        ("huggingface", None, {"source.spm", "target.spm", "model.safetensors", "config.json"}),
    ],
)
def test_the_same_run_gives_the_same_bytes(
    format: Format,
    quantization: Quantization | None,
    files: set[str],
    talkative_run: TranslationRecipe,
    tmp_path: Path,
) -> None:
    folder = exported(talkative_run, format, quantization)
    export(talkative_run, tmp_path / "again", format, quantization)
    names = sorted(path.name for path in folder.iterdir())
    assert {*files, "export.json", "README.md"} <= set(names)
    for name in names:
        assert sha256_of(tmp_path / "again" / name) == sha256_of(folder / name)


@pytest.mark.parametrize("format", ["ctranslate2", "onnx", "huggingface"])
@pytest.mark.parametrize("architecture", ["universal", "one_wide_ffn"])
def test_what_is_no_standard_transformer_is_refused(
    talkative_run: TranslationRecipe, architecture: str, format: Format
) -> None:
    model = talkative_run.model.model_copy(update={"architecture": architecture})
    recipe = talkative_run.model_copy(update={"model": model})
    expected = f"--format {format}: .*{architecture} is not a standard.*--format safetensors"
    with pytest.raises(UsageError, match=expected):
        export(recipe, Path("/tmp/nowhere"), format)


@pytest.mark.parametrize("format", ["safetensors", "huggingface"])
def test_quantization_needs_a_format_that_has_it(
    format: Format, talkative_run: TranslationRecipe, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="needs --format ctranslate2 or --format onnx"):
        export(talkative_run, tmp_path / "export", format, "int8")


def test_export_says_what_it_is(ctranslate2_folder: Path) -> None:
    settings = json.loads((ctranslate2_folder / "export.json").read_text())
    assert settings["format"] == "ctranslate2"
    assert settings["source_lang"] == "de"
    assert settings["evaluation"]["beam_size"] == 4


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model_dim": 512}, "onnx"),
        ({"model_dim": 512, "level_signals": "static"}, "onnx"),
        ({"model_dim": 256}, "ctranslate2"),
        ({"architecture": "transformer", "model_dim": 512}, "onnx"),
        ({"architecture": "transformer", "model_dim": 256}, "ctranslate2"),
        ({"architecture": "universal"}, "safetensors"),
        ({"architecture": "one_wide_ffn"}, "safetensors"),
    ],
)
def test_the_format_that_serves_best(keys: dict[str, object], expected: Format) -> None:
    assert serving_format(ModelConfig.model_validate(keys)) == expected
