"""Exports are written and loaded again, and both engines give the same translations."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from data_prep.files import sha256_of
from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX
from models.config import Architecture, LevelSignals
from models.export_format import Format, ModelError, Quantization
from models.ringformer import RingDecoder
from models.seq2seq import TranslationModel
from pipeline.command_line import load_recipe
from pipeline.publishing.exports import export
from pipeline.recipe import Recipe, UsageError
from pipeline.translation.run_model import untrained_model
from pipeline.translation.serving import (
    CTranslate2Translator,
    Hypothesis,
    TextTranslator,
    batches_by_length,
    split_to_fit,
)
from pipeline.translation.translator import Translator
from tests.conftest import run_process
from tests.pipeline.conftest import save_checkpoint

VARIANTS: list[tuple[Architecture, LevelSignals]] = [("transformer", "all")]
VARIANTS += [("ringformer", signals) for signals in get_args(LevelSignals)]


def talkative(model: TranslationModel) -> TranslationModel:
    """Give a model sharp random weights: there are no ties, PAD and BOS are never produced, and
    translations end by themselves, some early and some late."""
    stack: Any = model.decoder
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(model.config.model_dim, generator=generator)
    direction /= direction.norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3, generator=generator)
            elif parameter.dim() == 1 or re.search("embed|layer_norm|final_proj", name):
                parameter.mul_(2)
            else:  # fresh ones are small; now Xavier's, twice
                for matrix in parameter.view(-1, *parameter.shape[-2:]):
                    matrix.mul_(2 * (6 / sum(matrix.shape)) ** 0.5 / matrix.abs().max())
        if isinstance(stack, RingDecoder):
            assert stack.ffn_layer_norm is not None
            last_bias = stack.ffn_layer_norm[-1, 1]
        else:
            last_bias = stack.layers[-1].ffn_layer_norm.bias
        last_bias.copy_(5 * direction)  # so h · direction is about 5, always
        weight = model.final_proj.weight
        weight[[PAD_IDX, BOS_IDX]] = -20 * direction
        weight[EOS_IDX] = (2 if model.config.tied_embeddings else 1) * direction
    return model


def run_of(prepared: Recipe, tiny_recipe: Path, folder: Path, **overrides: str) -> Recipe:
    """Make a finished run in `folder`, with a talkative model of these `model` keys."""
    keys = {f"model.{key}": value for key, value in overrides.items()}
    keys |= {"run_dir": str(folder), "evaluation.beam_size": "4"}
    keys["evaluation.max_length_ratio"] = "0.5"  # random weights go round in circles, near ties
    recipe = load_recipe(tiny_recipe, list(keys.items()))
    shutil.copytree(prepared.run_dir / "shards", folder / "shards")
    save_checkpoint(talkative(untrained_model(recipe)), recipe)
    return recipe


@pytest.fixture(scope="module")
def run(prepared: Recipe, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return the recipe of a finished run with a small RingFormer."""
    return run_of(prepared, tiny_recipe, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def folder(run: Recipe) -> Path:
    """Return the folder of its CTranslate2 export in float32."""
    return exported(run, "ctranslate2")


@pytest.fixture(scope="module")
def sentences(prepared: Recipe) -> list[str]:
    text = (prepared.run_dir / "clean" / "test.de").read_text(encoding="utf-8")
    return ["", *text.splitlines(), "Ja.", "   ", "Das Haus ist 1,5 km weit weg, sagt der Mann."]


def exported(recipe: Recipe, format: Format, quantization: Quantization | None = None) -> Path:
    folder = recipe.run_dir.parent / f"{recipe.run_dir.name}-{format}-{quantization}"
    export(recipe, folder, format, quantization)
    return folder


def best(translator: TextTranslator, sources: Sequence[list[int]]) -> list[Hypothesis]:
    """Return the first hypothesis of each source, found in batches as `translate` makes them."""
    order = list(
        batches_by_length({i: len(ids) for i, ids in enumerate(sources)}, translator.search)
    )
    found = translator.search_batches([sources[i] for i in batch] for batch in order)
    pairs = [
        (index, hypotheses[0])
        for batch, results in zip(order, found, strict=True)
        for index, hypotheses in zip(batch, results, strict=True)
    ]
    return [hypothesis for _, hypothesis in sorted(pairs, key=lambda pair: pair[0])]


def encoded(translator: TextTranslator, sentences: Sequence[str]) -> list[list[int]]:
    ids = translator.source_vocabulary.encode(list(sentences), add_eos=True)
    return [tokens for tokens in ids if len(tokens) > 1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "signals"), VARIANTS)
