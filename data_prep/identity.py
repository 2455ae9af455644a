"""What prepared data were made from, so that no later command takes them for something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.config import Preparation
from data_prep.files import DataError, digest_of, read_json, write_json
from data_prep.fingerprints import digests, fingerprints, keep
from data_prep.held_out import Digests, HeldOut, is_settled
from data_prep.stage import CLEAN, FETCH, PREPARED_FROM, SHARDS, read_manifest

REMEDY = "`./run.sh prepare` brings them up to date"

# Where files lie and who does the work is no part of what is made.
NO_PART = {"root", "downloads", "executor", "workers", "scheduler"}


def identity_of(config: Preparation) -> dict[str, Any]:
    """Return all keys of `data` that shape what is prepared, as JSON values."""
    return config.model_dump(mode="json", exclude=NO_PART)


def write_identity(
    config: Preparation, files: Mapping[str, str], test_sets: Digests, run_dir: Path
) -> None:
    """Say what the shards of `run_dir` were made from, now that all stages are up to date.

    :param files: the sha256 of every input file, or the digest of a folder.
    :param test_sets: which the training text was compared with, besides `data.test`.
    """
    content = {
        "data": identity_of(config),
        "files": dict(files),
        "test_sets": dict(test_sets),
        "text": _digest_of_text(run_dir),
    }
    path = run_dir / SHARDS / PREPARED_FROM
    if read_json(path) != content:
        write_json(path, content)


def _digest_of_text(run_dir: Path) -> str | None:
    """Return a digest of what the cleaning stage says of its text; None if there is none."""
    manifest = read_manifest(run_dir / CLEAN)
    return None if manifest is None else digest_of(manifest)


def check_recipe(config: Preparation, run_dir: Path) -> dict[str, str]:
    """Compare what the data of `run_dir` were made from with what the recipe says now, and the
    shards with the text beside them: a preparation that was interrupted may have made it anew.

    :returns: the digests of the input files that they were made from.
    :raises DataError: they differ; it names the key and both values, and what to do.
    """
    shards = run_dir / SHARDS
    made_from = read_json(shards / PREPARED_FROM)
    if not made_from:
        if (shards / "manifest.json").exists():
            raise DataError(f"{shards}: what these data were made from is not known; {REMEDY}")
        raise DataError(f"{shards}: no prepared data here; run `./run.sh prepare` first")
    for key, then, now in differences(made_from["data"], identity_of(config), "data"):
        raise DataError(
            f"{shards} were prepared with {key} {then}, the recipe says {now}; {REMEDY}"
        )
    if made_from.get("text") and _digest_of_text(run_dir) not in (None, made_from["text"]):
        raise DataError(f"{shards} were not made from the text in {run_dir / CLEAN}; {REMEDY}")
    files: dict[str, str] = made_from["files"]
    return files


def check_corpora(config: Preparation, run_dir: Path) -> None:
    """Compare the input files with those that the data of `run_dir` were made from, as far as they
    are at hand: those that are absent cannot have changed.

    :raises DataError: one has changed, or the recipe has (`check_recipe`).
    """
    files = check_recipe(config, run_dir)
    found = fingerprints(config, run_dir / FETCH)
    keep(found, run_dir / FETCH)
    for path, digest in digests(config, found).items():
        if digest != files.get(path):
            raise DataError(
                f"{config.root / path} has changed since {run_dir / SHARDS} were prepared from it; "
                f"{REMEDY}"
            )


def check_test_sets(test_sets: Sequence[HeldOut], run_dir: Path, *, trained: bool) -> None:
    """Compare test sets with those that the training text of `run_dir` was compared with, as far as
    they are at hand.

    :param trained: whether a model has learnt from the text: see `is_settled`.
    :raises DataError: one is new, or has changed or arrived.
    """
    then = read_json(run_dir / SHARDS / PREPARED_FROM).get("test_sets", {})
    for name, digest in ((test_set.name, test_set.digest) for test_set in test_sets):
        if digest is not None and not is_settled(name, digest, then, trained=trained):
            what = "was not among evaluation.test_sets"
            if name in then:
                what = "was another" if then[name] else "was not at hand"
            raise DataError(
                f"test set {name} {what} when {run_dir / SHARDS} were prepared, and so the "
                f"training text may have its sentences; {REMEDY}"
            )


def differences(then: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys whose values differ, with both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() | now.keys()):
            yield from differences(then.get(name), now.get(name), f"{key}.{name}")
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from differences(old, new, f"{key}.{number}")
    elif then != now:
        yield key, _in_words(then), _in_words(now)


def _in_words(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
