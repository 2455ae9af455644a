"""Binarize: cleaned text and a vocabulary become shards of token ids."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.config import DataConfig
from data_prep.corpora import read_pairs
from data_prep.shards import write_shard
from data_prep.stage import DataError, Manifest, digest_of, log, run_stage, sha256_of
from data_prep.vocabulary import EOS_IDX, load_vocabulary

VERSION = 1  # raise it when the same inputs would give other bytes
SPLITS = ("train", "valid", "test")


def binarize(
    config: DataConfig,
    cleaned: Manifest,
    vocabulary: Manifest,
    text: Path,
    model: Path,
    folder: Path,
) -> Manifest:
    """Write `SPLIT-NNNNN.arrow` for every split, and `spm.model` beside them.

    Training pairs over `max_tokens_per_side` are dropped and counted; validation and test pairs
    are cut to it.

    :returns: manifest with `shards` (pairs, tokens and sha256 of each), `vocabulary`, `totals`.
    """
    inputs = {
        "cleaned": digest_of(cleaned),
        "vocabulary": vocabulary["sha256"],
        "max_tokens_per_side": config.max_tokens_per_side,
        "pairs_per_shard": config.pairs_per_shard,
        "version": VERSION,
    }

    def build(partial: Path) -> dict[str, Any]:
        shutil.copyfile(model, partial / "spm.model")
        shards: list[dict[str, Any]] = []
        too_long = 0
        for split in SPLITS:
            for records, dropped in _encoded(config, split, text, model):
                too_long += dropped
                if records:
                    name = f"{split}-{len([s for s in shards if s['split'] == split]):05d}.arrow"
                    source, target = zip(*records, strict=True)
                    write_shard(partial / name, source, target, vocabulary["size"])
                    shards.append(
                        {
                            "name": name,
                            "split": split,
                            "pairs": len(records),
                            "source_tokens": sum(map(len, source)),
                            "target_tokens": sum(map(len, target)),
                            "sha256": sha256_of(partial / name),
                        }
                    )
        totals = {split: _total(shards, split) for split in SPLITS}
        if not totals["train"]["pairs"]:
            raise DataError(
                f"All {too_long} training pairs are longer than data.max_tokens_per_side "
                f"({config.max_tokens_per_side})"
            )
        log.info("shards: %s", ", ".join(f"{n} {t['pairs']} pairs" for n, t in totals.items()))
        if too_long:
            log.info("shards: dropped %d training pairs over the token limit", too_long)
        return {
            "languages": config.languages,
            "vocabulary": {"size": vocabulary["size"], "sha256": vocabulary["sha256"]},
            "totals": totals,
            "corpora": cleaned["corpora"],
            "files": cleaned["inputs"]["files"],
            "dropped_too_long": too_long,
            "seed": config.seed,
            "versions": {"pyarrow": pa.__version__, **vocabulary["versions"]},
            "shards": shards,
        }

    return run_stage(folder, inputs, build)


def _total(shards: list[dict[str, Any]], split: str) -> dict[str, int]:
    return {
        key: sum(shard[key] for shard in shards if shard["split"] == split)
        for key in ("pairs", "source_tokens", "target_tokens")
    }


def _encoded(
    config: DataConfig, split: str, text: Path, model: Path
) -> Iterator[tuple[list[tuple[list[int], list[int]]], int]]:
    """Shards of encoded pairs, each with the number of pairs dropped for length."""
    vocabulary = load_vocabulary(model)
    limit = config.max_tokens_per_side
    pairs = read_pairs(*(text / f"{split}.{lang}" for lang in config.languages))
    while chunk := list(islice(pairs, config.pairs_per_shard)):
        sides = [
            vocabulary.encode(list(side), add_eos=True, num_threads=-1)
            for side in zip(*chunk, strict=True)
        ]
        encoded = list(zip(*sides, strict=True))
        if split == "train":
            kept = [(s, t) for s, t in encoded if len(s) <= limit and len(t) <= limit]
        else:
            kept = [(_cut(s, limit), _cut(t, limit)) for s, t in encoded]
        yield kept, len(encoded) - len(kept)


def _cut(ids: list[int], limit: int) -> list[int]:
    return ids if len(ids) <= limit else [*ids[: limit - 1], EOS_IDX]
