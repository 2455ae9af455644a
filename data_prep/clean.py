"""Cleaning: normalise every training pair, drop bad ones, and count what was dropped and why."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from functools import partial as bind
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.clean_report import (
    EXAMPLES,
    LENGTH_EDGES,
    RATIO_EDGES,
    SCORE,
    draw,
    report_of,
    summary,
)
from data_prep.config import Corpus, DataConfig, TrainingCorpus
from data_prep.corpora import Fetched, Piece, hash_text, read_pairs, read_text
from data_prep.files import DataError, digest_of, save_array, write_json
from data_prep.filters import Language, OverAllCorpora, TestOverlap
from data_prep.held_out import Digests, HeldOut, is_settled
from data_prep.pieces import Result, map_pieces
from data_prep.repeats import find_repeats, rounds_of, write_keys
from data_prep.stage import DIGEST, Record, is_up_to_date, log, read_manifest, run_stage
from data_prep.synthesize import scores_of
from data_prep.text import normalise

VERSION = 4  # raise it when the same settings would clean differently
EXAMPLE_CHARS = 300
DIGESTS: Any = {"source": {"sha256"}, "target": {"sha256"}}  # of pieces; those of files say as much

Pair = tuple[str, str]
Drops = Callable[[str, str], bool]


class CleanedCorpus(Record):
    """The record counts the pairs of a training corpus before and after cleaning."""

    corpus: str
    """Its name."""

    read: int
    kept: int
    dropped: dict[str, int]
    """By filter."""


class Cleaned(NamedTuple):
    """The record holds what later stages need to know of the cleaning stage."""

    pieces: Sequence[Piece]
    """Of the training corpora, as they were fetched."""

    kept: Sequence[int]
    """Pairs left of each piece."""

    corpora: Sequence[CleanedCorpus]
    files: Mapping[str, str]
    """The sha256 of every corpus file."""

    test_sets: Digests
    """Which the training text was compared with, besides `data.test`."""

    digest: str
    """Changes with the manifest of the stage, but for test sets that changed nothing else in it."""


def clean(
    config: DataConfig,
    fetched: Fetched,
    test_sets: Sequence[HeldOut],
    source: Path,
    folder: Path,
    executor: Executor,
    *,
    trained: bool = False,
) -> Cleaned:
    """Write `train/NNNNN/text.LANG` for every piece of the training corpora, and `valid.LANG`,
    `test.LANG`, `report.json` and `report.png` beside them.

    Validation and test text is not filtered; the test set is not even normalised.

    :param test_sets: those besides `data.test`, for the filter `test_overlap`.
    :param source: folder of the fetch stage.
    :param trained: whether a model has learnt from what is there: see `is_settled`.
    :raises DataError: unreadable corpora, or nothing left to train on.
    """
    at_hand = {test_set.name: test_set.digest for test_set in test_sets}
    before = (read_manifest(folder) or {"inputs": {}})["inputs"].get("test_sets", {})
    same = at_hand.keys() == before.keys() and all(
        is_settled(name, digest, before, trained=trained) for name, digest in at_hand.items()
    )
    files = {path: file.sha256 for path, file in fetched.files.items()}
    inputs = {
        "corpora": [corpus.name for corpus in config.train],
        "pieces": [piece.model_dump(exclude=DIGESTS) for piece in fetched.pieces],
        "valid": config.valid.model_dump(),
        "test": config.test.model_dump(),
        "files": files,
        "cleaning": config.cleaning.model_dump(),
        "languages": config.languages,
        "test_sets": before if same else at_hand,
        "version": VERSION,
    }
    if special := _special(config, fetched):
        inputs["special"] = special
    if not is_up_to_date(folder, inputs):
        inputs["test_sets"] = at_hand
    elif arrived := [name for name in before if before[name] is None and at_hand[name]]:
        log.warning(
            "clean: the training text was not compared with %s, which came later: a model has "
            "learnt from it, and `evaluate` will say what they share", ", ".join(arrived),
        )  # fmt: skip
    build = bind(_build, config, fetched, test_sets, source, executor)
    # The texts that scores are of.
    manifest = run_stage(folder, inputs, build, sealed=("valid.*", "test.*"))
    compared = manifest["inputs"].pop("test_sets")
    manifest.pop(DIGEST, None)  # which those are part of
    return Cleaned(
        fetched.pieces,
        manifest["kept"],
        [CleanedCorpus.model_validate(corpus) for corpus in manifest["corpora"]],
        files,
        compared,
        digest_of(manifest),
    )


def _special(config: DataConfig, fetched: Fetched) -> dict[str, Any]:
    """Return what is done to some training corpora and not to others, by their names."""
    keys: Any = {"tag": True, "translate_with": {"filters", "min_score"}}
    return {
        corpus.name: {
            **corpus.model_dump(mode="json", include=keys),
            "text": fetched.synthetic.get(corpus.name),
        }
        for corpus in config.train
        if corpus.tag or corpus.translate_with
    }


def _build(
    config: DataConfig,
    fetched: Fetched,
    test_sets: Sequence[HeldOut],
    source: Path,
    executor: Executor,
    folder: Path,
) -> dict[str, Any]:
    """Write all files of the stage into `folder` and return what to record about them."""
    valid, test = (_read(config, corpus, fetched, source) for corpus in (config.valid, config.test))
    normal_valid, normal_test = (
        [(normalise(s), normalise(t)) for s, t in pairs] for pairs in (valid, test)
    )
    for name, pairs in ((config.valid.name, normal_valid), (config.test.name, test)):
        if not any(source.strip() and target.strip() for source, target in pairs):
            raise DataError(f"{name}: no pair with text on both sides")
    tested = set(normal_test)
    if both := sum(pair in tested for pair in normal_valid):
        log.warning(
            "clean: %d of %d pairs of %s are also in %s, and so help to choose the model",
            both, len(valid), config.valid.name, config.test.name,
        )  # fmt: skip
    held_out = [*normal_valid, *normal_test, *_pairs_of(config, test_sets)]
    hashes = _write_hashes(folder / "scratch-held-out", held_out)
    filtered, kept = _clean_pieces(config, fetched.pieces, hashes, source, executor, folder)
    report = report_of(config, filtered, kept)
    summaries = [summary(corpus) for corpus in report["corpora"]]
    if not report["kept"]:
        raise DataError(f"No training pair is left after cleaning. {'; '.join(summaries)}")
    for split, pairs in (("valid", normal_valid), ("test", test)):
        _write_pairs(folder, split, config, pairs)
    write_json(folder / "report.json", report)
    draw(report, folder / "report.png")
    for line, corpus in zip(summaries, report["corpora"], strict=True):
        nothing = "" if corpus["kept"] else "; nothing of it is trained on"
        log.info("clean: %s%s", line, nothing)
    return {
        "pairs": {"train": report["kept"], "valid": len(valid), "test": len(test)},
        "kept": [piece["kept"] for piece in kept],
        "corpora": [
            CleanedCorpus.model_validate(corpus).model_dump() for corpus in report["corpora"]
        ],
        "report": digest_of(report),
        "text": digest_of([piece["sha256"] for piece in kept]),
    }


def _pairs_of(config: DataConfig, test_sets: Sequence[HeldOut]) -> Iterator[Pair]:
    """Yield the pairs of test sets for the filter `test_overlap`, and log which are not at hand."""
    if not any(isinstance(each, TestOverlap) for each in config.cleaning.filters):
        return
    for test_set in test_sets:
        if test_set.digest is None:
            log.warning(
                "clean: test set %s is not at hand: what the training text has of it stays there; "
                "evaluate counts it", test_set.name,
            )  # fmt: skip
        else:
            yield from test_set.pairs()


def _read(config: DataConfig, corpus: Corpus, fetched: Fetched, source: Path) -> list[Pair]:
    paths = (corpus.source, corpus.target)
    pairs = read_pairs(*(fetched.place(config, source, path) for path in paths))
    fetched.check(config, source, paths)
    return pairs


def _clean_pieces(
    config: DataConfig,
    pieces: Sequence[Piece],
    held_out: Path,
    source: Path,
    executor: Executor,
    folder: Path,
) -> tuple[list[Result], list[Result]]:
    """Write `train/NNNNN` for every piece, after all filters.

    :returns: of each piece, what the filters on one pair did and what those on all pairs did.
    """
    passed = folder / "scratch-filtered"
    filtered = map_pieces(executor, bind(_filter, config, held_out, source), pieces, passed)
    counts = [piece["kept"] for piece in filtered]
    rounds = list(rounds_of(config.cleaning.filters))
    fates = find_repeats(executor, rounds, passed, counts, folder / "scratch-repeats")
    keep = bind(_keep, config, passed, fates, [each.filter for each in rounds])
    tags = [config.train[piece.corpus].tag for piece in pieces]
    return filtered, map_pieces(executor, keep, list(enumerate(tags)), folder / "train")


# ── Filters that look at one pair ───────────────────────────────────────────────────────────────


def _write_hashes(folder: Path, pairs: Sequence[Pair]) -> Path:
    """Write the hashes of both sides of pairs to a file that is named after them.

    Workers keep what `_hashes` has read, and so other pairs need a file of another name.
    """
    hashes = np.array([[hash_text(side) for side in pair] for pair in pairs], np.uint64)
    path = folder / f"{digest_of(hashes.tolist())[:16]}.npy"
    folder.mkdir(exist_ok=True)
    save_array(path, hashes)
    return path


def _filter(
    config: DataConfig,
    held_out: Path,
    source: Path,
    piece: Piece,
    folder: Path,
) -> dict[str, Any]:
    """Write the normalised text of a piece that passes and keys to find repeats by; count it."""
    corpus = config.train[piece.corpus]
    pairs = list(
        zip(
            piece.lines(piece.source, config, source),
            piece.lines(piece.target, config, source),
            strict=True,
        )
    )
    filters = _filters(config, corpus, held_out)
    dropped: dict[str, list[Pair]] = {name: [] for name in filters}
    if corpus.translate_with and (least := corpus.translate_with.min_score) is not None:
        high = scores_of(corpus, piece, config, source) >= least
        dropped = {SCORE: list(compress(pairs, ~high)), **dropped}
        pairs = list(compress(pairs, high))
    kept: list[Pair] = []
    for pair in pairs:
        for name, drops in filters.items():
            if drops(*pair):
                dropped[name].append(pair)
                break
        else:
            kept.append(pair)
    _write_pairs(folder, "text", config, kept)
    write_keys(folder, kept, list(rounds_of(config.cleaning.filters)))
    return {"corpus": piece.corpus, "read": piece.pairs, "kept": len(kept), **_tally(dropped)}


@cache
def _hashes(held_out: Path) -> tuple[frozenset[int], frozenset[int]]:
    """Return hashes of the source sides and of the target sides of validation and test set."""
    sources, targets = np.load(held_out).T.tolist()
    return frozenset(sources), frozenset(targets)


def _filters(config: DataConfig, corpus: TrainingCorpus, held_out: Path) -> dict[str, Drops]:
    """Return the filters of a corpus that look at one pair, by name, in order."""
    sources, targets = _hashes(held_out)
    filters: dict[str, Drops] = {}
    for each in config.filters_of(corpus):
        if isinstance(each, TestOverlap):
            filters[each.filter] = lambda s, t: hash_text(s) in sources or hash_text(t) in targets
        elif isinstance(each, Language):
            filters[each.filter] = each.drops_between(*config.languages)
        elif not isinstance(each, OverAllCorpora):
            filters[each.filter] = each.drops
    return filters


def _tally(dropped: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Return how many pairs each filter dropped, and the first of them as examples."""
    return {
        "dropped": {name: len(pairs) for name, pairs in dropped.items()},
        "examples": {
            name: [[side[:EXAMPLE_CHARS] for side in pair] for pair in pairs[:EXAMPLES]]
            for name, pairs in dropped.items()
        },
    }


