"""Show what prepared data holds: statistics, decoded samples, and whether it is intact.

python -m data_prep.inspect RUN_DIR [--samples 5 [--seed 1] | --pairs NUMBER...]

Of images it shows counts; `RUN_DIR/shards/report.png` shows some of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sentencepiece import SentencePieceProcessor

from data_prep.batch_plan import BatchPlan
from data_prep.files import DataError
from data_prep.images.inspect import inspect_images
from data_prep.shards import CorpusInfo, Counts, ShardReader, ShardsManifest
from data_prep.stage import SHARDS, read_manifest
from data_prep.vocabulary import load_vocabularies

MICRO_BATCH_TOKENS = 4096
LENGTHS = {"median": 50, "90%": 90, "99%": 99, "longest": 100}  # percentiles


def show_pairs(folder: Path, numbers: list[int]) -> None:
    """Print training pairs, decoded.

    :param numbers: count from 0, in the order of the shards; files in RUN_DIR/nonfinite name them.
    :raises DataError: there are no shards, or no such pair.
    """
    train = ShardReader(folder, "train")
    for number in numbers:
        if not 0 <= number < len(train):
            raise DataError(f"{folder} has no training pair {number}; the last is {len(train) - 1}")
    Console().print(_pairs(train, load_vocabularies(folder), numbers, "Pairs of train"))


def inspect(folder: Path, samples: int, seed: int) -> None:
    """Print all about the shards in `folder`.

    :param samples: number of training pairs to decode.
    :param seed: decides which pairs those are.
    :raises DataError: there are no shards, or one is not what the manifest says.
    """
    readers = {
        split: ShardReader(folder, split, verify=True) for split in ("train", "valid", "test")
    }
    train = readers["train"]
    data = train.data
    source, target = load_vocabularies(folder)
    console = Console()
    console.print(Text(f"{folder}: {' → '.join(data.languages)}", style="bold"))
    console.print(_splits(readers))
    console.print(_corpora(data))
    sizes = [f"{len(vocabulary):,}" for vocabulary in (source, target)]
    tokens = f"{sizes[0]} joint" if source is target else f"{sizes[0]} source, {sizes[1]} target"
    plan = BatchPlan(
        *train.lengths(), max_tokens=MICRO_BATCH_TOKENS, micro_batch_tokens=None, seed=seed
    )
    megabytes = sum((folder / shard.name).stat().st_size for shard in data.shards) / 1e6
    too_long = sum(corpus.too_long for corpus in data.corpora)
    for line in (
        f"dropped for data.max_tokens_per_side: {too_long:,} training pairs",
        f"vocabulary: {tokens} tokens, sha256 {data.vocabulary.sha256[:12]}…",
        *(
            f"{side}: {lost.lines:,} lines have what the vocabulary does not give back: {lost}"
            for side, lost in data.lost.items()
            if lost.lines
        ),
        *(
            f"{corpus.corpus}.{lang}: the vocabulary lacks {unknown}"
            for corpus in data.corpora
            for lang, unknown in corpus.unknown.items()
            if unknown.unknown_tokens
        ),
        f"padding: {plan.padding_share():.1%} of an epoch at {MICRO_BATCH_TOKENS:,} tokens a "
        "micro-batch",
        f"checksums: all {len(data.shards):,} shards ({megabytes:,.1f} MB) and the "
        "vocabulary are as the manifest says",
    ):
        console.print(Text(line))
    if samples:
        generator = np.random.default_rng(seed)
        drawn = generator.choice(len(train), min(samples, len(train)), replace=False)
        shown = sorted(drawn.tolist())
        console.print(_pairs(train, (source, target), shown, "Samples of train"))


def _pairs(
    train: ShardReader,
    vocabularies: tuple[SentencePieceProcessor, SentencePieceProcessor],
    numbers: list[int],
    title: str,
) -> Table:
    table = Table("pair", *train.data.languages, title=title, show_lines=True)
    for number in numbers:
        texts = (
            vocabulary.decode(ids.tolist())
            for vocabulary, ids in zip(vocabularies, train[number], strict=True)
        )
        table.add_row(f"{number:,}", *map(Text, texts))
    return table


def _splits(readers: dict[str, ShardReader]) -> Table:
    data = readers["train"].data
    table = Table(title="Splits", caption="lengths in tokens, EOS included")
    for name in ("split", "shards", "pairs", "side", "tokens", *LENGTHS):
        table.add_column(name, justify="left" if name in ("split", "side") else "right")
    for split, reader in readers.items():
        first = [split, f"{len(data.of_split(split)):,}", f"{len(reader):,}"]
        for language, lengths in zip(data.languages, reader.lengths(), strict=True):
            table.add_row(*first, language, f"{lengths.sum():,}", *_percentiles(lengths))
            first = ["", "", ""]
    return table


def _percentiles(lengths: NDArray[np.int32]) -> list[str]:
    if not len(lengths):
        return []
    return [str(np.percentile(lengths, share, method="nearest")) for share in LENGTHS.values()]


def _corpora(data: ShardsManifest) -> Table:
    table = Table(
        title="Training corpora", caption="tokens: source and target, % of those in the shards"
    )
    for name in ("corpus", "read", "kept", "weight", "in shards", "tokens", "dropped"):
        table.add_column(name, justify="left" if name in ("corpus", "dropped") else "right")
    train = data.totals["train"]
    for corpus in data.corpora:
        dropped = [f"{name} {count:,}" for name, count in corpus.dropped.items() if count]
        table.add_row(
            Text(corpus.corpus),
            f"{corpus.read:,}",
            f"{corpus.kept:,}",
            f"{corpus.weight:g}",
            f"{corpus.pairs:,}",
            f"{_tokens(corpus) / _tokens(train):.1%}",
            ", ".join(dropped) or "nothing",
        )
    return table


def _tokens(counts: Counts | CorpusInfo) -> int:
    return counts.source_tokens + counts.target_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="inspect",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="of ./run.sh prepare")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--samples", type=int, default=5, help="pairs to decode [default 5]")
    shown.add_argument("--pairs", type=int, nargs="+", metavar="NUMBER", help="decode these alone")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of pairs [default 1]")
    arguments = parser.parse_args()
    if min(arguments.samples, arguments.seed) < 0:
        parser.error("--samples and --seed must not be negative")
    try:
        shards = arguments.run_dir / SHARDS
        if "classes" in (read_manifest(shards) or {}):
            if arguments.pairs:
                parser.error(f"--pairs is of text, and {shards} has images")
            inspect_images(shards)
        elif arguments.pairs:
            show_pairs(shards, arguments.pairs)
        else:
            inspect(shards, arguments.samples, arguments.seed)
    except (DataError, OSError) as error:
        sys.exit(f"inspect: error: {error}")
    except KeyboardInterrupt:
        sys.exit("inspect: error: interrupted")


if __name__ == "__main__":
    main()