def test_both_formats_translate_alike(
    architecture: Architecture,
    signals: LevelSignals,
    tied: bool,
    prepared: Recipe,
    tiny_recipe: Path,
    tmp_path: Path,
    sentences: list[str],
) -> None:
    recipe = run_of(
        prepared, tiny_recipe, tmp_path / "run", architecture=architecture, level_signals=signals,
        tied_embeddings=str(tied), scale_embeddings=str(tied),
    )  # fmt: skip
    ours = Translator.of_export(exported(recipe, "safetensors"))
    theirs = Translator.of_export(exported(recipe, "ctranslate2"))
    sources = encoded(ours, sentences)
    expected, found = best(ours, sources), best(theirs, sources)
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-3)
    assert len({len(h.tokens) for h in found}) > 3
    assert theirs.translate(sentences) == ours.translate(sentences)


@pytest.mark.slow
def test_a_thousand_real_sentences(run: Recipe, folder: Path, shared: Path) -> None:
    path = shared / "data" / "multi30k" / "test_2016_flickr.de.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[:1000]
    ours = Translator.of_export(exported(run, "safetensors"))
    theirs = Translator.of_export(folder)
    sources = [ids[-40:] for ids in encoded(ours, lines)]
    pairs = list(zip(best(theirs, sources), best(ours, sources), strict=True))
    assert len(pairs) == 1000
    others = [(found, ours) for found, ours in pairs if found.tokens != ours.tokens]
    assert len(others) <= 2  # of random weights some are nearly ties, which rounding decides


def test_int8_is_a_quarter_and_close(run: Recipe, folder: Path, sentences: list[str]) -> None:
    small = exported(run, "ctranslate2", "int8")
    theirs, ours = Translator.of_export(small), Translator.of_export(folder)
    assert "int8" in theirs.backend
    quarter = (folder / "model.bin").stat().st_size / 4
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


def test_equal_tensors_are_stored_once(run: Recipe, folder: Path) -> None:
    """Besides the parameters a file holds the positions and, for each level, folded q, k and v and
    the FFN's first matrix."""
    dim, inner, levels = 32, 64, 3
    model = untrained_model(run)
    own = 2 * levels * (3 * dim * dim + inner * dim)
    shared = sum(p.numel() for name, p in model.named_parameters() if "signal" not in name)
    shared -= 2 * (3 * dim * dim + inner * dim)
    names = 16_000  # bytes
    expected = 4 * (own + shared + run.model.max_seq_len * dim)
    assert expected <= (folder / "model.bin").stat().st_size <= expected + names


def test_the_same_run_gives_the_same_bytes(run: Recipe, folder: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "again", "ctranslate2")
    names = sorted(path.name for path in folder.iterdir())
    assert {"model.bin", "config.json", "export.json", "spm.model"} <= set(names)
    for name in names:
        assert sha256_of(tmp_path / "again" / name) == sha256_of(folder / name)


@pytest.mark.parametrize("architecture", ["universal", "one_wide_ffn"])
def test_what_is_no_standard_transformer_is_refused(run: Recipe, architecture: str) -> None:
    model = run.model.model_copy(update={"architecture": architecture})
    with pytest.raises(UsageError, match=f"{architecture} is not a standard.*--format safetensors"):
        export(run.model_copy(update={"model": model}), Path("/tmp/nowhere"), "ctranslate2")