# ── Filters that look at all pairs ──────────────────────────────────────────────────────────────


def _keep(
    config: DataConfig,
    passed: Path,
    fates: Path,
    reasons: Sequence[str],
    piece_and_tag: tuple[int, str | None],
    folder: Path,
) -> dict[str, Any]:
    """Write the text of a piece that is no repeat, its sources behind their tag, and return counts
    and histograms of it."""
    piece, tag = piece_and_tag
    sides = [read_text(passed / f"{piece:05d}" / f"text.{lang}") for lang in config.languages]
    dropped: dict[str, list[Pair]] = {name: [] for name in reasons}
    kept: list[Pair] = []
    fate = np.load(fates / f"{piece:05d}.npy").tolist()
    for pair, number in zip(zip(*sides, strict=True), fate, strict=True):
        (dropped[reasons[number - 1]] if number else kept).append(pair)
    tagged = [(f"{tag} {source}", target) for source, target in kept] if tag else kept
    sha256 = _write_pairs(folder, "text", config, tagged)
    lengths = np.array([[len(s), len(t)] for s, t in kept], np.int64).reshape(-1, 2)
    histograms = {
        key: np.histogram(values.clip(max=edges[-1]), edges)[0].tolist()
        for key, values, edges in (
            ("source_chars", lengths[:, 0], LENGTH_EDGES),
            ("target_chars", lengths[:, 1], LENGTH_EDGES),
            ("ratio", lengths[:, 1] / np.maximum(lengths[:, 0], 1), RATIO_EDGES),
        )
    }
    return {"kept": len(kept), "sha256": sha256, **_tally(dropped), **histograms}


def _write_pairs(folder: Path, name: str, config: DataConfig, pairs: Sequence[Pair]) -> str:
    """Write a file for each side of pairs, and return the sha256 of both together."""
    digest = hashlib.sha256()
    for side, lang in enumerate(config.languages):
        text = "".join(f"{pair[side]}\n" for pair in pairs).encode()
        (folder / f"{name}.{lang}").write_bytes(text)
        digest.update(text)
    return digest.hexdigest()
