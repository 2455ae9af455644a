"""A vocabulary that is taken from an export, a run or a file, and what it does not know."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data_prep.files import DataError, sha256_of
from data_prep.inspect import inspect
from data_prep.shards import ShardsManifest
from data_prep.taken_vocabulary import (
    check_taken_vocabulary,
    take_vocabulary,
    vocabulary_sizes,
)
from data_prep.text import SOURCE_WORDS
from data_prep.vocabulary import PreparedVocabulary, Unknown, load_vocabulary
from models.config import ModelConfig, VisionConfig
from models.export_format import ClassifierSettings, ExportSettings, write_settings
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.data_prep.test_prepare import GOOD, corpus, prepare, recipe_of, write_corpus

__all__ = ["corpus"]  # the fixture

APART = {"data.vocabulary.joint": "false", "model.tied_embeddings": "false"}


def trained(symbols: tuple[str, ...] = (), **settings: Any) -> bytes:
    """Return a SentencePiece model of our tokens, unless `settings` say otherwise."""
    model = io.BytesIO()
    ours: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "vocab_size": 60}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(side for pair in GOOD for side in pair), model_writer=model,
        model_type="bpe", minloglevel=2, user_defined_symbols=list(symbols), **{**ours, **settings},
    )  # fmt: skip
    return model.getvalue()


def export_of(folder: Path, *sides: bytes, languages: tuple[str, str] = ("de", "en")) -> Path:
    """Write what an export has of a vocabulary, a joint one or two, and return the folder."""
    folder.mkdir()
    names = ["spm.model"] if len(sides) == 1 else ["spm.source.model", "spm.target.model"]
    for name, side in zip(names, sides, strict=True):
        (folder / name).write_bytes(side)
    source, target = languages
    settings = ExportSettings(
        format="safetensors", model=ModelConfig(), source_lang=source, target_lang=target
    )
    write_settings(folder, settings)
    return folder


def taking(folder: Path, taken: object, **overrides: str) -> TranslationRecipe:
    """Return the corpus's recipe, but with a vocabulary that is named on the command line."""
    path = folder / "taking.yaml"
    text = (folder / "recipe.yaml").read_text()
    path.write_text(text.replace("vocabulary: {size: 60}", "pairs_per_shard: 1000"))
    keys = {"data.vocabulary.from": str(taken), "run_dir": f"{folder}/taking", **overrides}
    return load_recipe(path, list(keys.items()))


def take(recipe: TranslationRecipe) -> PreparedVocabulary:
    """Run the vocabulary stage."""
    return take_vocabulary(recipe.data, recipe.run_dir / "vocabulary")


def test_a_run_that_takes_what_it_had_trained_knows_no_words(corpus: Path) -> None:
    """The shards are the same, but a model may have learnt other words before."""
    run = recipe_of(corpus, data__pairs_per_shard="1000")
    prepare(run)
    assert (run.shards / SOURCE_WORDS).exists()
    copy = shutil.copy(run.shards / "spm.model", corpus / "copy.model")
    prepare(taking(corpus, copy, run_dir=str(run.run_dir)))
    assert not (run.shards / SOURCE_WORDS).exists()


