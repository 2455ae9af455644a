"""A lexical shortlist: which target tokens a translation may have, from the tokens of its source.

The projection to the whole vocabulary is most of what a step of decoding one sentence costs; to a
few hundred tokens it is next to nothing. CTranslate2 has it as a vocabulary map: a line for each
source token, which names it, a tab, and the target tokens that it allows, with spaces between. The
first line names no source token: what stands there is always allowed.

    \t</s> . , the …
    ▁Hund\t▁dog ▁dogs ▁Hund …

An ONNX export has the same as arrays of ids, which are read in a moment.

This file needs NumPy and `models/export_format.py` alone, so that both can be copied to where a
model is served. `pipeline/publishing/shortlist.py` makes the shortlist of a run.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from models.export_format import SHORTLISTS

TokenIds = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shortlist:
    """The shortlist holds the target tokens that source tokens allow: lists, one behind the other.
    The first is of those that every sentence may have; then comes one for each source id.
    """

    ids: TokenIds
    """The target ids of all lists."""

    offsets: TokenIds
    """Where each list begins, and the last one ends."""

    @classmethod
    def of_lists(cls, lists: Sequence[TokenIds]) -> Shortlist:
        """Return the shortlist with these lists."""
        ids = np.concatenate(lists)
        small = ids.astype(np.min_scalar_type(int(ids.max(initial=0))))
        return cls(small, np.cumsum([0, *map(len, lists)], dtype=np.int64))

    def allowed(self, source: Sequence[int] | TokenIds) -> TokenIds:
        """Return the target ids that a sentence may have, ascending, each once.

        :param source: token ids of the sentence.
        """
        lists = [0, *(token + 1 for token in source)]
        parts = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in lists]
        found: TokenIds = np.unique(np.concatenate(parts))
        return found

    def to_text(self, source: Sequence[str], target: Sequence[str]) -> str:
        """Return the content of `vmap.txt`.

        It leaves out tokens with white space in them: symbols of a recipe, which no text is
        encoded to.

        :param source: the tokens of the source vocabulary as text, by id.
        :param target: those of the target vocabulary.
        """
        lines = []
        lists = pairwise(self.offsets.tolist())
        for key, (begin, end) in zip(["", *source], lists, strict=True):
            texts = [target[number] for number in self.ids[begin:end]]
            tokens = [text for text in texts if len(text.split()) == 1]
            if tokens and len(key.split()) == (key != ""):
                lines.append(f"{key}\t{' '.join(tokens)}\n")
        return "".join(lines)

    def to_bytes(self) -> bytes:
        """Return the content of `shortlist.npz`."""
        file = io.BytesIO()
        np.savez(file, ids=self.ids, offsets=self.offsets)
        return file.getvalue()


def read_shortlist(folder: Path, source_size: int, target_size: int) -> Shortlist:
    """Read the shortlist in the folder of an ONNX export.

    :param source_size: of the source vocabulary.
    :param target_size: of the target vocabulary.
    :raises OSError: there is none.
    :raises ValueError: the file is damaged, or of other vocabularies.
    """
    path = folder / SHORTLISTS["onnx"]
    content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as arrays:
            ids, offsets = arrays["ids"], arrays["offsets"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, ZlibError) as error:
        raise ValueError(f"{path}: {error}") from error
    if (
        {ids.ndim, offsets.ndim} != {1}
        or ids.dtype.kind not in "iu"
        or offsets.dtype.kind != "i"
        or len(offsets) != source_size + 2
        or offsets[0] != 0
        or offsets[-1] != len(ids)
        or (np.diff(offsets) < 0).any()
        or not 0 <= ids.min(initial=0) <= ids.max(initial=0) < target_size
    ):
        raise ValueError(f"{path}: not a shortlist of these vocabularies")
    return Shortlist(ids, offsets)
