"""Measure how models of base size are served on a CPU: files, memory, start-up, time.

Systems with random weights translate random sentences of 20 tokens to 20, greedily, one at a time
and 32 together, each in a process of its own; they take turns. The start-up is that of a new
process, from before it imports anything to its first translation; the memory is what is resident
then. A shortlist allows a twelfth of the vocabulary, as those of real text do (docs/serving.md),
here the same for every sentence.

python -m benchmarks.latency [--vocabularies 8000 32000] [--precisions int8 float32]
    [--threads 1 2] [--rounds 5] [--only NAME...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import psutil
import torch

from benchmarks.decode import marian, write_ctranslate2
from benchmarks.latency_server import LENGTH, SHORTLIST_SHARE, Request
from benchmarks.rounds import create_parser, print_table, progress, ratios, three_digits
from data_prep.text import EOS_IDX, PAD_IDX
from models.config import ModelConfig
from models.export_format import SHORTLISTS, Quantization
from models.factory import create_model
from models.onnx_graph import write_onnx

ALONE, TOGETHER = 1, 32
SENTENCES = {ALONE: 8, TOGETHER: TOGETHER}  # of a round
REQUESTS = [
    Request(together, SENTENCES[together], shortlist)
    for together in (ALONE, TOGETHER)
    for shortlist in (False, True)
]


class System(NamedTuple):
    """A model, and the engine that runs it."""

    keys: Mapping[str, str | int]
    """Of the recipe's `model` section."""

    engine: str
    """`ctranslate2`, `onnx`, or `marian`: Hugging Face's class, in PyTorch."""


def shallow(encoder: int) -> dict[str, int]:
    """Return the keys of a model with so many encoder levels, or layers, and two of the decoder."""
    return {"encoder_levels": encoder, "decoder_levels": 2}


REFERENCE = "Transformer 6-6, CTranslate2"
SYSTEMS = {
    REFERENCE: System({"architecture": "transformer"}, "ctranslate2"),
    "Transformer 6-6, ONNX Runtime": System({"architecture": "transformer"}, "onnx"),
    "Transformer 6-2, ONNX Runtime": System({"architecture": "transformer", **shallow(6)}, "onnx"),
    "Transformer 6-2, CTranslate2": System(
        {"architecture": "transformer", **shallow(6)}, "ctranslate2"
    ),
    "Transformer 12-2, CTranslate2": System(
        {"architecture": "transformer", **shallow(12)}, "ctranslate2"
    ),
    "Transformer 6-6, Hugging Face": System({"architecture": "transformer"}, "marian"),
    "RingFormer 6-6, ONNX Runtime": System({}, "onnx"),
    "RingFormer 6-2, ONNX Runtime": System(shallow(6), "onnx"),
    "RingFormer 12-2, ONNX Runtime": System(shallow(12), "onnx"),
    "RingFormer 6-6 folded, CTranslate2": System({}, "ctranslate2"),
    "static signals 6-6, CTranslate2": System({"level_signals": "static"}, "ctranslate2"),
    "static signals 6-2, CTranslate2": System(
        {"level_signals": "static", **shallow(6)}, "ctranslate2"
    ),
    "static signals 12-2, CTranslate2": System(
        {"level_signals": "static", **shallow(12)}, "ctranslate2"
    ),
}


# ── Models ──────────────────────────────────────────────────────────────────────────────────────


def write_model(
    folder: Path, system: System, vocab_size: int, model_dim: int, quantization: Quantization | None
) -> None:
    """Write a model with random weights, as `./run.sh export` writes a trained one."""
    torch.manual_seed(0)
    sizes = {"model_dim": model_dim, "num_heads": model_dim // 64, "ffn_inner_dim": 4 * model_dim}
    config = ModelConfig.model_validate({**sizes, **system.keys})
    if system.engine == "marian":
        marian(config, vocab_size).save_pretrained(folder)
        return
    model = create_model(config, (vocab_size, vocab_size), PAD_IDX).eval()
    with torch.no_grad():
        model.target_embed.weight[EOS_IDX] = 0  # never the likeliest
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.05)
    if system.engine == "onnx":
        write_onnx(model, folder, quantization, shortlist=True)
        return
    allowed = round(SHORTLIST_SHARE * vocab_size)
    write_ctranslate2(model, folder, quantization, vocab_size, allowed)


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


class Server:
    """A system at work in its own process."""

    def __init__(self, folder: Path, engine: str, threads: int, vocab_size: int) -> None:
        arguments = [engine, str(folder), str(threads), str(vocab_size)]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.latency_server", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        assert self.output.readline() == "ready\n"
        self.start_up = time.perf_counter() - started
        self.resident = psutil.Process(self.process.pid).memory_info().rss

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.input.close()
        self.process.wait()
        self.output.close()

    def translate(self, request: Request) -> list[float]:
        """Translate sentences, and return the seconds of each batch."""
        self.input.write(json.dumps(request) + "\n")
        self.input.flush()
        seconds: list[float] = json.loads(self.output.readline())
        return seconds


Times = dict[str, list[list[float]]]  # of each system in each round: seconds of each batch


