"""What a vocabulary loses of text, and test sets that must not be in the training text."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import prepare as stages
from data_prep.files import DataError
from data_prep.identity import check_test_sets
from data_prep.inspect import inspect
from data_prep.shards import ShardsManifest
from data_prep.vocabulary import load_vocabulary, lost_by
from pipeline.evaluation.test_sets import held_out_of
from pipeline.translation_recipe import TranslationRecipe
from tests.data_prep.test_prepare import GOOD, corpus, recipe_of, write_corpus

__all__ = ["corpus"]  # the fixture

SPECIAL = "，！…²™½ﬁ№Å"


def prepare(recipe: TranslationRecipe, *, trained: bool = False) -> ShardsManifest:
    return stages.prepare(recipe.data, recipe.run_dir, held_out_of(recipe), trained=trained)


# ── What a vocabulary loses ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("overrides", "lost"),
    [
        ({}, {}),
        ({"data__vocabulary__normalization": "nmt_nfkc"}, dict.fromkeys("，！…²™½ﬁ№", 1)),
        ({"data__vocabulary__normalization": "nfkc"}, dict.fromkeys("，！…²™½ﬁ№", 1)),
    ],
)
def test_what_references_lose(
    corpus: Path,
    overrides: dict[str, str],
    lost: dict[str, int],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_corpus(
        corpus / "data", "train", [*GOOD, *[(SPECIAL, f"{SPECIAL} {i}") for i in range(9)]]
    )
    write_corpus(corpus / "data", "test", [("Satz.", f"This\u00a0is  sentence. {SPECIAL}")])
    recipe = recipe_of(corpus, data__vocabulary__size="100", **overrides)
    found = prepare(recipe).lost["test.en"]
    assert (found.lines, found.characters) == (len(lost) and 1, lost)
    assert ("cannot write 1 of the 1 lines of test.en" in caplog.text) == bool(lost)
    assert ("1 × U+2122 ™" in caplog.text) == bool(lost)
    inspect(recipe.shards, samples=0, seed=1)
    assert ("test.en: 1 lines" in capsys.readouterr().out) == bool(lost)


def test_unknown_characters_are_lost_unless_spelled_in_bytes(corpus: Path) -> None:
    line = "This is 猫 ▁, e\u0301\u200b."
    write_corpus(corpus / "data", "test", [(line, line)])
    manifest = prepare(recipe_of(corpus, data__vocabulary__size="80"))
    assert manifest.lost["test.en"].characters.keys() >= set("猫▁\u0301\u200b")
    assert "\u200b" not in manifest.lost["test.de"].characters  # translation removes it
    recipe = recipe_of(corpus, data__vocabulary__size="400", data__vocabulary__byte_fallback="true")
    # SentencePiece's own mark of a space is the one character that no vocabulary can give back.
    assert prepare(recipe).lost["test.en"].characters == {"▁": 1}
    vocabulary = load_vocabulary(recipe.shards / "spm.model")
    anything = [chr(code) for code in range(0x21, 0x3000) if chr(code).strip() and code != 0x2581]
    assert lost_by(vocabulary, [f"a{each}b {each}" for each in anything]).lines == 0


# ── Test sets that must not be in the training text ─────────────────────────────────────────────


def with_test_sets(folder: Path, *names: str) -> TranslationRecipe:
    entries = (f"{{name: {n}, source: {n}.de, references: [{n}.en, {n}.b.en]}}" for n in names)
    return recipe_of(folder, evaluation__test_sets=f"[{', '.join(entries)}]")


def write_test_set(folder: Path, name: str, pairs: list[tuple[str, str]], second: str) -> None:
    write_corpus(folder / "data", name, pairs)
    (folder / "data" / f"{name}.b.en").write_text(f"{second}\n" * len(pairs))


def redone(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [m.split(":")[0] for m in caplog.messages if ": done in" in m]
    caplog.clear()
    return said


def test_all_test_sets_are_kept_out_of_the_training_text(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_test_set(corpus, "a", [(f"  {GOOD[0][0]}\u200b", "Else.")], GOOD[1][1])
    recipe = with_test_sets(corpus, "a", "gone")
    manifest = prepare(recipe)
    assert manifest.corpora[0].dropped["test_overlap"] == 2  # a source, a second reference
    assert "test set gone is not at hand" in caplog.text
    check_test_sets(held_out_of(recipe), recipe.run_dir, trained=False)
    redone(caplog)

    # One that goes redoes nothing, nor does one that arrives when a model has learnt from the text.
    write_test_set(corpus, "gone", [GOOD[2]], "Else.")
    (corpus / "data" / "a.en").rename(corpus / "a.en")
    assert prepare(recipe, trained=True) == manifest
    assert "was not compared with gone, which came later" in caplog.text
    check_test_sets(held_out_of(recipe), recipe.run_dir, trained=True)
    assert redone(caplog) == []
    with pytest.raises(DataError, match=r"test set gone was not at hand when .*`./run.sh prepare`"):
        check_test_sets(held_out_of(recipe), recipe.run_dir, trained=False)
    (corpus / "a.en").rename(corpus / "data" / "a.en")
    manifest = prepare(recipe)
    assert manifest.corpora[0].dropped["test_overlap"] == 3
    assert redone(caplog) == ["clean", "vocabulary", "shards"]
    check_test_sets(held_out_of(recipe), recipe.run_dir, trained=False)

    # A new one is named. It changes the shards only if the training text had some of it.
    write_test_set(corpus, "new", [("Neu.", "New.")], "Else.")
    more = with_test_sets(corpus, "a", "gone", "new")
    with pytest.raises(DataError, match=r"set new was not among evaluation.*`./run.sh prepare`"):
        check_test_sets(held_out_of(more), more.run_dir, trained=False)
    assert prepare(more) == manifest
    check_test_sets(held_out_of(more), more.run_dir, trained=False)
    assert redone(caplog) == ["clean"]

    write_test_set(corpus, "new", [GOOD[3]], "Else.")
    with pytest.raises(DataError, match="test set new was another"):
        check_test_sets(held_out_of(more), more.run_dir, trained=False)
    assert prepare(more).corpora[0].dropped["test_overlap"] == 4
    assert redone(caplog) == ["clean", "vocabulary", "shards"]
