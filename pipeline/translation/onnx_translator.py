"""Translate text with an export for ONNX Runtime (`models/onnx_graph.py`).

This file needs `onnxruntime`, `numpy` and `sentencepiece`, and of our other modules
`pipeline/translation/search.py` and what `serving.py` needs:

    OnnxTranslator(Path("my-model")).translate(["Guten Morgen."])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from data_prep.text import PAD_IDX
from models.export_format import DECODER, ENCODER, ModelError
from pipeline.translation.search import Decoding, Ints, NextTokens, search_batch
from pipeline.translation.serving import Hypothesis, TextTranslator, open_export, thread_count

HIDDEN = np.float32(-1e9)  # added to what a hypothesis may not attend to

LOAD_ERRORS = (
    OSError, KeyError, RuntimeError, ValueError, errors.Fail, errors.InvalidArgument,
    errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile, errors.NotImplemented,
    errors.RuntimeException,
)  # fmt: skip


class OnnxTranslator(TextTranslator):
    """Translates by our beam search with ONNX Runtime on the CPU: a worker on each core has its own
    batch.

    It is for few sentences at a time, where a ring's one layer stays in the cache.
    """

    def __init__(self, folder: Path, **search: object) -> None:
        """Load the model.

        :param folder: written by `./run.sh export --format onnx`.
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: `folder` is no such folder.
        :raises TypeError: there is no such key.
        """
        settings, vocabularies, options = open_export(folder, "onnx", search)
        try:
            self.encoder, self.decoder = (
                load_session(folder / name) for name in (ENCODER, DECODER)
            )
            self.max_target_tokens: int = settings.model["max_seq_len"]
        except LOAD_ERRORS as error:
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        workers = thread_count()
        super().__init__(
            vocabularies,
            options,
            settings.max_source_tokens or self.max_target_tokens,
            f"ONNX Runtime {settings.quantization or 'float32'}, {workers} worker(s) on the CPU",
        )
        self._workers = ThreadPoolExecutor(workers)

    def search_batches(
        self, batches: Iterable[list[list[int]]]
    ) -> Iterator[list[list[Hypothesis]]]:
        """Translate batches in parallel, and return them in order; see `TextTranslator`."""
        return self._workers.map(self._search, batches)

    def _search(self, sources: list[list[int]]) -> list[list[Hypothesis]]:
        decoding = OnnxDecoding(self.encoder, self.decoder, sources)
        lengths = [len(ids) for ids in sources]
        return search_batch(decoding, lengths, self.search, self.max_target_tokens)


class OnnxDecoding(Decoding):
    """A batch is being decoded; all hypotheses of a sentence write into one cache of its own, and
    `visible` says what in it is whose past.
    """

    def __init__(self, encoder: Any, decoder: Any, sources: Sequence[Sequence[int]]) -> None:
        lengths = [len(ids) for ids in sources]
        source = np.full((len(sources), max(lengths)), PAD_IDX)
        for row, ids in enumerate(sources):
            source[row, : len(ids)] = ids
        self.decoder, self.step = decoder, 0
        self.lengths = np.array(lengths, np.int32)
        self.cross_k, self.cross_v = encoder.run(None, {"source": source, "lengths": self.lengths})
        levels, _, heads, _, dim = next(i for i in decoder.get_inputs() if i.name == "past_k").shape
        empty = np.empty((levels, len(sources), heads, 0, dim), np.float32)
        self.past_k = self.past_v = empty
        self.visible = np.empty((len(sources), 1, 0), np.bool_)  # [B, K, positions]

    def next_tokens(self, last: Ints, count: int) -> NextTokens:
        """Decode one position; see `Decoding`."""
        batch, beam = last.shape
        itself = np.broadcast_to(np.eye(beam, dtype=np.bool_), (batch, beam, beam))
        self.visible = np.concatenate([self.visible, itself], axis=2)
        tokens, log_probs, end, self.past_k, self.past_v = self.decoder.run(
            None,
            {
                "tokens": last,
                "position": np.array(self.step),
                "bias": np.where(self.visible, np.float32(0), HIDDEN)[:, None],
                "lengths": self.lengths,
                "cross_k": self.cross_k,
                "cross_v": self.cross_v,
                "past_k": self.past_k,
                "past_v": self.past_v,
                "count": np.array([count]),
            },
        )
        self.step += 1
        shape = (batch, beam, -1)
        return NextTokens(tokens.reshape(shape), log_probs.reshape(shape), end.reshape(batch, beam))

    def reorder(self, sentences: Ints, parents: Ints) -> None:
        """Keep some sentences; see `Decoding`."""
        self.visible = self.visible[sentences[:, None], parents]
        if len(sentences) < len(self.lengths):
            self.lengths = self.lengths[sentences]
            self.cross_k, self.cross_v = self.cross_k[sentences], self.cross_v[sentences]
            self.past_k, self.past_v = self.past_k[:, sentences], self.past_v[:, sentences]


def load_session(path: Path) -> Any:
    """Load a graph, to be run with one thread by each worker."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # workers share the cores
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
