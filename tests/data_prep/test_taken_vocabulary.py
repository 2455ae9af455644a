"""A vocabulary that is taken from an export, a run or a file, and what it does not know."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from data_prep.files import DataError, sha256_of
from data_prep.inspect import inspect
from data_prep.taken_vocabulary import check_taken_vocabulary, vocabulary_sizes
from data_prep.vocabulary import Unknown, load_vocabulary
from models.export_format import ClassifierSettings, ExportSettings, write_settings
from pipeline.command_line import load_recipe
from pipeline.recipe import UsageError
from pipeline.translation_recipe import TranslationRecipe
from tests.data_prep.test_prepare import GOOD, corpus, prepare, recipe_of, write_corpus

__all__ = ["corpus"]  # the fixture

SEPARATE = {
    "data__vocabulary__joint": "false",
    "data__vocabulary__size": "40",
    "model__tied_embeddings": "false",
}


def taking(folder: Path, taken: object, **overrides: str) -> TranslationRecipe:
    """Return a recipe of other text that takes a vocabulary, named on the command line."""
    write_corpus(
        folder / "data", "other", [(f"Ist {i} der Satz?", f"Is {i} it?") for i in range(9)]
    )
    text = (folder / "recipe.yaml").read_text().replace("size: 60", "joint: true")
    path = folder / "taking.yaml"
    path.write_text(
        text.replace("source: train.de", "source: other.de").replace("train.en", "other.en")
    )
    given = {"data.vocabulary.from": str(taken), "run_dir": f"{folder}/taking"}
    given |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe(path, list(given.items()))


def exported(run: TranslationRecipe, folder: Path, source: str = "de", target: str = "en") -> Path:
    """Make a folder with what an export has of a vocabulary."""
    folder.mkdir()
    for path in (run.run_dir / "shards").glob("spm*.model"):
        shutil.copyfile(path, folder / path.name)
    settings = ExportSettings(
        format="safetensors", model={}, evaluation={}, source_lang=source, target_lang=target
    )
    write_settings(folder, settings)
    return folder


def test_it_is_taken_from_a_run_an_export_or_a_file(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the same vocabulary comes from, nothing is done twice."""
    run = recipe_of(corpus)
    trained = prepare(run).vocabulary
    caplog.set_level("INFO")
    export = exported(run, corpus / "export")
    manifest = prepare(taking(corpus, export))
    assert manifest.vocabulary == trained
    assert f"vocabulary: taken from {export}, 60 tokens" in caplog.text
    assert sha256_of(corpus / "taking" / "vocabulary" / "spm.model") == trained.sha256
    backwards = exported(run, corpus / "backwards", source="en", target="de")
    for place in (corpus / "run", export / "spm.model", backwards):
        caplog.clear()
        recipe = taking(corpus, place)
        assert prepare(recipe) == manifest
        assert sum("up to date, reused" in message for message in caplog.messages) == 4
        assert vocabulary_sizes(recipe.data.vocabulary) == (60, 60)
        assert recipe.model_dump(mode="json")["data"]["vocabulary"]["from"] == str(place)
    shutil.rmtree(corpus / "run" / "shards")  # of a run whose preparation was interrupted
    assert prepare(taking(corpus, corpus / "run")) == manifest


