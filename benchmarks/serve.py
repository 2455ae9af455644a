"""Measure the server under load: many clients at once, beside the same lines in one batch.

Each client keeps its connection, and asks for one line after the other. Clients and server share
the machine, so what clients take is part of what is measured. The batch is what `./run.sh
translate` does with the lines that were answered; both have as many threads as OMP_NUM_THREADS
says. Where others keep the machine busy, processor time says more than the clock.

python -m benchmarks.serve --model FOLDER --text FILE [--clients 200] [--seconds 30] [--rounds 3]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import psutil

from benchmarks.rounds import create_parser, print_table, progress
from data_prep.corpora import read_lines
from models.export_format import ExportSettings, read_settings
from pipeline import load


class Answer(NamedTuple):
    """What a client was told."""

    line: str
    status: int
    seconds: float


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a model while the block is at work, and give it the port, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.serve", "--model", str(folder), "--port", "0"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        yield int(line.split()[1].rpartition(":")[2]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


async def client(
    port: int, settings: ExportSettings, lines: Iterator[str], until: float
) -> list[Answer]:
    """Ask for lines until the time has come, and return all answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    while time.monotonic() < until:
        line = next(lines)
        wanted = {"q": line, "source": settings.source_lang, "target": settings.target_lang}
        body = json.dumps(wanted).encode()
        head = f"POST /translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.monotonic()
        writer.write(head.encode() + body)
        said = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(said.partition(b"content-length:")[2].split()[0]))
        answers.append(Answer(line, int(said.split()[1]), time.monotonic() - started))
    writer.close()
    return answers


async def ask(
    port: int, settings: ExportSettings, lines: list[str], clients: int, seconds: float
) -> list[Answer]:
    """Have clients ask at once, and return all answers."""
    endless, until = itertools.cycle(lines), time.monotonic() + seconds
    asking = (client(port, settings, endless, until) for _ in range(clients))
    return [answer for answers in await asyncio.gather(*asking) for answer in answers]


def main() -> None:
    """Measure, and print a table."""
    parser = create_parser(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, required=True, help="folder of an export")
    parser.add_argument("--text", type=Path, required=True, help="file of source sentences")
    parser.add_argument("--clients", type=int, default=200, help="[%(default)s]")
    parser.add_argument("--seconds", type=float, default=30, help="of each round [%(default)s]")
    options = parser.parse_args()
    settings, lines = read_settings(options.model), list(read_lines(options.text))
    translator = load(options.model)
    translator.translate(lines[:100])
    rows = []
    for number in range(1, options.rounds + 1):
        with server(options.model) as (port, process):
            before, started = sum(process.cpu_times()[:2]), time.monotonic()
            answers = asyncio.run(ask(port, settings, lines, options.clients, options.seconds))
            seconds = time.monotonic() - started
            serving = sum(process.cpu_times()[:2]) - before
        cpu, started = time.process_time(), time.monotonic()
        translator.translate([answer.line for answer in answers])
        batch, cpu = time.monotonic() - started, time.process_time() - cpu
        errors = sum(answer.status != 200 for answer in answers)
        cuts = quantiles((answer.seconds for answer in answers), n=20)
        count = len(answers)
        rows.append(
            [number, count, errors, f"{1000 * cuts[9]:.1f}", f"{1000 * cuts[18]:.1f}",
             f"{count / seconds:.0f}", f"{count / batch:.0f}", f"{batch / seconds:.2f}",
             f"{1000 * serving / count:.2f}", f"{1000 * cpu / count:.2f}", f"{cpu / serving:.2f}"]
        )  # fmt: skip
        progress(f"round {number} of {options.rounds}")
    heads = ["round", "answers", "errors", "median, ms", "p95, ms"]
    heads += ["sentences/s", "in batch", "ratio"]
    heads += ["CPU ms for one", "in batch", "ratio"]
    print_table(f"{options.clients} clients for {options.seconds:.0f} s", heads, rows)


if __name__ == "__main__":
    main()
