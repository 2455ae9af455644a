"""Each filter is tried on pairs that it must keep and pairs that it must drop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import CleaningConfig
from data_prep.files import DataError
from data_prep.filters import Language
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe

QUICKSTART = Path("recipes/quickstart.yaml")

KEPT_AND_DROPPED: list[tuple[dict[str, Any], list[tuple[str, str]], list[tuple[str, str]]]] = [
    ({"filter": "empty_side"}, [("a", "b")], [("", "b"), ("a", "")]),
    (
        {"filter": "length", "min_chars": 3, "max_chars": 5},
        [("drei", "three")],
        [("ja", "yes"), ("drei", "thirteen")],
    ),
    (
        {"filter": "length_ratio", "max": 2},
        [("x" * 40, "y" * 80), ("kurz", "y" * 40)],
        [("x" * 40, "y" * 81), ("kurz", "y" * 41)],
    ),
    ({"filter": "identical_sides"}, [("a", "b")], [("a", "a")]),
    (
        {"filter": "letters", "min_share": 0.5},
        [("ab 12", "a b c !!!"), ("Жук 12", "né é 1"), ("हिन्दी", "Hindi")],
        [("ab 123", "abc"), ("abc", "... a"), ("ü 1 2", "you")],
    ),
    (
        {"filter": "digits", "max_share": 0.5},
        [("ab 12", "cd 34"), ("", "x")],
        [("ab 123", "abc"), ("a", "2 0 1 b")],
    ),
    (
        {"filter": "repeated_characters", "max_run": 3},
        [("Nein!!!", "No..."), ("a    b", "c")],
        [("Nein!!!!", "No"), ("Ja", "aaaa")],
    ),
    (
        {"filter": "repetition", "min_chars": 4, "max": 2},
        [("und dann und dann kam er", "ha ha"), ("", "no no")],
        [("und dann und dann und dann", "and"), ("er", "he said he said he said so")],
    ),
    (
        {"filter": "script", "source": "Latin", "target": "Cyrillic", "min_share": 0.9},
        [
            ("Größe 17 µm", "размер 17"),
            ("123", "456"),
            ("abcdefghi ж", "х"),
            ("a", "жжжжжжжжжжж x"),
        ],
        [("größe", "size"), ("размер", "размер"), ("a", "жжжж x")],
    ),
]


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    KEPT_AND_DROPPED,
    ids=[c[0]["filter"] for c in KEPT_AND_DROPPED],
)
def test_filters(
    settings: dict[str, Any], kept: list[tuple[str, str]], dropped: list[tuple[str, str]]
) -> None:
    (filter_,) = CleaningConfig.model_validate({"filters": [settings]}).filters
    drops: Callable[[str, str], bool] = filter_.drops  # type: ignore[union-attr]
    assert [drops(*pair) for pair in kept] == [False] * len(kept)
    assert [drops(*pair) for pair in dropped] == [True] * len(dropped)


def test_languages() -> None:
    drops = Language().drops_between("de", "en")
    german, english = "Der Ausschuss hat das gestern beschlossen.", "The committee decided so."
    french = "La commission en a décidé ainsi hier soir."
    assert not drops(german, english)
    assert drops(english, german)
    assert drops(german, french)
    assert not drops("Ja.", "Oui.")  # too short to say


def test_languages_of_real_text(shared: Path) -> None:
    drops = Language().drops_between("de", "en")
    sides = [
        (shared / "data" / "newstest" / f"newstest2013.{lang}").read_text().split("\n")[:-1]
        for lang in ("de", "en")
    ]
    pairs = list(zip(*sides, strict=True))[:500]
    assert sum(drops(*pair) for pair in pairs) <= 10
    assert sum(drops(target, source) for source, target in pairs) >= 480


def test_an_unknown_language() -> None:
    with pytest.raises(DataError, match="py3langid does not know `xx`"):
        Language().drops_between("de", "xx")


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("[{filter: lenght}]", "lenght"),
        ("[{filter: length, max_words: 3}]", "max_words"),
        ("[{filter: length}, {filter: length}]", "each filter can be named once"),
        ("[{filter: duplicates}, {filter: length}]", "must come after all others"),
        ("[{filter: script, source: Lattin}]", "'Lattin' is not a Unicode script"),
        ("[{filter: letters, min_share: 2}]", "less than or equal to 1"),
    ],
)
def test_filters_that_cannot_be(filters: str, expected: str) -> None:
    with pytest.raises(UsageError, match=r"data\.cleaning") as caught:
        load_recipe(QUICKSTART, [("data.cleaning.filters", filters)])
    assert expected in str(caught.value)
