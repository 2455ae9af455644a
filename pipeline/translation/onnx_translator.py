"""Translate text with an export for ONNX Runtime (`models/onnx_graph.py`).

This file needs `onnxruntime`, `numpy` and `sentencepiece`, and of our other modules `decode.py`,
`search.py`, `constrained_search.py` and `shortlist.py` beside it, and what `serving.py` needs:

    OnnxTranslator(Path("my-model")).translate(["Guten Morgen."])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from data_prep.text import seen_words
from models.export_format import DECODER, ENCODER, ModelError
from pipeline.translation.decode import decode_batch
from pipeline.translation.search import ALL_TOKENS, Decoding, Ints, NextTokens, force_batch, pad
from pipeline.translation.serving import (
    Hypothesis,
    PairIds,
    Part,
    TextTranslator,
    open_export,
    thread_count,
)
from pipeline.translation.shortlist import read_shortlist

HIDDEN = np.float32(-1e9)  # added to what a hypothesis may not attend to
LARGE_SHARE = 0.45  # of the vocabulary; then the product with all of it, in int8, is as fast

Bools = NDArray[np.bool_]


class OnnxTranslator(TextTranslator):
    """Translates by our beam search with ONNX Runtime on the CPU: a worker on each core has its own
    batch.

    It is for few sentences at a time, where a ring's one layer stays in the cache. With a shortlist
    (`shortlist.py`) a translation has the target tokens only that its own sentence allows, in any
    company; probabilities are those among them.
    """

    def __init__(self, folder: Path, threads: int | None = None, **search: object) -> None:
        """Load the model.

        :param folder: written by `./run.sh export --format onnx`.
        :param threads: None: as many as `thread_count` says.
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: `folder` is no such folder.
        :raises TypeError: there is no such key.
        """
        settings, vocabularies, options = open_export(folder, "onnx", search)
        self.seen_words = seen_words(folder)
        try:
            self.encoder, self.decoder = (
                load_session(folder / name) for name in (ENCODER, DECODER)
            )
            self.max_target_tokens: int = settings.model.max_seq_len
            sizes = [vocabulary.get_piece_size() for vocabulary in vocabularies]
            self.shortlist = read_shortlist(folder, *sizes) if options.shortlist else None
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime's are of many types
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        workers = threads or thread_count()
        super().__init__(
            vocabularies,
            options,
            settings.max_source_tokens or self.max_target_tokens,
            f"ONNX Runtime {settings.quantization or 'float32'}, {workers} worker(s) on the CPU"
            + ", with a shortlist" * (self.shortlist is not None),
        )
        self._workers = ThreadPoolExecutor(workers)

    def search_batches(self, batches: Iterable[list[Part]]) -> Iterator[list[list[Hypothesis]]]:
        """Translate batches in parallel, and return them in order; see `TextTranslator`."""
        return self._workers.map(self._search, batches)

    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[list[list[float]]]:
        """Score batches in parallel, and return them in order; see `TextTranslator`."""
        return self._workers.map(self._force, batches)

    def _force(self, pairs: PairIds) -> list[list[float]]:
        sources, targets = pairs
        return force_batch(OnnxDecoding(self.encoder, self.decoder, sources), targets)

    def _search(self, parts: list[Part]) -> list[list[Hypothesis]]:
        sources = [part.source for part in parts]
        decoding = OnnxDecoding(self.encoder, self.decoder, sources, self._allowed(parts))
        return decode_batch(decoding, parts, self.search, self.max_target_tokens)

    def _allowed(self, parts: list[Part]) -> Bools | None:
        """Return which target tokens the shortlist, the prefix, or a term allows each sentence,
        `[B, vocabulary]`."""
        if self.shortlist is None:
            return None
        allowed = np.zeros((len(parts), self.target_vocabulary.get_piece_size()), np.bool_)
        for row, part in zip(allowed, parts, strict=True):
            row[self.shortlist.allowed(part.source)] = True
            row[list(part.prefix)] = True
            row[list(part.terms.ids) if part.terms else []] = True
        return allowed


class OnnxDecoding(Decoding):
    """A batch is being decoded; all hypotheses of a sentence write into one cache of its own, and
    `bias` hides from each what is not its past.
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        sources: Sequence[Sequence[int]],
        allowed: Bools | None = None,
    ) -> None:
        """Run the encoder.

        :param sources: token ids of the sentences.
        :param allowed: target tokens that each may have, `[B, vocabulary]`; None: all of them. The
            model was exported with a shortlist.
        """
        source, lengths = pad(sources)
        self.decoder, self.step = decoder, 0
        self.lengths = lengths.astype(np.int32)
        inputs = {"source": source, "lengths": self.lengths}
        self.restriction: dict[str, NDArray[Any]] = {}  # inputs of the decoder
        if allowed is not None:
            union = np.flatnonzero(allowed.any(axis=0))
            if len(union) < LARGE_SHARE * allowed.shape[1]:
                inputs["row_ids"] = self.restriction["ids"] = union
                allowed = allowed[:, union]
            hidden = np.where(allowed, np.float32(0), np.float32(-np.inf))
            self.restriction["hidden"] = hidden[:, None]
        names = [output.name for output in encoder.get_outputs()]
        self.cross = dict(zip(names, encoder.run(names, inputs), strict=True))
        rows = self.cross.pop("rows", None)
        if "ids" in self.restriction:
            self.restriction["rows"] = rows
        self.past = {}
        for cache in decoder.get_inputs():
            if cache.name.startswith("past_"):
                levels, _, heads, _, dim = cache.shape
                shape = (levels, len(sources), heads, 0, dim)
                self.past[cache.name] = np.empty(shape, np.float32)
        self.bias = np.empty((len(sources), 1, 0), np.float32)  # [B, K, positions]

    def next_tokens(self, last: Ints, count: int, named: Ints | None = None) -> NextTokens:
        """Decode one position; see `Decoding`. Tokens that are named are found among all."""
        batch, beam = last.shape
        others = np.full((batch, beam, beam), HIDDEN)
        others[:, range(beam), range(beam)] = 0
        self.bias = np.concatenate([self.bias, others], axis=2)
        tokens, log_probs, end, *present = self.decoder.run(
            None,
            {
                "tokens": last,
                "position": np.array(self.step),
                "bias": self.bias[:, None],
                "lengths": self.lengths,
                "count": np.array([count if named is None else ALL_TOKENS]),
                **self.cross,
                **self.past,
                **self.restriction,
            },
        )
        self.past = dict(zip(self.past, present, strict=True))
        self.step += 1
        if named is not None:
            each = (log_probs[tokens == name[:, None, None]] for name in named.T)
            end = np.stack([values.reshape(batch, beam) for values in each], axis=2)
        if tokens.shape[2] < count:  # these are all
            by_id = tokens.argsort(axis=2)
            tokens, log_probs = (np.take_along_axis(x, by_id, 2) for x in (tokens, log_probs))
        return NextTokens(tokens[:, :, :count], log_probs[:, :, :count], end)

    def reorder(self, sentences: Ints, parents: Ints) -> None:
        """Keep some sentences; see `Decoding`."""
        self.bias = self.bias[sentences[:, None], parents]
        if len(sentences) < len(self.lengths):
            self.lengths = self.lengths[sentences]
            if "hidden" in self.restriction:
                self.restriction["hidden"] = self.restriction["hidden"][sentences]
            self.cross = {name: array[sentences] for name, array in self.cross.items()}
            self.past = {name: array[:, sentences] for name, array in self.past.items()}


def load_session(path: Path, threads: int = 1) -> Any:
    """Load a graph, to be run with so many threads by each worker."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