def test_it_is_taken_from_a_run_an_export_or_a_file(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the same vocabulary comes from, it makes the same shards, and nothing anew."""
    run = recipe_of(corpus)
    trained_one = prepare(run)
    caplog.set_level("INFO")
    export = export_of(corpus / "export", (run.shards / "spm.model").read_bytes())
    recipe = taking(corpus, export)
    taken = prepare(recipe)
    assert taken.vocabulary == trained_one.vocabulary
    assert taken.totals == trained_one.totals
    assert not (recipe.shards / SOURCE_WORDS).exists()  # a model may have learnt others before
    assert f"vocabulary: taken from {export}, 60 tokens" in caplog.text
    assert sha256_of(corpus / "taking" / "vocabulary" / "spm.model") == taken.vocabulary.sha256
    told = recipe.model_dump(mode="json", exclude=recipe.unused)
    assert told["data"]["vocabulary"]["from"] == str(export)
    (corpus / "told.json").write_text(json.dumps(told))  # MLflow has it so
    assert load_recipe(corpus / "told.json") == recipe
    backwards = export_of(corpus / "back", trained(), languages=("en", "de"))
    shutil.copyfile(run.shards / "spm.model", backwards / "spm.model")
    shutil.rmtree(corpus / "taking" / "shards")
    (corpus / "halfway").mkdir()  # of a run whose preparation was interrupted
    shutil.copytree(run.run_dir / "vocabulary", corpus / "halfway" / "vocabulary")
    for place in (corpus / "run", export / "spm.model", backwards, corpus / "halfway"):
        caplog.clear()
        recipe = taking(corpus, place)
        assert take(recipe).sha256 == taken.vocabulary.sha256
        assert "vocabulary: up to date, reused" in caplog.text
        assert "was made for" not in caplog.text
        assert vocabulary_sizes(recipe.data.vocabulary) == (60, 60)


def test_another_vocabulary_makes_other_shards(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = export_of(corpus / "export", trained()) / "spm.model"
    recipe = taking(corpus, taken)
    prepare(recipe)
    check_taken_vocabulary(recipe.data, recipe.shards)
    taken.write_bytes(trained(vocab_size=70))
    with pytest.raises(DataError, match=r"spm.model has changed since .*`./run.sh prepare`"):
        check_taken_vocabulary(recipe.data, recipe.shards)
    caplog.set_level("INFO")
    assert prepare(recipe).vocabulary.sizes == (70, 70)
    assert "vocabulary: done again: taken changed" in caplog.text
    assert "shards: done again: vocabulary changed" in caplog.text
    check_taken_vocabulary(recipe.data, recipe.shards)
    taken.unlink()
    for place in (taken, taken.parent):  # what is absent cannot have changed
        check_taken_vocabulary(taking(corpus, place).data, recipe.shards)
    with pytest.raises(DataError, match=r"from: .*spm.model: no such file"):
        take(recipe)
    assert (recipe.run_dir / "vocabulary" / "spm.model").exists()


def test_one_for_each_side(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    sides = trained(), trained(vocab_size=70)
    export = export_of(corpus / "export", *sides)
    files = f"[{export / 'spm.source.model'}, {export / 'spm.target.model'}]"
    made = take(taking(corpus, export, **APART))
    assert made.sizes == (60, 70)
    caplog.set_level("INFO")
    assert take(taking(corpus, files, **APART)) == made
    assert "vocabulary: up to date, reused" in caplog.text
    with pytest.raises(DataError, match=r"vocabulary for each side, .*joint is true; set it and"):
        take(taking(corpus, export))
    with pytest.raises(UsageError, match="names a file for each side, and so joint must be false"):
        taking(corpus, files)
    with pytest.raises(DataError, match=r"one vocabulary for both sides, .* \[SOURCE, TARGET\]"):
        take(taking(corpus, export / "spm.source.model", **APART))
    with pytest.raises(DataError, match="export: not a file; of two paths, each is a file's"):
        take(taking(corpus, f"[{export / 'spm.source.model'}, {export}]", **APART))

    backwards = export_of(corpus / "backwards", *sides, languages=("en", "de"))
    with pytest.raises(DataError) as error:
        take(taking(corpus, backwards, **APART))
    assert "goes from en to de, and the recipe from de to en" in str(error.value)
    files = str(error.value).partition("name the files: ")[2]
    assert take(taking(corpus, files, **APART)).sizes == (70, 60)
    dutch = export_of(corpus / "dutch", *sides, languages=("nl", "en"))
    take(taking(corpus, dutch, **APART))
    assert "was made for nl and en, and the recipe is for de and en" in caplog.text


# ── What it does not know ───────────────────────────────────────────────────────────────────────


def test_unknown_characters_are_counted(
    corpus: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts are of the text after cleaning, whatever the pieces, the weight and the limit."""
    strange = [("Das ist 猫☃ der Satz ☃.", "This is it."), *GOOD[:9]]
    write_corpus(corpus / "data", "train", strange)
    lines = [source for source, _ in strange]
    export = export_of(corpus / "export", trained())
    vocabulary = load_vocabulary(export / "spm.model")
    caplog.set_level("INFO")

    def counted(**overrides: str) -> ShardsManifest:
        caplog.clear()
        made = prepare(recipe := taking(corpus, export, **overrides))
        known = made.corpora[0].unknown
        assert known["de"] == Unknown(
            characters=sum(map(len, lines)),
            unknown_characters=3,
            tokens=sum(len(ids) + 1 for ids in vocabulary.encode(lines)),
            unknown_tokens=2,  # 猫☃ is one
            unknown={"☃": 2, "猫": 1},
        )
        assert list(known["de"].unknown) == ["☃", "猫"]
        assert (known["en"].unknown_tokens, known["en"].unknown) == (0, {})
        (warning,) = (r.message for r in caplog.records if "lacks 1." in r.message)
        assert "train.de: the vocabulary lacks" in warning
        assert "2 × U+2603 ☃, 1 × U+732B 猫" in warning
        assert "train.en: the vocabulary lacks nothing" in caplog.text
        inspect(recipe.shards, samples=0, seed=1)
        assert "train.de: the vocabulary lacks 1." in capsys.readouterr().out
        return made

    whole = counted()
    weighted = "[{name: train, source: train.de, target: train.en, weight: 2}]"
    limit = {"data.max_tokens_per_side": "9", "data.pairs_per_piece": "7"}
    other = counted(**{"data.train": weighted, **limit})
    assert other.corpora[0].too_long > 0
    assert other.corpora[0].pairs != whole.corpora[0].pairs


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


def missing(folder: Path) -> None:
    """There is nothing."""


def nothing_in_it(folder: Path) -> None:
    folder.mkdir()


def a_classifier(folder: Path) -> None:
    folder.mkdir()
    settings = ClassifierSettings(
        format="onnx",
        model=VisionConfig(),
        channels=1,
        image_size=8,
        stored_size=8,
        classes=["a", "b"],
    )  # fmt: skip
    write_settings(folder, settings)


def text(folder: Path) -> None:
    folder.write_text("Das ist der Satz 1.\n")


def an_empty_file(folder: Path) -> None:
    folder.touch()


def half_a_model(folder: Path) -> None:
    whole = trained()
    folder.write_bytes(whole[: len(whole) // 2])


def other_ids(folder: Path) -> None:
    """SentencePiece's own, without padding."""
    folder.write_bytes(trained(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))


def other_symbols(folder: Path) -> None:
    folder.write_bytes(trained(("<BT>", "<2de>")))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (missing, r"data.vocabulary.from: .*taken: no such file or folder; name an export, a run"),
        (nothing_in_it, r"taken: no vocabulary there: neither an export nor a run of translation"),
        (a_classifier, "taken: a model for classification, which has no vocabulary"),
        (text, r"taken: cannot read the vocabulary: .*could not parse"),
        (an_empty_file, r"taken: cannot read the vocabulary: .*unk is not defined"),
        (half_a_model, "taken: cannot read the vocabulary"),
        (other_ids, r"taken: .*have ids \(-1, 0, 1, 2\) .*they must be 0, 1, 2 and 3"),
        (other_symbols, r"taken has no <KD> \(data.vocabulary.user_defined.*cannot be added"),
    ],
)
def test_what_cannot_be_taken(corpus: Path, place: Callable[[Path], None], said: str) -> None:
    place(corpus / "taken")
    symbols = {"data.vocabulary.user_defined_symbols": "[<BT>, <KD>]"}
    recipe = taking(corpus, corpus / "taken", **symbols)
    with pytest.raises(DataError, match=said):
        take(recipe)
    assert not (recipe.run_dir / "vocabulary").exists()
    (corpus / "good.model").write_bytes(trained(("<BT>", "<KD>")))
    take(taking(corpus, corpus / "good.model", **symbols))  # in its stead


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ("from: x, size: 60", r":8: `data.vocabulary`: size says how to train a vocabulary, and"),
        ("from: x, type: bpe", "type says how to train"),
        ("from: x, byte_fallback: false", "byte_fallback says how to train"),
        ("from: 3", "`data.vocabulary.from`: expected a path, or a list of two, not 3"),
        ("from: [a]", r"expected a path, or a list of two, not \['a'\]"),
        ("from: [a, 1], joint: false", "expected a path, or a list of two"),
        ("from: ''", "`data.vocabulary.from`: must not be empty"),
        ("taken_from: x", "unknown key `data.vocabulary.taken_from`"),
    ],
)
def test_keys_that_do_not_fit(corpus: Path, vocabulary: str, said: str) -> None:
    path = corpus / "recipe.yaml"
    path.write_text(path.read_text().replace("size: 60", vocabulary))
    with pytest.raises(UsageError, match=said):
        load_recipe(path)
