"""A lexical shortlist: which target tokens a translation may have, from the tokens of its source.

The projection to the whole vocabulary is most of what a step of decoding one sentence costs; to a
few hundred tokens it is next to nothing. The file is CTranslate2's vocabulary map: a line for each
source token, which names it, a tab, and the target tokens that it allows, with spaces between. The
first line names no source token: what stands there is always allowed.

    \t</s> . , the …
    ▁Hund\t▁dog ▁dogs ▁Hund …

This file needs NumPy and `models/export_format.py` alone, so that both can be copied to where a
model is served. `pipeline/publishing/shortlist.py` makes the shortlist of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.export_format import SHORTLIST

TokenIds = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shortlist:
    """The shortlist holds the target tokens that source tokens allow."""

    always: TokenIds
    """Target ids that every sentence may have."""

    of_token: Sequence[TokenIds]
    """For each source id the target ids that it allows besides."""

    def allowed(self, source: Sequence[int] | TokenIds) -> TokenIds:
        """Return the target ids that a sentence may have, ascending, each once.

        :param source: token ids of the sentence.
        """
        return np.unique(np.concatenate([self.always, *(self.of_token[token] for token in source)]))

    def to_text(self, source: Sequence[str], target: Sequence[str]) -> str:
        """Return the content of `vmap.txt`.

        It leaves out tokens with white space in them: symbols of a recipe, which no text is
        encoded to.

        :param source: the tokens of the source vocabulary as text, by id.
        :param target: those of the target vocabulary.
        """
        lines = []
        lists = chain([self.always], self.of_token)
        for key, ids in zip(chain([""], source), lists, strict=True):
            tokens = [target[number] for number in ids if len(target[number].split()) == 1]
            if tokens and len(key.split()) == (key != ""):
                lines.append(f"{key}\t{' '.join(tokens)}\n")
        return "".join(lines)


def read_shortlist(folder: Path, source: Sequence[str], target: Sequence[str]) -> Shortlist:
    """Read the shortlist in the folder of an export.

    :param source: the tokens of the source vocabulary as text, by id.
    :param target: those of the target vocabulary.
    :raises OSError: there is none.
    :raises ValueError: it is not UTF-8, or no shortlist of these vocabularies.
    """
    path = folder / SHORTLIST
    ids = {token: number for number, token in enumerate(target)}
    lists: dict[str, TokenIds] = {}
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            key, _, tokens = line.rstrip("\n").partition("\t")
            try:
                lists[key] = np.array([ids[token] for token in tokens.split(" ")], np.int32)
            except KeyError as error:
                raise ValueError(f"{path}:{number}: {error} is not in the vocabulary") from error
    nothing = np.empty(0, np.int32)
    if unknown := lists.keys() - set(source) - {""}:
        raise ValueError(f"{path}: {min(unknown)} is not in the vocabulary")
    return Shortlist(lists.get("", nothing), [lists.get(token, nothing) for token in source])
