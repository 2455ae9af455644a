"""A process of `benchmarks/latency.py`: an engine with a model, and nothing else imported.

python -m benchmarks.latency_server ENGINE FOLDER THREADS VOCABULARY
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

LENGTH = 20  # tokens of a source and of its translation, EOS included
SHORTLIST_SHARE = 1 / 12
FIRST_WORD, EOS_IDX = 4, 3


class Request(NamedTuple):
    """What to translate."""

    together: int
    """Sentences in a batch."""

    sentences: int
    shortlist: bool


Translate = Callable[[Sequence[list[int]], bool], list[int]]
"""Translates a batch, with a shortlist or without, and returns the lengths of translations."""


def ctranslate2_engine(folder: Path, threads: int, vocab_size: int) -> Translate:
    """Return what translates with CTranslate2."""
    import ctranslate2

    model = ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=threads)

    def translate(sources: Sequence[list[int]], shortlist: bool) -> list[int]:
        found = model.translate_batch(
            [[*map(str, ids)] for ids in sources], beam_size=1, use_vmap=shortlist,
            min_decoding_length=LENGTH, max_decoding_length=LENGTH,
        )  # fmt: skip
        return [len(result.hypotheses[0]) for result in found]

    return translate


def onnx_engine(folder: Path, threads: int, vocab_size: int) -> Translate:
    """Return what translates with ONNX Runtime."""
    import numpy as np

    from models.export_format import DECODER, ENCODER
    from pipeline.translation.onnx_translator import OnnxDecoding, load_session
    from pipeline.translation.search import search_batch

    encoder, decoder = (load_session(folder / name, threads) for name in (ENCODER, DECODER))
    search: Any = SimpleNamespace(
        beam_size=1, length_penalty=1.0, no_repeat_ngram_size=0, max_length_ratio=1.0,
        max_length_offset=0,
    )  # fmt: skip
    ids = np.arange(vocab_size)
    allowed = (ids >= EOS_IDX) & (ids < EOS_IDX + round(SHORTLIST_SHARE * vocab_size))

    def translate(sources: Sequence[list[int]], shortlist: bool) -> list[int]:
        batch = [[*ids, EOS_IDX] for ids in sources]
        own = np.broadcast_to(allowed, (len(batch), vocab_size)) if shortlist else None
        decoding = OnnxDecoding(encoder, decoder, batch, own)
        found = search_batch(decoding, [LENGTH] * len(batch), search, LENGTH, [()] * len(batch))
        return [len(hypotheses[0].tokens) for hypotheses in found]

    return translate


def marian_engine(folder: Path, threads: int, vocab_size: int) -> Translate:
    """Return what translates with Hugging Face's class."""
    import torch
    from transformers import MarianMTModel

    torch.set_num_threads(threads)
    model = MarianMTModel.from_pretrained(folder)

    def translate(sources: Sequence[list[int]], shortlist: bool) -> list[int]:
        source = torch.tensor([[*ids, EOS_IDX] for ids in sources])
        found = model.generate(
            source, num_beams=1, do_sample=False, min_new_tokens=LENGTH, max_new_tokens=LENGTH
        )
        return [len(row) - 1 for row in found]  # but for the start

    return translate


ENGINES = {"ctranslate2": ctranslate2_engine, "onnx": onnx_engine, "marian": marian_engine}


def serve(engine: str, folder: Path, threads: int, vocab_size: int) -> None:
    """Answer each request on stdin with the seconds of its batches."""
    translate = ENGINES[engine](folder, threads, vocab_size)
    words = random.Random(0)

    def sentence() -> list[int]:
        return [words.randrange(FIRST_WORD, vocab_size) for _ in range(LENGTH - 1)]

    translate([sentence()], False)
    print("ready", flush=True)
    for line in sys.stdin:
        request = Request(*json.loads(line))
        times = []
        for _ in range(request.sentences // request.together):
            batch = [sentence() for _ in range(request.together)]
            started = time.perf_counter()
            lengths = translate(batch, request.shortlist)
            times.append(time.perf_counter() - started)
            assert lengths == [LENGTH] * request.together, f"{lengths} tokens"
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
