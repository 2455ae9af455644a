"""What becomes of a line of text before anything else looks at it, in training and translation;
and the token ids that are no text.

This file needs the standard library alone, so that it can be copied to where a model is served.
"""

from __future__ import annotations

import re
import unicodedata

PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX = 0, 1, 2, 3  # of every vocabulary

_INVISIBLE = re.compile(r"[\u0000-\u0008\u000b\u000e-\u001f\u007f-\u009f\u200b\u2060\ufeff\ufffd]")


def normalise(text: str) -> str:
    """Return text in Unicode NFC, without control characters, with single spaces."""
    return normalise_lines(text.replace("\n", " "))[0]


def normalise_lines(text: str) -> list[str]:
    """Return the lines of a text, each as `normalise` returns it. Only LF ends a line."""
    visible = _INVISIBLE.sub(" ", unicodedata.normalize("NFC", text))
    return [" ".join(line.split()) for line in visible.split("\n")]
