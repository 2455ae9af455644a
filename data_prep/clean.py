"""Cleaning: normalise every training pair, drop bad ones, and count what was dropped and why."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import CleaningConfig, Corpus, DataConfig
from data_prep.corpora import hash_text, read_pairs
from data_prep.stage import DataError, Manifest, digest_of, log, run_stage, write_json

VERSION = 1  # raise it when the same settings would clean differently
EXAMPLES = 5
SHORT_SIDE = 20  # characters; below it a length ratio says little

Pair = tuple[str, str]
Filter = Callable[[str, str], bool]  # True drops the pair

_INVISIBLE = re.compile(r"[\u0000-\u0008\u000b\u000e-\u001f\u007f-\u009f\u200b\u2060\ufeff\ufffd]")


def normalise(text: str) -> str:
    """Unicode NFC, no control characters, single spaces."""
    return " ".join(_INVISIBLE.sub(" ", unicodedata.normalize("NFC", text)).split())


def clean(config: DataConfig, fetched: Manifest, source: Path, folder: Path) -> Manifest:
    """Write train, valid and test as plain text, `report.json` beside them.

    :param source: folder of the fetch stage; generated files are in it.

    Validation and test text is not filtered; the test set is not even normalised.

    :raises DataError: unreadable corpora, or nothing left to train on.
    """
    files = fetched["files"]
    inputs = {
        "corpora": [corpus.model_dump() for corpus in config.train],
        "valid": config.valid.model_dump(),
        "test": config.test.model_dump(),
        "files": {path: file["sha256"] for path, file in files.items()},
        "cleaning": config.cleaning.model_dump(),
        "languages": config.languages,
        "version": VERSION,
    }

    def pairs_of(corpus: Corpus) -> Iterator[Pair]:
        paths = (source / files[side]["path"] for side in (corpus.source, corpus.target))
        return read_pairs(*paths)

    def build(partial: Path) -> dict[str, Any]:
        def write(split: str, pairs: Iterable[Pair]) -> int:
            return _write_pairs(partial, split, config, pairs)

        valid = [(normalise(s), normalise(t)) for s, t in pairs_of(config.valid)]
        test = list(pairs_of(config.test))
        for name, pairs in ((config.valid.name, valid), (config.test.name, test)):
            if not any(source.strip() and target.strip() for source, target in pairs):
                raise DataError(f"{name}: no pair with text on both sides")
        held_out = [*valid, *((normalise(s), normalise(t)) for s, t in test)]
        filters = _filters(config.cleaning, held_out)
        reports: list[dict[str, Any]] = []
        kept = write(
            "train",
            (p for c in config.train for p in _filtered(c.name, pairs_of(c), filters, reports)),
        )
        if not kept:
            reasons = "; ".join(_summary(report) for report in reports)
            raise DataError(f"No training pair is left after cleaning. {reasons}")
        counts = {"train": kept, "valid": write("valid", valid), "test": write("test", test)}
        write_json(partial / "report.json", {"corpora": reports, "kept": kept})
        for report in reports:
            log.info("clean: %s", _summary(report))
        summary = [{key: report[key] for key in report if key != "examples"} for report in reports]
        return {"pairs": counts, "corpora": summary, "report": digest_of(reports)}

    return run_stage(folder, inputs, build)


def _filters(config: CleaningConfig, held_out: list[Pair]) -> dict[str, Filter]:
    """The filters by name, in order. Stateful ones see only what the ones before let through."""

    def ratio(source: str, target: str) -> float:
        lengths = sorted(max(len(side), SHORT_SIDE) for side in (source, target))
        return lengths[1] / lengths[0]

    seen: set[int] = set()

    def duplicate(source: str, target: str) -> bool:
        pair = hash_text(f"{source}\n{target}")
        known = pair in seen
        seen.add(pair)
        return known

    sources, targets = (set(map(hash_text, sides)) for sides in zip(*held_out, strict=True))
    filters: dict[str, Filter] = {
        "empty_side": lambda s, t: not s or not t,
        "too_long": lambda s, t: max(len(s), len(t)) > config.max_chars,
        "length_ratio": lambda s, t: ratio(s, t) > config.max_length_ratio,
    }
    if config.drop_identical_sides:
        filters["identical_sides"] = lambda s, t: s == t
    if config.drop_test_overlap:
        filters["test_overlap"] = lambda s, t: hash_text(s) in sources or hash_text(t) in targets
    if config.drop_duplicates:
        filters["duplicate"] = duplicate
    return filters


def _filtered(
    name: str, pairs: Iterator[Pair], filters: dict[str, Filter], reports: list[dict[str, Any]]
) -> Iterator[Pair]:
    """The pairs that pass, normalised; appends the corpus's counts to `reports` at the end."""
    dropped = dict.fromkeys(filters, 0)
    examples: dict[str, list[Pair]] = {reason: [] for reason in filters}
    kept = read = 0
    for raw_source, raw_target in pairs:
        read += 1
        source, target = normalise(raw_source), normalise(raw_target)
        reason = next((name for name, drops in filters.items() if drops(source, target)), None)
        if reason is None:
            kept += 1
            yield source, target
        else:
            dropped[reason] += 1
            if len(examples[reason]) < EXAMPLES:
                examples[reason].append((source, target))
    reports.append(
        {"corpus": name, "read": read, "kept": kept, "dropped": dropped, "examples": examples}
    )


def _summary(report: dict[str, Any]) -> str:
    dropped = ", ".join(f"{count} {why}" for why, count in report["dropped"].items() if count)
    return f"{report['corpus']}: kept {report['kept']} of {report['read']} pairs" + (
        f" (dropped: {dropped})" if dropped else ""
    )


def _write_pairs(folder: Path, split: str, config: DataConfig, pairs: Iterable[Pair]) -> int:
    source_path, target_path = (folder / f"{split}.{lang}" for lang in config.languages)
    count = 0
    with (
        source_path.open("w", encoding="utf-8", newline="\n") as sources,
        target_path.open("w", encoding="utf-8", newline="\n") as targets,
    ):
        for source, target in pairs:
            sources.write(source + "\n")
            targets.write(target + "\n")
            count += 1
    return count
