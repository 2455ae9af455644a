"""Data preparation, measured as it is run: rate, memory, the binarize stage beside SentencePiece.

    python -m benchmarks.prepare --data ../shared/data [--pairs 1000000] [--memory 500000 4000000]

The text is real: all corpora below `--data` (`NAME/train.de.gz` and `.en.gz`), and, where more is
needed, the same again with a number of its own at the end of every sentence.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import psutil
from sentencepiece import SentencePieceProcessor

from benchmarks.rounds import spread

LANGUAGES = ("de", "en")
CORES = len(os.sched_getaffinity(0))
MIB = 1 << 20

RECIPE = """
run_dir: {run_dir}
data:
  root: {root}
  train:
    - {{name: corpus, source: train.de, target: train.en}}
  valid: {{name: valid, source: valid.de, target: valid.en}}
  test: {{name: test, source: test.de, target: test.en}}
  vocabulary: {{type: {type}, size: {size}}}
"""


def real_pairs(data: Path) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for source in sorted(data.glob("*/train.de.gz")):
        target = source.with_name("train.en.gz")
        sides = [gzip.decompress(path.read_bytes()).decode() for path in (source, target)]
        pairs += zip(*(side.split("\n")[:-1] for side in sides), strict=True)
    return pairs


def repeated(pairs: Sequence[tuple[str, str]], total: int) -> Iterator[tuple[str, str]]:
    written = 0
    for copy in count():
        for source, target in pairs:
            if written == total:
                return
            written += 1
            yield (f"{source} {copy}", f"{target} {copy}") if copy else (source, target)


def write_corpus(folder: Path, pairs: Sequence[tuple[str, str]], total: int) -> None:
    folder.mkdir(parents=True)
    with (folder / "train.de").open("w") as sources, (folder / "train.en").open("w") as targets:
        for source, target in repeated(pairs, total):
            sources.write(f"{source}\n")
            targets.write(f"{target}\n")
    for split in ("valid", "test"):
        for lang in LANGUAGES:
            (folder / f"{split}.{lang}").write_text("Eins, two, drei: a line of its own.\n")


def prepare(
    folder: Path, vocabulary: str, size: int, *options: str
) -> tuple[dict[str, float], int]:
    """Run the command.

    :returns: seconds of each stage and of all (`total`), and the peak of the proportional set size
        of all its processes in bytes.
    """
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(run_dir=folder / "run", root=folder / "data", type=vocabulary, size=size)
    )
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.prepare", "--config", str(recipe), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        members = [tree, *tree.children(recursive=True)]
        now = 0
        for member in members:
            try:
                now += member.memory_full_info().pss
            except psutil.Error:  # just ended
                continue
        peak = max(peak, now)
        time.sleep(0.1)
    total = time.perf_counter() - started
    assert process.stderr is not None
    said = process.stderr.read()
    if process.returncode:
        sys.exit(said)
    stages = {name: float(s) for name, s in re.findall(r"(\w+): done in ([\d.]+) s", said)}
    return {**stages, "total": total}, peak


def against_sentencepiece(folder: Path, pairs: int, vocabulary: str, rounds: int) -> None:
    """The binarize stage (read, encode, shuffle, write, hash) beside `encode` alone."""
    lines = [(folder / "data" / f"train.{lang}").read_text().split("\n")[:-1] for lang in LANGUAGES]
    ratios, rates = [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "run", ignore_errors=True)
        stages, _ = prepare(folder, vocabulary, 16000)
        model = folder / "run" / "vocabulary" / "spm.model"
        processor = SentencePieceProcessor(model_file=str(model))
        started = time.perf_counter()
        for side in lines:
            processor.encode(side, num_threads=CORES)
        theirs = time.perf_counter() - started
        rates.append(2 * pairs / stages["shards"])
        ratios.append(theirs / stages["shards"])
    row(
        f"binarize stage, {pairs:,} pairs, {vocabulary}, lines/s over "
        f"`SentencePieceProcessor.encode` with {CORES} threads",
        spread(ratios, 2),
        f"{statistics.median(rates):,.0f} lines/s",
    )


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--memory", type=int, nargs=2, default=(500_000, 4_000_000))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for some GB of files")
    arguments = parser.parse_args()
    pairs = real_pairs(arguments.data)
    characters = sum(len(source) + len(target) for source, target in pairs) / len(pairs) / 2
    print(f"{len(pairs):,} real pairs of {characters:.0f} characters a side; {CORES} cores\n")
    row("what", "measured", "")
    row("---", "---", "---")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for vocabulary in ("bpe", "unigram"):
            folder = Path(scratch) / vocabulary
            write_corpus(folder / "data", pairs, arguments.memory[0])
            against_sentencepiece(folder, arguments.memory[0], vocabulary, arguments.rounds)
        folder = Path(scratch) / "rate"
        write_corpus(folder / "data", pairs, arguments.pairs)
        stages, _ = prepare(folder, "bpe", 32000)
        rate = arguments.pairs / (stages["total"] - stages["vocabulary"])
        shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items())
        row(
            f"prepare of {arguments.pairs:,} pairs without the vocabulary",
            f"{rate:,.0f} pairs/s",
            shares,
        )
        again, _ = prepare(folder, "bpe", 32000)
        row("the same command again", f"{again['total']:.1f} s", "")
        peaks = []
        for total in arguments.memory:
            folder = Path(scratch) / f"memory-{total}"
            write_corpus(folder / "data", pairs, total)
            stages, peak = prepare(folder, "bpe", 32000)
            peaks.append(peak)
            row(
                f"peak memory of all processes, {total:,} pairs",
                f"{peak / MIB:,.0f} MiB",
                f"{stages['total']:.0f} s, {stages['vocabulary']:.0f} s of them the vocabulary",
            )
        row("peak memory, the larger over the smaller", f"{peaks[1] / peaks[0]:.2f}", "")


if __name__ == "__main__":
    main()
