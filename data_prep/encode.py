"""Text to token ids, many sentences at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sentencepiece import SentencePieceProcessor

from data_prep.vocabulary import EOS_IDX, load_vocabulary

SPACE = "▁"  # SentencePiece's mark in front of every word
AT_ONCE = 10_000  # sentences
MOST_WORDS = 500_000  # remembered, about 100 bytes each


class Encoder:
    """What `SentencePieceProcessor.encode` gives, EOS at the end, as Arrow arrays.

    BPE never merges across spaces, so that a sentence's ids are those of its words one after the
    other: each word is encoded once. (A unigram model scores whole sentences, in float32, and so
    resolves ties otherwise for a word alone.)
    """

    def __init__(self, model: Path, dtype: np.dtype[Any], *, bpe: bool) -> None:
        self.vocabulary: SentencePieceProcessor = load_vocabulary(model)
        self.dtype = dtype
        self.by_words = bpe
        self._words: dict[str, bytes | None] = {}

    def __call__(self, sentences: Sequence[str]) -> pa.ListArray:
        """Token ids of sentences, `list<uint16|uint32>`."""
        encode = self._by_words if self.by_words else self._whole
        encoded = []
        for begin in range(0, len(sentences), AT_ONCE):
            encoded += encode(sentences[begin : begin + AT_ONCE])
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) // self.dtype.itemsize
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = pa.array(np.frombuffer(b"".join(encoded), self.dtype))
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    def _whole(self, sentences: Sequence[str]) -> list[bytes]:
        return [
            np.array(ids, self.dtype).tobytes()
            for ids in self.vocabulary.encode(list(sentences), add_eos=True)
        ]

    def _by_words(self, sentences: Sequence[str]) -> list[bytes]:
        texts = self.vocabulary.normalize(list(sentences))
        split = [text.split(SPACE)[1:] for text in texts]
        if len(self._words) > MOST_WORDS:
            self._words.clear()
        self._learn({word for words in split for word in words} - self._words.keys())
        eos = np.array(EOS_IDX, self.dtype).tobytes()
        encoded = []
        for sentence, words in zip(sentences, split, strict=True):
            parts = [self._words[word] for word in words]
            if None in parts:
                encoded += self._whole([sentence])
            else:
                encoded.append(b"".join([*parts, eos]))  # type: ignore[list-item]
        return encoded

    def _learn(self, new: set[str]) -> None:
        """Remember the ids of words; None for one that is not itself when it stands alone."""
        words = sorted(new)
        alone = self.vocabulary.normalize(words)
        for word, text, ids in zip(words, alone, self.vocabulary.encode(words), strict=True):
            same = text == f"{SPACE}{word}"
            self._words[word] = np.array(ids, self.dtype).tobytes() if same else None
