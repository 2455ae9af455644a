"""The commands, and the rooms behind them; `load` opens an exported translation model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator

# A thread of GNU OpenMP that waits for the others spins 300,000 times before it sleeps. Where
# another program has a core, it spins while those it waits for have none (docs/faq.md).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# `deepspeed pipeline/train.py` puts this folder on the path. Its `evaluate` and `tracking` are
# nobody else's.
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(__file__)]


def load(
    folder: str | os.PathLike[str], threads: int | None = None, **search: object
) -> TextTranslator:
    """Return a translator with the model in a folder that `./run.sh export` wrote.

    Several threads may use it at once. It needs sentencepiece, pydantic, and what runs the model:
    ctranslate2, onnxruntime, or, in format safetensors, all of this project's environment.

    :param folder: in any format but huggingface.
    :param threads: of other engines than PyTorch, which has its own; None: as many as
        OMP_NUM_THREADS says, or cores.
    :param search: `evaluation` keys that differ from what the model was exported with.
    :raises ModelError: the folder is not an exported translation model.
    :raises TypeError: there is no such key.
    :raises ValueError: a key cannot have this value.
    """
    from pathlib import Path

    from pipeline.translation.translator import load_exports

    return load_exports(Path(folder), threads=threads, **search)
