"""Measure data preparation as users run it: rate, memory, the binarize stage beside SentencePiece.

    python -m benchmarks.prepare --data ../shared/data [--pairs 500000 4000000] [--rounds 5]

The text is real: all corpora below `--data` (`NAME/train.de` and `.en`, or `.gz`), and, where more
is needed, the same again with a number of its own at the end of every sentence.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path

import psutil

from benchmarks.rounds import (
    CORES,
    create_parser,
    print_table,
    progress,
    ratios,
    spread,
    three_digits,
)
from data_prep.corpora import read_pairs, read_text
from data_prep.stage import SHARDS, VOCABULARY
from data_prep.vocabulary import load_vocabulary

LANGUAGES = ("de", "en")
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
    """Read all training corpora below `data`."""
    sources = sorted({*data.glob("*/train.de"), *data.glob("*/train.de.gz")})
    if not sources:
        sys.exit(f"{data} has no corpora (NAME/train.de and NAME/train.en, or .gz)")
    targets = [source.with_name(source.name.replace(".de", ".en")) for source in sources]
    return [*chain.from_iterable(map(read_pairs, sources, targets))]


def repeated(pairs: Sequence[tuple[str, str]], total: int) -> Iterator[tuple[str, str]]:
    """Return `total` pairs: all of `pairs`, then the same with a number behind each, and again."""
    written = 0
    for copy in count():
        for source, target in pairs:
            if written == total:
                return
            written += 1
            yield (f"{source} {copy}", f"{target} {copy}") if copy else (source, target)


def write_corpus(folder: Path, pairs: Sequence[tuple[str, str]], total: int) -> None:
    """Write a training corpus of `total` pairs, and validation and test sets of one."""
    folder.mkdir(parents=True)
    with (folder / "train.de").open("w") as sources, (folder / "train.en").open("w") as targets:
        for source, target in repeated(pairs, total):
            sources.write(f"{source}\n")
            targets.write(f"{target}\n")
    for split in ("valid", "test"):
        for lang in LANGUAGES:
            (folder / f"{split}.{lang}").write_text("Eins, two, drei: a line of its own.\n")


def prepare(folder: Path, vocabulary: str, size: int) -> tuple[dict[str, float], int]:
    """Run `pipeline.prepare` on the corpus in `folder`.

    :returns: seconds of each stage and of all (`total`), and the peak of the proportional set size
        of all its processes in bytes.
    """
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(run_dir=folder / "run", root=folder / "data", type=vocabulary, size=size)
    )
    log = folder / "log"
    started = time.perf_counter()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.prepare", "--config", str(recipe)], stderr=stderr
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
    said = log.read_text()
    if process.returncode:
        sys.exit(said)
    stages = {name: float(s) for name, s in re.findall(r"prepare: (\w+): done in ([\d.]+) s", said)}
    return {**stages, "total": total}, peak


def against_sentencepiece(folder: Path, vocabulary: str, size: int, rounds: int) -> tuple[str, str]:
    """Time the binarize stage (read, encode, shuffle, write, hash) beside SentencePiece's `encode`.

    :returns: lines/s of the stage, and SentencePiece's time over the stage's.
    """
    sides = [read_text(folder / "data" / f"train.{lang}") for lang in LANGUAGES]
    lines = sum(map(len, sides))
    prepare(folder, vocabulary, size)
    processor = load_vocabulary(folder / "run" / VOCABULARY / "spm.model")
    ours, theirs = [], []
    for number in range(rounds):
        shutil.rmtree(folder / "run" / SHARDS)
        stages, _ = prepare(folder, vocabulary, size)
        ours.append(stages[SHARDS])
        started = time.perf_counter()
        for side in sides:
            processor.encode(side, num_threads=CORES)
        theirs.append(time.perf_counter() - started)
        progress(f"{vocabulary}, round {number + 1} of {rounds}")
    return spread([lines / seconds for seconds in ours], 0), ratios(theirs, ours)


def main() -> None:
    """Measure the command on corpora of several sizes, and print the tables."""
    parser = create_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500_000, 4_000_000])
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--scratch", type=Path, help="folder for some GB of files")
    arguments = parser.parse_args()
    size = arguments.vocab_size
    pairs = real_pairs(arguments.data)
    characters = sum(len(source) + len(target) for source, target in pairs) / len(pairs) / 2
    stages_of, encoding, peaks = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for total in arguments.pairs:
            folder = Path(scratch) / str(total)
            write_corpus(folder / "data", pairs, total)
            stages, peak = prepare(folder, "bpe", size)
            again, _ = prepare(folder, "bpe", size)
            peaks.append(peak)
            rate = total / (stages["total"] - stages[VOCABULARY])
            stages_of.append(
                [
                    f"{total:,}",
                    *(three_digits(seconds) for seconds in stages.values()),
                    f"{rate:,.0f}",
                    three_digits(again["total"]),
                    f"{peak / MIB:,.0f}",
                    f"{peak / peaks[0]:.2f}",
                ]
            )
            progress(f"{total:,} pairs: {stages['total']:.0f} s")
        folder = Path(scratch) / str(arguments.pairs[0])
        for vocabulary in ("bpe", "unigram"):
            cells = against_sentencepiece(folder, vocabulary, size, arguments.rounds)
            encoding.append([vocabulary, *cells])
    header = ["pairs", *(f"{name}, s" for name in stages), "pairs/s without the vocabulary"]
    header += ["same command again, s", "peak memory of all processes, MiB", "over the first"]
    caption = (
        f"The whole command on {CORES} cores, BPE of {size:,}; {len(pairs):,} real pairs of "
        f"{characters:.0f} characters a side, repeated; measured once each"
    )
    print_table(caption, header, stages_of)
    header = ["vocabulary", "lines/s", f"lines/s over `encode` with {CORES} threads"]
    print_table(f"The binarize stage alone, {arguments.pairs[0]:,} pairs", header, encoding)


if __name__ == "__main__":
    main()