def test_another_vocabulary_makes_other_shards(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = recipe_of(corpus)
    prepare(run)
    taken = exported(run, corpus / "export") / "spm.model"
    recipe = taking(corpus, taken)
    before = prepare(recipe)
    check_taken_vocabulary(recipe.data, recipe.shards)
    larger = recipe_of(corpus, data__vocabulary__size="70")
    prepare(larger)
    shutil.copyfile(larger.shards / "spm.model", taken)
    with pytest.raises(DataError, match=r"spm.model has changed since .*`./run.sh prepare`"):
        check_taken_vocabulary(recipe.data, recipe.shards)
    caplog.set_level("INFO")
    assert prepare(recipe).vocabulary.sizes == (70, 70)
    assert "vocabulary: done again: taken changed" in caplog.text
    assert "shards: done again: vocabulary changed" in caplog.text
    check_taken_vocabulary(recipe.data, recipe.shards)
    taken.unlink()
    check_taken_vocabulary(recipe.data, recipe.shards)  # what is absent cannot have changed
    with pytest.raises(DataError, match="from: .*spm.model: no such file"):
        prepare(recipe)
    assert recipe.shards.exists()
    assert before.vocabulary.sizes == (60, 60)


def test_one_for_each_side(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = recipe_of(corpus, **SEPARATE)
    trained = prepare(run).vocabulary
    export = exported(run, corpus / "export")
    apart = {key: value for key, value in SEPARATE.items() if "size" not in key}
    assert prepare(taking(corpus, export, **apart)).vocabulary == trained
    files = [export / "spm.source.model", export / "spm.target.model"]
    caplog.set_level("INFO")
    assert prepare(taking(corpus, f"[{files[0]}, {files[1]}]", **apart)).vocabulary == trained
    assert "vocabulary: up to date, reused" in caplog.text
    with pytest.raises(DataError, match=r"vocabulary for each side, .*joint is true; set it and"):
        prepare(taking(corpus, export))
    with pytest.raises(UsageError, match="names a file for each side, and so joint must be false"):
        taking(corpus, f"[{files[0]}, {files[1]}]")
    with pytest.raises(DataError, match=r"one vocabulary for both sides, .* \[SOURCE, TARGET\]"):
        prepare(taking(corpus, files[0], **apart))
    with pytest.raises(DataError, match="export: not a file; of two paths, each is a file's"):
        prepare(taking(corpus, f"[{files[0]}, {export}]", **apart))

    backwards = exported(run, corpus / "backwards", source="en", target="de")
    with pytest.raises(DataError) as error:
        prepare(taking(corpus, backwards, **apart))
    assert "goes from en to de, and the recipe from de to en" in str(error.value)
    named = str(error.value).partition("name the files: ")[2]
    swapped = prepare(taking(corpus, named, **apart)).vocabulary
    assert swapped.sha256 not in ("", trained.sha256)
    prepare(taking(corpus, exported(run, corpus / "nl", source="nl"), **apart))
    assert "was made for nl and en, and the recipe is for de and en" in caplog.text


# ── What it does not know ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("per_piece", ["100", "3"])
def test_unknown_characters_are_counted(
    corpus: Path,
    per_piece: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Counts are of the text after cleaning, whatever the pieces, the weight and the limit."""
    prepare(recipe_of(corpus))
    strange = [("Das ist 猫☃ der Satz ☃.", "This is it."), *GOOD[:9]]
    recipe = taking(corpus, corpus / "run", data__pairs_per_piece=per_piece)
    weighted = "[{name: other, source: other.de, target: other.en, weight: 2}]"
    for overrides in ({}, {"data.train": weighted, "data.max_tokens_per_side": "20"}):
        write_corpus(corpus / "data", "other", strange)
        recipe = load_recipe(
            corpus / "taking.yaml",
            [
                ("data.vocabulary.from", f"{corpus}/run"),
                ("run_dir", f"{corpus}/taking"),
                ("data.pairs_per_piece", per_piece),
                *overrides.items(),
            ],
        )
        caplog.set_level("INFO")
        (counted,) = prepare(recipe).corpora
        vocabulary = load_vocabulary(recipe.shards / "spm.model")
        lines = [source for source, _ in strange]
        assert counted.unknown["de"] == Unknown(
            characters=sum(map(len, lines)),
            unknown_characters=3,
            tokens=sum(len(ids) + 1 for ids in vocabulary.encode(lines)),
            unknown_tokens=2,  # 猫☃ is one
            unknown={"☃": 2, "猫": 1},
        )
        assert list(counted.unknown["de"].unknown) == ["☃", "猫"]
        assert (counted.unknown["en"].unknown_tokens, counted.unknown["en"].unknown) == (0, {})
    said = "of other.de the vocabulary does not know 1."
    (warning,) = {
        r.message for r in caplog.records if said in r.message and r.levelname == "WARNING"
    }
    assert "2 × U+2603 ☃, 1 × U+732B 猫" in warning
    assert "of other.en the vocabulary does not know nothing" in caplog.text
    inspect(recipe.shards, samples=0, seed=1)
    assert "other.de: the vocabulary does not know" in capsys.readouterr().out


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────


def missing(folder: Path) -> Path:
    return folder / "gone"


def nothing_in_it(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def a_classifier(folder: Path) -> Path:
    place = nothing_in_it(folder)
    settings = ClassifierSettings(
        format="onnx", model={}, channels=1, image_size=8, stored_size=8, classes=["a", "b"]
    )
    write_settings(place, settings)
    return place


def no_model(folder: Path) -> Path:
    return folder / "data" / "train.de"


def half_a_model(folder: Path) -> Path:
    whole = (folder / "run" / "shards" / "spm.model").read_bytes()
    (folder / "half.model").write_bytes(whole[: len(whole) // 2])
    return folder / "half.model"


def other_ids(folder: Path) -> Path:
    """SentencePiece's own, without padding."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source for source, _ in GOOD),
        model_writer=model, model_type="bpe", vocab_size=40, minloglevel=2,
    )  # fmt: skip
    (folder / "own.model").write_bytes(model.getvalue())
    return folder / "own.model"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (missing, r"data.vocabulary.from: .*gone: no such file or folder; name an export, a run"),
        (nothing_in_it, r"empty: no vocabulary there: neither an export nor a run of translation"),
        (a_classifier, "empty: a model for classification, which has no vocabulary"),
        (no_model, r"train.de: cannot read the vocabulary: .*could not parse"),
        (half_a_model, "half.model: cannot read the vocabulary"),
        (other_ids, r"own.model: .*have ids \(-1, 0, 1, 2\) .*they must be 0, 1, 2 and 3"),
    ],
)
def test_what_cannot_be_taken(corpus: Path, place: Callable[[Path], Path], said: str) -> None:
    prepare(recipe_of(corpus))
    recipe = taking(corpus, place(corpus))
    with pytest.raises(DataError, match=said):
        prepare(recipe)
    assert not (recipe.run_dir / "vocabulary").exists()
    prepare(taking(corpus, corpus / "run"))  # in its stead


def test_symbols_that_it_has_and_lacks(corpus: Path) -> None:
    symbols = {"data__vocabulary__user_defined_symbols": "[<BT>, <2de>]"}
    prepare(recipe_of(corpus, **symbols))
    prepare(taking(corpus, corpus / "run", **symbols))
    more = {"data__vocabulary__user_defined_symbols": "[<BT>, <KD>]"}
    with pytest.raises(DataError, match=r"spm.model has no <KD> \(.*cannot be added"):
        prepare(taking(corpus, corpus / "run", **more))


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
