"""Finding images: the files are made available, listed and labelled; IDX files are unpacked.

A folder `NNNNN` for each set holds `images.npy` and `labels.npy` of IDX files, or `files.arrow`:
paths, labels, why a file cannot be an image, and the sha256 of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.arrow import write_rows
from data_prep.downloads import download
from data_prep.files import DataError, sha256_of
from data_prep.fingerprints import (
    NO_FILE,
    Fingerprint,
    digests,
    entries_of,
    fingerprints,
    keep,
    was_changed,
)
from data_prep.images.config import MAX_CLASSES, ImagesConfig, ImageSet
from data_prep.images.idx import load_idx, unpack_idx
from data_prep.stage import DIGEST, Record, run_stage

SUFFIXES = {".jpg", ".jpeg", ".png"}
VERSION = 3  # raise it when the same files would be listed differently


class FetchedSet(Record):
    """The record says what is in a set of images."""

    split: str
    """The split it belongs to: train, valid or test."""

    name: str
    images: int
    """Images, or files that may be some."""

    classes: tuple[int, ...]
    """Classes of which it must have an image: those that have a folder."""


class Fetched(Record):
    """The record holds what the shards stage needs to know of the fetch stage."""

    classes: tuple[str, ...]
    """Names of the classes, by their numbers."""

    sets: tuple[FetchedSet, ...]
    files: dict[str, str]
    """The sha256 of every IDX file, and a digest of every folder."""

    digest: str
    """Of all that was recorded."""


def fetch(config: ImagesConfig, folder: Path) -> Fetched:
    """Make all images available, record which there are, and give each the number of its class.

    Files are looked for below `config.root`, then downloaded.

    :raises DataError: a file or folder is missing or is not what the recipe says.
    """
    download(config, _missing(config), "Image files")
    found = fingerprints(config, folder)
    files = digests(config, found)
    inputs = {
        "sets": [[split, each.name, *each.paths] for split, each in config.sets()],
        "classes": config.classes,
        "files": files,
        "version": VERSION,
    }

    def build(partial: Path) -> dict[str, Any]:
        places = []
        for number, (_, each) in enumerate(config.sets()):
            places.append(partial / f"{number:05d}")
            places[-1].mkdir(exist_ok=True)
            if each.folder is None:
                _unpack(config.root, each, places[-1], files)
        classes = _classes(config, places)
        _check_names(classes)
        if len(classes) < 2:
            raise DataError(f"There is one class only, {classes[0]}; expected two or more")
        sets = [
            _label(config, split, each, classes, found, place)
            for (split, each), place in zip(config.sets(), places, strict=True)
        ]
        return {
            "classes": classes,
            "sets": [each.model_dump() for each in sets],
            "files": files,
        }

    made = run_stage(folder, inputs, build)
    keep(found, folder)
    return Fetched.model_validate({**made, "digest": made[DIGEST]})


def _missing(config: ImagesConfig) -> list[str]:
    """Return the files and folders that the recipe names and that are not below `data.root`."""
    missing = []
    for _, each in config.sets():
        for path in each.paths:
            place = config.root / path
            if not (place.is_file() if each.folder is None else place.is_dir()):
                missing.append(path)
    return sorted(set(missing))


def _unpack(root: Path, idx: ImageSet, place: Path, found: Mapping[str, str]) -> None:
    """Unpack a pair of IDX files to `images.npy` and `labels.npy`.

    :param found: the sha256 of the files that were found.
    :raises DataError: one is damaged or is another by now, or they do not belong together.
    """
    assert idx.images is not None
    assert idx.labels is not None
    images = unpack_idx(root / idx.images, place / "images.npy", 3, "images")
    labels = unpack_idx(root / idx.labels, place / "labels.npy", 1, "labels")
    if images[0] != labels[0]:
        raise DataError(
            f"{root / idx.images} has {images[0]} images but {root / idx.labels} has {labels[0]} "
            "labels; name two files that belong together"
        )
    for path in idx.paths:
        if sha256_of(root / path) != found[path]:
            raise was_changed(root / path)


def _classes(config: ImagesConfig, places: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the classes, by their numbers.

    :param places: the folder of each set.
    :raises DataError: there are none, or too many.
    """
    if config.classes is not None:
        return config.classes
    if config.train[0].folder is None:
        trained = zip(config.train, places, strict=False)
        largest = max(int(load_idx(place / "labels.npy").max()) for _, place in trained)
        return tuple(map(str, range(largest + 1)))
    folders = [config.root / str(each.folder) for each in config.train]
    classes = sorted({name for folder in folders for name in _class_folders(folder)})
    if not 0 < len(classes) <= MAX_CLASSES:
        raise DataError(
            f"{folders[0]} has {len(classes)} folders; expected one for each class, with its images"
        )
    return tuple(classes)


