"""Prepared data say what they were made from; what a recipe says otherwise is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.files import DataError
from data_prep.identity import check_corpora
from pipeline.translation_recipe import TranslationRecipe
from tests.data_prep.test_prepare import GOOD, corpus, prepare, recipe_of, write_corpus

__all__ = ["corpus"]  # the fixture

ONE = "[{name: train, source: train.de, target: train.en}]"


def check(folder: Path, **overrides: str) -> None:
    recipe = recipe_of(folder, **overrides)
    check_corpora(recipe.data, recipe.run_dir)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.vocabulary.size", "70", "data.vocabulary.size 60, the recipe says 70"),
        ("data.vocabulary.type", "unigram", "data.vocabulary.type 'bpe', the recipe says"),
        ("data.max_tokens_per_side", "9", "data.max_tokens_per_side 256, the recipe says 9"),
        ("data.source_lang", "nl", "data.source_lang 'de', the recipe says 'nl'"),
        ("data.seed", "2", "data.seed 1, the recipe says 2"),
        ("data.test.source", "gone.de", "data.test.source 'test.de', the recipe says 'gone.de'"),
        ("data.test.name", "other", "data.test.name 'test', the recipe says 'other'"),
        ("data.valid.target", "x.en", "data.valid.target 'valid.en', the recipe says 'x.en'"),
        ("data.train", ONE.replace("}", ", weight: 2}"), "data.train.0.weight 1"),
        ("data.train", f"{ONE[:-1]}, {{name: b, source: b.de, target: b.en}}]", "data.train ["),
        ("data.cleaning.filters", "[{filter: duplicates}]", "data.cleaning.filters ["),
        ("data.pairs_per_shard", "7", "data.pairs_per_shard 250000, the recipe says 7"),
        ("data.toy_corpus.train", "7", "data.toy_corpus None, the recipe says {"),
    ],
)
def test_a_key_that_says_otherwise(corpus: Path, key: str, value: str, said: str) -> None:
    prepare(recipe_of(corpus))
    check(corpus)
    with pytest.raises(DataError) as error:
        check(corpus, **{key.replace(".", "__"): value})
    assert said in str(error.value)
    assert "./run.sh prepare" in str(error.value)


@pytest.mark.parametrize("name", ["train.de", "train.en", "valid.en", "test.de"])
def test_a_file_that_has_changed(corpus: Path, name: str) -> None:
    prepare(recipe_of(corpus))
    path = corpus / "data" / name
    path.write_text(path.read_text().upper())
    with pytest.raises(DataError, match=f"{name} has changed since"):
        check(corpus)
    prepare(recipe_of(corpus))
    check(corpus)


def test_where_files_lie_is_no_part_of_what_they_are(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Moved or copied files redo nothing; absent ones cannot have changed."""
    prepare(recipe_of(corpus))
    (corpus / "data").rename(corpus / "elsewhere")
    check(corpus)
    caplog.set_level("INFO")
    prepare(recipe_of(corpus, data__root=f"{corpus}/elsewhere"))
    stages = [m for m in caplog.messages if "up to date, reused" in m]
    assert len(stages) == 4
    shutil.copytree(corpus / "elsewhere", corpus / "copied")  # with the times of now
    for path in (corpus / "copied").iterdir():
        path.touch()
    check(corpus, data__root=f"{corpus}/copied", data__workers="2")


def test_pieces_are_read_where_the_files_are_now(corpus: Path) -> None:
    """A later stage that is redone after a move finds them."""
    prepare(recipe_of(corpus))
    (corpus / "data").rename(corpus / "elsewhere")
    moved = {"data__root": f"{corpus}/elsewhere"}
    manifest = prepare(recipe_of(corpus, **moved, data__cleaning__filters="[{filter: digits}]"))
    assert manifest.totals["train"].pairs == len(GOOD)


def fails_after_cleaning(recipe: TranslationRecipe) -> None:
    size = recipe.data.vocabulary.model_copy(update={"size": 60_000})
    data = recipe.data.model_copy(update={"vocabulary": size})
    with pytest.raises(DataError, match="cannot make that vocabulary"):
        prepare(recipe.model_copy(update={"data": data}))


def test_text_that_the_shards_were_not_made_from_is_refused(corpus: Path) -> None:
    """Two preparations end after cleaning: with another test set, and with a file that is put right
    again afterwards."""
    recipe = recipe_of(corpus)
    prepare(recipe)
    write_corpus(corpus / "data", "other", [("Gute Nacht.", "Good night.")])
    others = {"data__test__source": "other.de", "data__test__target": "other.en"}
    fails_after_cleaning(recipe_of(corpus, **others))
    with pytest.raises(DataError, match=r"were not made from the text in .*clean; `./run.sh prep"):
        check(corpus)
    with pytest.raises(DataError, match=r"data\.test\.source"):
        check(corpus, **others)
    prepare(recipe)
    check(corpus)

    path = corpus / "data" / "test.en"
    right = path.read_text()
    path.write_text(right.upper())
    fails_after_cleaning(recipe)
    path.write_text(right)
    with pytest.raises(DataError, match="were not made from the text"):
        check(corpus)
    shutil.rmtree(recipe.clean_text)  # what is absent cannot be wrong
    check(corpus)
