"""The filters that a recipe can name: what each drops, and its settings.

A filter sees normalised text (`data_prep.text.normalise`). Its method `drops` returns whether to
drop a pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, PositiveInt
from pydantic import Field as Limit

from data_prep.files import DataError
from data_prep.section import Section

SHORT_SIDE = 20  # characters; below it a length ratio says little
LONGEST_REPEATED = 100  # characters

Share = Annotated[float, Limit(ge=0, le=1)]


class EmptySide(Section):
    """Drop a pair with an empty side."""

    filter: Literal["empty_side"] = "empty_side"

    def drops(self, source: str, target: str) -> bool:
        return not source or not target


class Length(Section):
    """Drop a pair with a side too short or too long."""

    filter: Literal["length"] = "length"

    min_chars: PositiveInt = 1
    """Fewest characters of a side."""

    max_chars: PositiveInt = 1000
    """Most characters of a side."""

    def drops(self, source: str, target: str) -> bool:
        shorter, longer = sorted((len(source), len(target)))
        return shorter < self.min_chars or longer > self.max_chars


class LengthRatio(Section):
    """Drop a pair whose sides differ too much in length."""

    filter: Literal["length_ratio"] = "length_ratio"

    max: float = Limit(default=4.0, gt=1)
    """Most times the characters of the other side (sides under 20 characters count as 20)."""

    def drops(self, source: str, target: str) -> bool:
        shorter, longer = sorted((max(len(source), SHORT_SIDE), max(len(target), SHORT_SIDE)))
        return longer > self.max * shorter


class IdenticalSides(Section):
    """Drop a pair whose sides are the same text."""

    filter: Literal["identical_sides"] = "identical_sides"

    def drops(self, source: str, target: str) -> bool:
        return source == target


class Letters(Section):
    """Drop a pair with a side that is mostly not letters."""

    filter: Literal["letters"] = "letters"

    min_share: Share = 0.5
    """Least share of letters (and the marks on them) among the characters other than spaces."""

    def drops(self, source: str, target: str) -> bool:
        return any(self._share(side) < self.min_share for side in (source, target))

    @staticmethod
    def _share(text: str) -> float:
        characters = len(text) - text.count(" ")
        return _count_letters(text) / characters if characters else 0.0


class Digits(Section):
    """Drop a pair with a side that is mostly numbers."""

    filter: Literal["digits"] = "digits"

    max_share: Share = 0.5
    """Largest share of digits among the characters other than spaces."""

    def drops(self, source: str, target: str) -> bool:
        return any(
            sum(map(str.isdigit, side)) > self.max_share * (len(side) - side.count(" "))
            for side in (source, target)
        )


class RepeatedCharacters(Section):
    """Drop a pair with one character many times in a row (-----, !!!!!, .....)."""

    filter: Literal["repeated_characters"] = "repeated_characters"

    max_run: PositiveInt = 9
    """Longest run of one character other than a space."""

    def drops(self, source: str, target: str) -> bool:
        pattern = _runs_over(self.max_run)
        return bool(pattern.search(source) or pattern.search(target))


class Repetition(Section):
    """Drop a pair with a side that says the same over and over, as a model does that loops."""

    filter: Literal["repetition"] = "repetition"

    min_chars: PositiveInt = 4
    """Fewest characters of what is repeated; the most are 100."""

    max: PositiveInt = 2
    """Most times that it stands in a row, spaces between not counted."""

    def drops(self, source: str, target: str) -> bool:
        pattern = _repeated_over(self.min_chars, self.max)
        return bool(pattern.search(source) or pattern.search(target))


class Script(Section):
    """Drop a pair with a side in another script."""

    filter: Literal["script"] = "script"

    source: str = "Latin"
    """Unicode script of the source language."""

    target: str = "Latin"
    """Unicode script of the target language."""

    min_share: Share = 0.9
    """Least share of the letters of a side that are of its script (no letters pass)."""

    def model_post_init(self, context: object) -> None:
        for name in (self.source, self.target):
            try:
                _other_letters(name)
            except regex.error as error:
                raise ValueError(
                    f"{name!r} is not a Unicode script such as Latin or Han"
                ) from error

    def drops(self, source: str, target: str) -> bool:
        return self._foreign(source, self.source) or self._foreign(target, self.target)

    def _foreign(self, text: str, script: str) -> bool:
        if script == "Latin" and text.isascii():
            return False
        letters = _NOT_LETTERS.sub("", text)
        foreign = len(_other_letters(script).findall(letters))
        return len(letters) - foreign < self.min_share * len(letters)


class Language(Section):
    """Drop a pair with a side in another language, by py3langid (in `.venv`, else the extra
    `langid`; 3,000 to 10,000 pairs/s on a core: name it after the cheap filters)."""

    filter: Literal["language"] = "language"

    min_letters: PositiveInt = 15
    """Sides with fewer pass: they say too little."""

    min_probability: Share = 0.05
    """Least probability of the side's language where another is more probable. A low one loses
    almost no good text and still finds most of the bad."""

    def drops_between(self, source_lang: str, target_lang: str) -> Callable[[str, str], bool]:
        """Return a function that says whether to drop a pair of these languages.

        :raises DataError: py3langid is not installed, or does not know a language.
        """
        identifier = _language_identifier()
        for lang in (source_lang, target_lang):
            if lang not in identifier.labels:
                raise DataError(f"filter language: py3langid does not know `{lang}` (ISO 639-1)")

        def speaks(text: str, lang: str) -> bool:
            if sum(map(str.isalpha, text)) < self.min_letters:
                return True
            start = text[:200]  # more takes longer and tells no more
            if identifier.classify(start)[0] == lang:
                return True
            return bool(dict(identifier.rank(start))[lang] >= self.min_probability)

        return lambda s, t: not (speaks(s, source_lang) and speaks(t, target_lang))


class TestOverlap(Section):
    """Drop a pair either side of which is a sentence of the validation or a test set."""

    filter: Literal["test_overlap"] = "test_overlap"


class Duplicates(Section):
    """Drop a pair seen before, in any corpus."""

    filter: Literal["duplicates"] = "duplicates"


class RepeatedSide(Section):
    """Drop a pair one side of which many pairs before have, in any corpus."""

    filter: Literal["repeated_side"] = "repeated_side"

    max: PositiveInt = 10
    """Most pairs that share a source sentence, and most that share a target sentence."""


OverAllCorpora = (Duplicates, RepeatedSide)

Filter = Annotated[
    EmptySide
    | Length
    | LengthRatio
    | IdenticalSides
    | Letters
    | Digits
    | RepeatedCharacters
    | Repetition
    | Script
    | Language
    | TestOverlap
    | Duplicates
    | RepeatedSide,
    Limit(discriminator="filter"),
]


def _named_once(filters: tuple[Filter, ...]) -> tuple[Filter, ...]:
    names = [each.filter for each in filters]
    if len(set(names)) < len(names):
        raise ValueError("each filter can be named once")
    return filters


Filters = Annotated[tuple[Filter, ...], AfterValidator(_named_once)]
"""Filters in the order in which they are applied."""

DEFAULT_FILTERS: tuple[Filter, ...] = (
    EmptySide(),
    Length(),
    LengthRatio(),
    IdenticalSides(),
    TestOverlap(),
    Duplicates(),
)

SYNTHETIC_FILTERS: tuple[Filter, ...] = (
    EmptySide(),
    IdenticalSides(),
    LengthRatio(),
    Repetition(),
)

_NOT_LETTERS = regex.compile(r"[^\p{L}\p{M}]+")
_NOT_LETTERS_IN_ASCII = bytes(code for code in range(128) if not chr(code).isalpha())


def _count_letters(text: str) -> int:
    """Return the number of letters and of the marks on them."""
    if text.isascii():  # five times as fast
        return len(text.encode().translate(None, _NOT_LETTERS_IN_ASCII))
    return len(_NOT_LETTERS.sub("", text))


@cache
def _runs_over(length: int) -> re.Pattern[str]:
    return re.compile(r"(\S)" + r"\1" * length)


@cache
def _repeated_over(min_chars: int, times: int) -> re.Pattern[str]:
    longest = max(min_chars, LONGEST_REPEATED)
    return re.compile(rf"(\S.{{{min_chars - 1},{longest - 1}}}?)(?: ?\1){{{times}}}")


@cache
def _other_letters(script: str) -> regex.Pattern[str]:
    return regex.compile(rf"[^\p{{Script={script}}}\p{{Script=Common}}\p{{Script=Inherited}}]")


@cache
def _language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            "filter language needs the extra `langid`: pip install -e '.[langid]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