def _check_names(classes: Sequence[str]) -> None:
    """Check that lists of classes can have one a line, and tables a column of them.

    :raises DataError: a name has a character that is none to see.
    """
    if bad := [name for name in classes if not name.isprintable()]:
        raise DataError(
            f"The name of class {bad[0]!r} has a tab, a line end or another character that cannot "
            "be seen; rename it"
        )


def _class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, but not of hidden ones."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _label(
    config: ImagesConfig,
    split: str,
    images: ImageSet,
    classes: Sequence[str],
    found: Mapping[str, Fingerprint],
    place: Path,
) -> FetchedSet:
    """Give each image of a set the number of its class.

    :raises DataError: an image has a class that is not among `classes`.
    """
    if images.folder is not None:
        rows, own = _list_folder(config.root, images.folder, classes, found)
        if not rows:
            raise DataError(f"{config.root / images.folder}: no images here")
        columns = [pa.array(column) for column in zip(*rows, strict=True)]
        write_rows(
            place / "files.arrow",
            pa.record_batch(columns, names=["path", "label", "refused", "sha256"]),
        )
        return FetchedSet(split=split, name=images.name, images=len(rows), classes=tuple(own))
    labels = load_idx(place / "labels.npy")
    if (beyond := np.flatnonzero(labels >= len(classes))).size:
        raise DataError(
            f"{config.root / str(images.labels)}: image {beyond[0]} has the label "
            f"{labels[beyond[0]]}, but there are {len(classes)} classes, from 0 to "
            f"{len(classes) - 1} ({len(beyond)} such images); correct data.classes, or the file"
        )
    return FetchedSet(split=split, name=images.name, images=len(labels), classes=())


def _list_folder(
    root: Path, folder: str, classes: Sequence[str], found: Mapping[str, Fingerprint]
) -> tuple[list[tuple[str, int, str, str]], list[int]]:
    """Return path, label, reason to refuse it (or nothing) and sha256 of each file, and the labels
    of all folders.

    :raises DataError: a folder has the name of no class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    folders = _class_folders(root / folder)
    if unknown := [name for name in folders if name not in numbers]:
        raise DataError(
            f"{root / folder / unknown[0]}: there is no class of that name; the classes are those "
            f"of data.classes, or the folders of data.train: {', '.join(classes[:9])}"
            f"{'…' if len(classes) > 9 else ''}"
        )
    rows = []
    for path, file in entries_of(folder, found):
        inside = PurePosixPath(path).relative_to(folder).parts
        if len(inside) == 1 and inside[0] in numbers and inside[0] in folders:
            continue  # the folder of a class that has no files
        label, reason = -1, ""
        if len(inside) == 1 or inside[0] not in numbers:
            reason = "not in the folder of a class"
        else:
            label = numbers[inside[0]]
            if file.sha256 == NO_FILE and (root / path).is_dir():
                reason = "a folder in the folder of a class"
            elif PurePosixPath(path).suffix.lower() not in SUFFIXES:
                reason = "another suffix"
        rows.append((path, label, reason, file.sha256))
    return rows, [numbers[name] for name in folders]