def test_quantization_needs_ctranslate2(run: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --format ctranslate2"):
        export(run, tmp_path / "export", "safetensors", "int8")


def test_a_translation_does_not_depend_on_its_neighbours(
    folder: Path, sentences: list[str]
) -> None:
    together = Translator.of_export(folder).translate(sentences)
    each = Translator.of_export(folder, batch_tokens=1)
    assert together == each.translate(sentences)
    assert together == [each.translate([sentence])[0] for sentence in sentences]
    assert together[0] == ""


def test_search_options_of_an_export(folder: Path, sentences: list[str]) -> None:
    held = Translator.of_export(folder, no_repeat_ngram_size=1, beam_size=2)
    for hypotheses in held.search_batches([[ids] for ids in encoded(held, sentences)]):
        assert len(hypotheses[0]) == 2
        for hypothesis in hypotheses[0]:
            assert len(set(hypothesis.tokens)) == len(hypothesis.tokens)
    with pytest.raises(UsageError, match=r"evaluation\.dtype is for PyTorch"):
        Translator.of_export(folder, dtype="bfloat16")
    with pytest.raises(TypeError, match="no such search option: beams"):
        Translator.of_export(folder, beams=2)


@pytest.mark.parametrize("format", get_args(Format))
def test_an_overlong_line_is_translated_in_parts(
    format: Format, run: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    translator = Translator.of_export(exported(run, format))
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


def test_a_damaged_or_foreign_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.bin").write_bytes(b"not a model")
    shutil.copytree(folder, tmp_path / "foreign")
    (tmp_path / "foreign" / "export.json").write_text("[]")
    for name in ("damaged", "foreign", "nowhere"):
        with pytest.raises(ModelError, match=f"{name}: not an exported model: .+"):
            Translator.of_export(tmp_path / name)


def test_translate_needs_neither_torch_nor_fairseq2(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.translate import main\n"
        "from pipeline.translation.translator import Translator\n"
        f"print(Translator.of_export(Path({str(folder)!r})).translate(['Ja.', '']))\n"
        "assert not {'torch', 'fairseq2', 'mlflow', 'deepspeed'} & sys.modules.keys()"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_plain_ctranslate2_and_sentencepiece_will_do(folder: Path, sentences: list[str]) -> None:
    """Translate with the lines that docs/serving.md shows."""
    import ctranslate2

    vocabulary = SentencePieceProcessor(model_file=str(folder / "spm.model"))
    model = ctranslate2.Translator(str(folder))
    expected = Translator.of_export(folder).translate(sentences[1:])
    short = [i for i, text in enumerate(expected, start=1) if len(text) < 30]
    results = model.translate_batch(
        [vocabulary.encode(sentences[i], out_type=str) for i in short],
        beam_size=4, return_end_token=True, min_decoding_length=0, max_decoding_length=90,
    )  # fmt: skip
    tokens = [[token for token in r.hypotheses[0] if token != "</s>"] for r in results]
    texts = [" ".join(vocabulary.decode(line).split()) for line in tokens]
    assert texts == [expected[i - 1] for i in short]
    assert len(texts) > 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(folder: Path) -> None:
    code = (
        "import re, sys; from pipeline.command_line import run_command\n"
        "from pipeline.translate import add_arguments, main\n"
        "try: run_command('translate', '', main, add_arguments)\n"
        "finally:\n"
        "    status = open('/proc/self/status').read()\n"
        "    print(re.findall(r'VmHWM:\\s+(\\d+)', status)[0], file=sys.stderr)"
    )
    peaks = []
    for count in (10_000, 200_000):  # 5 and 100 MB
        lines = ["Ja." if number % 5_000 == 0 else " " * 500 for number in range(count)]
        done = run_process(
            [sys.executable, "-c", code, "--model", str(folder)], stdin="\n".join(lines)
        )
        assert done.returncode == 0, done.stderr
        translations = done.stdout.split("\n")
        assert len(translations) == count + 1
        assert {i for i, text in enumerate(translations) if text} <= set(range(0, count, 5_000))
        assert f"translate: {count} sentences in" in done.stderr
        peaks.append(int(done.stderr.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 40  # MiB


def test_export_says_what_it_is(folder: Path) -> None:
    settings = json.loads((folder / "export.json").read_text())
    assert settings["format"] == "ctranslate2"
    assert settings["source_lang"] == "de"
    assert settings["evaluation"]["beam_size"] == 4
