"""A process of `benchmarks/one_sentence.py`: an engine with a model, and nothing else imported.

python -m benchmarks.one_sentence_server FORMAT FOLDER BEAM VOCABULARY ALLOWED
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LENGTH = 20  # tokens with EOS
IDS = [(7919 * n) % 90 + 4 for n in range(LENGTH - 1)]


def ctranslate2_translation(
    folder: Path, beam_size: int, vocab_size: int, allowed: int
) -> Callable[[], int]:
    """Return what translates the sentence, and says how many tokens came out.

    :param allowed: how many target tokens the model's shortlist allows; 0: it has none.
    """
    import ctranslate2

    model = ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=1)
    source: list[list[str]] = [[*map(str, IDS)]]  # and EOS, which it adds
    options = {
        "min_decoding_length": LENGTH,
        "max_decoding_length": LENGTH,
        "use_vmap": allowed > 0,
    }
    return lambda: len(
        model.translate_batch(source, beam_size=beam_size, **options)[0].hypotheses[0]
    )


def onnx_translation(
    folder: Path, beam_size: int, vocab_size: int, allowed: int
) -> Callable[[], int]:
    """Return the same for ONNX Runtime."""
    import numpy as np

    from data_prep.text import EOS_IDX
    from models.export_format import DECODER, ENCODER
    from pipeline.translation.onnx_translator import OnnxDecoding, load_session
    from pipeline.translation.search import search_batch

    encoder, decoder = (load_session(folder / name) for name in (ENCODER, DECODER))
    search: Any = SimpleNamespace(
        beam_size=beam_size, length_penalty=1.0, no_repeat_ngram_size=0, max_length_ratio=1.0,
        max_length_offset=0,
    )  # fmt: skip
    ids = np.arange(vocab_size)
    shortlist = ((ids >= EOS_IDX) & (ids < EOS_IDX + allowed))[None] if allowed else None

    def translate() -> int:
        decoding = OnnxDecoding(encoder, decoder, [[*IDS, EOS_IDX]], shortlist)
        ((best, *_),) = search_batch(decoding, [LENGTH], search, LENGTH)
        return len(best.tokens)

    return translate


def serve(format: str, folder: Path, beam_size: int, vocab_size: int, allowed: int) -> None:
    """Translate once for each line of stdin, and print the seconds."""
    prepare = onnx_translation if format == "onnx" else ctranslate2_translation
    translate = prepare(folder, beam_size, vocab_size, allowed)
    translate()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        length = translate()
        seconds = time.perf_counter() - started
        assert length == LENGTH, f"{length} tokens"
        print(seconds, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
