"""What becomes of a line of text before anything else looks at it, in training and translation,
and where it is cut if it is too long; and the token ids that are no text.

This file needs the standard library alone, so that it can be copied to where a model is served.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX = 0, 1, 2, 3  # of every vocabulary

JOINT, SEPARATE = ("spm.model",), ("spm.source.model", "spm.target.model")
"""Files of a vocabulary of both sides, and of one for each."""

SOURCE_WORDS = "source_words.txt"
"""A file beside a vocabulary that was made from a text of few different words: these words."""

# Thai to Lao, Burmese, Khmer, kana, Han: written without spaces, so that a character is the word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_INVISIBLE = re.compile(r"[\u0000-\u0008\u000b\u000e-\u001f\u007f-\u009f\u200b\u2060\ufeff\ufffd]")
# Where a line may be cut, the best kind of place first. Without any it is cut in its middle.
BREAKS = [
    re.compile(r"[.!?…]['\"”“»«’)\]]*\s+|[。！？]+"),  # a sentence ends
    re.compile(r"[,;:)–—]\s+|[、，；：]"),
    re.compile(r"\s+"),
]


def vocabulary_files(folder: Path) -> list[Path]:
    """Return the path of a joint `spm.model`, or of `spm.source.model` and `spm.target.model`."""
    joint, separate = ([folder / name for name in names] for names in (JOINT, SEPARATE))
    return separate if separate[0].exists() and not joint[0].exists() else joint


def normalise(text: str) -> str:
    """Return text in Unicode NFC, without control characters, with single spaces."""
    return normalise_lines(text.replace("\n", " "))[0]


def normalise_lines(text: str) -> list[str]:
    """Return the lines of a text, each as `normalise` returns it. Only LF ends a line."""
    lines = visible(unicodedata.normalize("NFC", text)).split("\n")
    return [" ".join(line.split()) for line in lines]


def visible(text: str) -> str:
    """Return a text with spaces in the place of characters that nobody sees."""
    return _INVISIBLE.sub(" ", text)


def words_of(text: str) -> list[str]:
    """Return the words of a text, numbers and punctuation marks among them."""
    return _WORD.findall(text)


def seen_words(folder: Path) -> frozenset[str] | None:
    """Return the words that are beside the vocabulary in a folder, if any are."""
    path = folder / SOURCE_WORDS
    if not path.is_file():
        return None
    return frozenset(path.read_text(encoding="utf-8", errors="replace").split())


def unseen_words(sentences: Iterable[str], seen: frozenset[str] | None) -> list[str]:
    """Return the words that are not among those seen, in their order, each once.

    :param seen: None: there are too many to tell, and so none is returned.
    """
    if seen is None:
        return []
    words = dict.fromkeys(word for text in sentences for word in words_of(normalise(text)))
    # What is in the middle of a sentence can begin one.
    return [w for w in words if w not in seen and w[0].lower() + w[1:] not in seen]


def split_to_fit(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut `text` in two, and the parts again, until every part fits.

    The cut is at the end of a sentence; without one after a comma or the like; without one at a
    space; without one in the middle. Of several places the one nearest to the middle is taken.
    """
    text = text.strip()
    if len(text) < 2 or fits(text):
        return [text]
    middle = cut = len(text) // 2
    for pattern in BREAKS:
        places = [match.end() for match in pattern.finditer(text) if match.end() < len(text)]
        if places:
            cut = min(places, key=lambda place: abs(place - middle))
            break
    return [*split_to_fit(text[:cut], fits), *split_to_fit(text[cut:], fits)]
