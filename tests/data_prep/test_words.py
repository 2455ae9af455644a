"""Words that a model was never trained on, in any script."""

from __future__ import annotations

import pytest

from data_prep.text import unseen_words, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Er sagt: „12 Äpfel“.", ["Er", "sagt", ":", "„", "12", "Äpfel", "“", "."]),
        ("猫がいる。A社", ["猫", "が", "い", "る", "。", "A", "社"]),  # without spaces: characters
    ],
)
def test_words_and_marks(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_what_begins_a_sentence_is_seen_in_the_middle_of_one() -> None:
    seen = frozenset(words_of("heute Anna ."))
    assert unseen_words(["Heute singt Anna.", "anna singt"], seen) == ["singt", "anna"]
    assert unseen_words(["Heute"], None) == []
