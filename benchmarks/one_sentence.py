"""Measure how a published model of base size serves one sentence at a time, with int8 weights.

Every engine translates the same 20 random tokens to 20, with random weights and one thread, in a
process of its own; they take turns, five times each, of which the quickest counts. The start-up is
that of a new process, from before it imports anything to its first translation; the memory is what
is resident after it.

python -m benchmarks.one_sentence [--vocabularies 8000 32000] [--beams 1 4] [--rounds 20]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from benchmarks.rounds import create_parser, print_table, progress, ratios, spread
from data_prep.vocabulary import PAD_IDX
from models.config import ModelConfig
from models.ctranslate2_spec import ctranslate2_spec
from models.export_format import Format
from models.factory import create_model
from models.onnx_graph import write_onnx

SENTENCES = 5  # of a round, of which the quickest counts
TRANSFORMER = "Transformer, CTranslate2"
SYSTEMS: dict[
    str, tuple[dict[str, str], Format]
] = {  # keys of `model` and the format of the export
    TRANSFORMER: ({"architecture": "transformer"}, "ctranslate2"),
    "RingFormer folded, CTranslate2": ({}, "ctranslate2"),
    "RingFormer with static signals, CTranslate2": ({"level_signals": "static"}, "ctranslate2"),
    "RingFormer, ONNX Runtime": ({}, "onnx"),
}


def write_model(folder: Path, system: str, vocab_size: int, model_dim: int) -> None:
    """Write a model with random weights, as `./run.sh export` writes a trained one."""
    keys, format = SYSTEMS[system]
    torch.manual_seed(0)
    sizes = {"model_dim": model_dim, "num_heads": model_dim // 64, "ffn_inner_dim": 4 * model_dim}
    config = ModelConfig.model_validate({**sizes, **keys})
    model = create_model(config, (vocab_size, vocab_size), PAD_IDX).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.05)
    if format == "onnx":
        write_onnx(model, folder, "int8")
        return
    spec = ctranslate2_spec(model)
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *map(str, range(4, vocab_size))]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.validate()
    spec.optimize("int8")
    spec.save(str(folder))


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


class Server:
    """A system at work in its own process."""

    def __init__(self, folder: Path, system: str, beam_size: int) -> None:
        _, format = SYSTEMS[system]
        module = "benchmarks.one_sentence_server"
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, format, folder, str(beam_size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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

    def seconds(self) -> float:
        """Translate the sentence once."""
        self.input.write("\n")
        self.input.flush()
        return float(self.output.readline())


def compare(vocab_size: int, beam_size: int, arguments: argparse.Namespace) -> None:
    """Print a table of all systems."""
    with TemporaryDirectory() as place, ExitStack() as stack:
        servers, sizes = {}, {}
        for number, system in enumerate(SYSTEMS):
            folder = Path(place) / str(number)
            folder.mkdir()
            write_model(folder, system, vocab_size, arguments.model_dim)
            sizes[system] = sum(path.stat().st_size for path in folder.iterdir())
            servers[system] = stack.enter_context(Server(folder, system, beam_size))
        seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for _ in range(arguments.rounds):
            for system, server in servers.items():
                best = min(server.seconds() for _ in range(SENTENCES))  # of a machine others use
                seconds[system].append(best)
        progress(f"vocabulary {vocab_size}, beam {beam_size}: done")
        rows = [
            [
                system,
                f"{sizes[system] / 1e6:.1f}",
                f"{sizes[system] / sizes[TRANSFORMER]:.2f}",
                f"{server.resident / 1e6:.0f}",
                f"{server.start_up:.2f}",
                spread([1000 * each for each in seconds[system]]),
                ratios(seconds[system], seconds[TRANSFORMER]),
            ]
            for system, server in servers.items()
        ]
    print_table(
        f"Width {arguments.model_dim}, int8, vocabulary {vocab_size:,}, beam {beam_size}, one "
        "sentence of 20 tokens, one thread",
        ["system", "files, MB", "over the Transformer's", "resident, MB", "start-up, s",
         "a sentence, ms", "time over the Transformer's"],
        rows,
    )  # fmt: skip


def main() -> None:
    """Measure every system with each vocabulary and beam."""
    parser = create_parser(__doc__, rounds=20)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    arguments = parser.parse_args()
    for vocab_size in arguments.vocabularies:
        for beam_size in arguments.beams:
            compare(vocab_size, beam_size, arguments)


if __name__ == "__main__":
    main()
