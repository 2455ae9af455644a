"""Measure how a published model of base size serves one sentence at a time, with int8 weights.

Every engine translates the same 20 random tokens to 20, with random weights and one thread, in a
process of its own; they take turns, five times each, of which the quickest counts. The start-up is
that of a new process, from before it imports anything to its first translation; the memory is what
is resident after it. Shortlists allow some consecutive target tokens.

python -m benchmarks.one_sentence [--vocabularies 8000 32000] [--beams 1 4] [--shortlist 2600]
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
from typing import NamedTuple

import psutil
import torch

from benchmarks.rounds import create_parser, print_table, progress, ratios, spread
from data_prep.vocabulary import EOS_IDX, PAD_IDX
from models.config import ModelConfig
from models.ctranslate2_spec import ctranslate2_spec
from models.export_format import SHORTLISTS, Format
from models.factory import create_model
from models.onnx_graph import write_onnx
from pipeline.publishing.shortlist import LARGE_VOCABULARY

SENTENCES = 5  # of a round, of which the quickest counts
TRANSFORMER = "Transformer, CTranslate2"


class System(NamedTuple):
    """What is measured."""

    model: dict[str, str]
    format: Format
    shortlisted: bool = False


SYSTEMS = {
    TRANSFORMER: System({"architecture": "transformer"}, "ctranslate2"),
    f"{TRANSFORMER}, shortlist": System({"architecture": "transformer"}, "ctranslate2", True),
    "RingFormer folded, CTranslate2": System({}, "ctranslate2"),
    "RingFormer with static signals, CTranslate2": System(
        {"level_signals": "static"}, "ctranslate2"
    ),
    "Transformer, ONNX Runtime": System({"architecture": "transformer"}, "onnx"),
    "Transformer, ONNX Runtime, shortlist": System({"architecture": "transformer"}, "onnx", True),
    "RingFormer, ONNX Runtime": System({}, "onnx"),
    "RingFormer, ONNX Runtime, shortlist": System({}, "onnx", True),
}


def write_model(
    folder: Path, system: System, vocab_size: int, model_dim: int, allowed: int
) -> None:
    """Write a model with random weights, as `./run.sh export` writes a trained one.

    :param allowed: how many target tokens a shortlist allows.
    """
    torch.manual_seed(0)
    sizes = {"model_dim": model_dim, "num_heads": model_dim // 64, "ffn_inner_dim": 4 * model_dim}
    config = ModelConfig.model_validate({**sizes, **system.model})
    model = create_model(config, (vocab_size, vocab_size), PAD_IDX).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.05)
    if system.format == "onnx":
        write_onnx(model, folder, "int8", shortlist=system.shortlisted)
        return
    spec = ctranslate2_spec(model)
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *map(str, range(4, vocab_size))]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.validate()
    spec.optimize("int8")
    spec.save(str(folder))
    if system.shortlisted:
        line = "\t" + " ".join(tokens[EOS_IDX : EOS_IDX + allowed])
        (folder / SHORTLISTS["ctranslate2"]).write_text(line + "\n")


# ── Measuring ───────────────────────────────────────────────────────────────────────────────────


class Server:
    """A system at work in its own process."""

    def __init__(self, folder: Path, format: Format, *numbers: int) -> None:
        """Start it.

        :param numbers: the server's last arguments.
        """
        module = "benchmarks.one_sentence_server"
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, format, folder, *map(str, numbers)],
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
    large = vocab_size >= LARGE_VOCABULARY  # else exports have no shortlist
    systems = {name: system for name, system in SYSTEMS.items() if large or not system.shortlisted}
    with TemporaryDirectory() as place, ExitStack() as stack:
        servers, sizes = {}, {}
        for number, (name, system) in enumerate(systems.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            write_model(folder, system, vocab_size, arguments.model_dim, arguments.shortlist)
            sizes[name] = sum(path.stat().st_size for path in folder.iterdir())
            allowed = arguments.shortlist if system.shortlisted else 0
            server = Server(folder, system.format, beam_size, vocab_size, allowed)
            servers[name] = stack.enter_context(server)
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(arguments.rounds):
            for name, server in servers.items():
                best = min(server.seconds() for _ in range(SENTENCES))  # of a machine others use
                seconds[name].append(best)
        progress(f"vocabulary {vocab_size}, beam {beam_size}: done")
        rows = [
            [
                name,
                f"{sizes[name] / 1e6:.1f}",
                f"{sizes[name] / sizes[TRANSFORMER]:.2f}",
                f"{server.resident / 1e6:.0f}",
                f"{server.start_up:.2f}",
                spread([1000 * each for each in seconds[name]]),
                ratios(seconds[name], seconds[TRANSFORMER]),
            ]
            for name, server in servers.items()
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
    parser.add_argument("--shortlist", type=int, default=2600, help="tokens that it allows")
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    arguments = parser.parse_args()
    for vocab_size in arguments.vocabularies:
        for beam_size in arguments.beams:
            compare(vocab_size, beam_size, arguments)


if __name__ == "__main__":
    main()