def compare(
    vocab_size: int, quantization: Quantization | None, threads: int, arguments: argparse.Namespace
) -> None:
    """Print a table of all systems."""
    chosen = {
        name: system
        for name, system in SYSTEMS.items()
        if name.startswith((REFERENCE, *arguments.only))
        and not (quantization and system.engine == "marian")
    }
    with TemporaryDirectory() as place, ExitStack() as stack:
        servers, sizes = {}, {}
        for number, (name, system) in enumerate(chosen.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            write_model(folder, system, vocab_size, arguments.model_dim, quantization)
            files = (path for path in folder.iterdir() if path.name not in SHORTLISTS.values())
            sizes[name] = sum(path.stat().st_size for path in files)
            server = Server(folder, system.engine, threads, vocab_size)
            servers[name] = stack.enter_context(server)
        times: dict[Request, Times] = {
            request: {
                name: [] for name in chosen if not (request.shortlist and name.endswith("Face"))
            }
            for request in REQUESTS
        }
        for number in range(arguments.rounds + 1):
            for request, of_systems in times.items():
                for name, rounds in of_systems.items():
                    rounds.append(servers[name].translate(request))
            progress(f"{vocab_size}, {quantization}, {threads}: round {number}")
    rows = []
    for name, server in servers.items():
        row = [
            name,
            f"{sizes[name] / 1e6:.1f} ({sizes[name] / sizes[REFERENCE]:.2f})",
            f"{server.resident / 1e6:.0f}",
            f"{server.start_up:.2f}",
        ]
        for request, of_systems in times.items():
            row += cells(request, of_systems, name)
        rows.append(row)
    header = ["system", "files, MB", "resident, MB", "start-up, s"]
    for request in REQUESTS:
        what = "one, ms" if request.together == ALONE else f"{TOGETHER} together, tokens/s"
        header += [f"{what}{', shortlist' * request.shortlist}", "over Transformer 6-6"]
    print_table(
        f"Width {arguments.model_dim}, vocabulary {vocab_size:,}, {quantization or 'float32'}, "
        f"{threads} thread{'s' * (threads > 1)}; p50 and p95 of a sentence by itself",
        header,
        rows,
    )


def cells(request: Request, of_systems: Times, name: str) -> list[str]:
    """Return a system's time, and the ratios of its rounds to the Transformer's."""
    if name not in of_systems:
        return ["", ""]
    ours, theirs = (
        [median(batches) for batches in of_systems[system][1:]] for system in (name, REFERENCE)
    )
    if request.together == ALONE:
        every = [seconds for batches in of_systems[name][1:] for seconds in batches]
        time = f"{three_digits(1000 * median(every))}, {1000 * quantiles(every, n=20)[-1]:.1f}"
    else:
        time = three_digits(request.together * LENGTH / median(ours))
    return [time, ratios(ours, theirs)]


# ── The roofline ────────────────────────────────────────────────────────────────────────────────


def cache_bytes(index: int) -> int:
    """Return the size of a cache of the first core: 2 is L2."""
    size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text()
    return int(size.strip().removesuffix("K")) << 10


def print_roofline(vocabularies: Sequence[int], model_dim: int) -> None:
    """Print how fast this processor reads from each kind of memory, and what a word of one
    sentence must read."""
    caches = {name: cache_bytes(index) for name, index in (("L2", 2), ("L3", 3))}
    bandwidths = {}
    for where, size in (*((name, room // 3) for name, room in caches.items()), ("memory", 1 << 28)):
        left, right = (np.ones(size // 8, np.float32) for _ in range(2))
        times = []
        for _ in range(7):
            repeats = max(1, (64 << 20) // size)
            started = time.perf_counter()
            for _ in range(repeats):
                np.dot(left, right)
            times.append((time.perf_counter() - started) / repeats)
        bandwidths[where] = size / min(times)
    print_table(
        "Reading two vectors to multiply them, one thread, GB/s",
        list(bandwidths),
        [[f"{rate / 1e9:.0f}" for rate in bandwidths.values()]],
    )
    layer = 14 * model_dim**2  # self-attention 4 d², cross-attention q and output 2, FFN 8
    rows = []
    for vocab_size in vocabularies:
        for share, words in ((1.0, "all of it"), (SHORTLIST_SHARE, "shortlist")):
            output = round(share * vocab_size) * model_dim
            for name, read in (("6 layers", 6 * layer + output), ("one layer", layer + output)):
                fits = next((name for name, room in caches.items() if read < room), "memory")
                least = 1000 * ((6 * layer + output) / bandwidths[fits])
                rows.append(
                    [f"{vocab_size:,}, {words}", name, f"{read / 1e6:.1f}", fits, f"{least:.2f}"]
                )
    print_table(
        f"What a word must read of int8 weights with 6 decoder levels, width {model_dim}; those of "
        "one layer are read six times",
        ["vocabulary", "decoder", "weights, MB", "they fit into", "least time a word, ms"],
        rows,
    )


def main() -> None:
    """Measure every system in every setting."""
    parser = create_parser(__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--precisions", nargs="+", default=["int8", "float32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--only", nargs="+", default=[""], help="systems whose names begin so")
    arguments = parser.parse_args()
    print_roofline(arguments.vocabularies, arguments.model_dim)
    for precision in arguments.precisions:
        for vocab_size in arguments.vocabularies:
            for threads in arguments.threads if precision == "int8" else [1]:
                compare(vocab_size, "int8" if precision == "int8" else None, threads, arguments)


if __name__ == "__main__":
    main()
