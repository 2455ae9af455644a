"""A vocabulary that a recipe takes from elsewhere: an export, a run, SentencePiece files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from data_prep.config import DataConfig, VocabularyConfig
from data_prep.files import DataError, read_json, sha256_of
from data_prep.stage import SHARDS, VOCABULARY, log, run_stage
from data_prep.text import JOINT, SEPARATE, UNK_IDX, vocabulary_files
from data_prep.vocabulary import (
    PreparedVocabulary,
    digest_of_files,
    facts_of,
    load_vocabulary,
    vocabulary_digest,
)

KEY = "data.vocabulary.from"
EXPORT = "export.json"  # with `task`, `source_lang`, `target_lang`: models/export_format.py


class AbsentVocabulary(DataError):
    """There is no vocabulary where the recipe takes one."""


class _Found(NamedTuple):
    """The record says which vocabulary a recipe takes."""

    files: list[Path]
    """Of a joint vocabulary, or of the source's and the target's."""

    languages: tuple[str, str] | None
    """Source and target language that it was made for, where that is known."""


def take_vocabulary(config: DataConfig, folder: Path) -> PreparedVocabulary:
    """Copy the vocabulary that `data.vocabulary.from` names.

    :param folder: of the vocabulary stage.
    :raises DataError: there is none, or it is not what the recipe needs.
    """
    settings = config.vocabulary
    found = _find(settings)
    _check_sides(config, found)
    names = JOINT if settings.joint else SEPARATE
    inputs = {
        "taken": {name: sha256_of(path) for name, path in zip(names, found.files, strict=True)},
        "user_defined_symbols": settings.user_defined_symbols,
    }

    def build(partial: Path) -> dict[str, Any]:
        for name, path in zip(names, found.files, strict=True):
            _check_symbols(settings.user_defined_symbols, load_vocabulary(path), path)
            shutil.copyfile(path, partial / name)
        facts = facts_of(partial)
        sizes = " and ".join(map(str, facts["sizes"][: len(names)]))
        log.info("vocabulary: taken from %s, %s tokens", _name(settings), sizes)
        return facts

    prepared = run_stage(folder, inputs, build, sealed=["*.model"])
    return PreparedVocabulary.model_validate(prepared)


def vocabulary_sizes(settings: VocabularyConfig) -> tuple[int, int]:
    """Return how many tokens source and target vocabulary have, or will have.

    :raises DataError: the recipe takes one that is not there.
    """
    if settings.taken_from is None:
        return settings.size, settings.size
    models = [load_vocabulary(path) for path in _find(settings).files]
    return models[0].get_piece_size(), models[-1].get_piece_size()


def check_taken_vocabulary(config: DataConfig, shards: Path) -> None:
    """Compare the vocabulary that the recipe takes with that of the shards, if it is at hand: one
    that is absent cannot have changed.

    :raises DataError: it has changed.
    """
    settings = config.vocabulary
    if settings.taken_from is None:
        return
    try:
        now = digest_of_files(_find(settings).files)
    except AbsentVocabulary:
        return
    if now != vocabulary_digest(shards):
        raise DataError(
            f"the vocabulary of {_name(settings)} has changed since {shards} were prepared with "
            "it; `./run.sh prepare` brings them up to date"
        )


def _paths(settings: VocabularyConfig) -> tuple[Path, ...]:
    taken = settings.taken_from
    assert taken is not None
    return taken if isinstance(taken, tuple) else (taken,)


def _name(settings: VocabularyConfig) -> str:
    return " and ".join(map(str, _paths(settings)))


def _find(settings: VocabularyConfig) -> _Found:
    """Find the files that the recipe names, or those of the export or run that it names.

    :raises AbsentVocabulary: there are none.
    :raises DataError: there cannot be any.
    """
    paths = _paths(settings)
    for path in paths:
        if not path.exists():
            raise AbsentVocabulary(
                f"{KEY}: {path}: no such file or folder; name an export, a run_dir, or a "
                "SentencePiece model"
            )
        if len(paths) > 1 and not path.is_file():
            raise DataError(f"{KEY}: {path}: not a file; of two paths, each is a file's")
    folder = paths[0]
    if folder.is_file():
        return _Found([*paths], None)
    export = read_json(folder / EXPORT)
    if (task := export.get("task", "translation")) != "translation":
        raise DataError(f"{KEY}: {folder}: a model for {task}, which has no vocabulary")
    for place in (folder, folder / SHARDS, folder / VOCABULARY):
        files = vocabulary_files(place)
        if all(path.is_file() for path in files):
            shards = read_json(place / "manifest.json")
            known = shards.get("languages", [export.get(f"{s}_lang") for s in ("source", "target")])
            return _Found(files, tuple(known) if all(known) else None)
    raise AbsentVocabulary(
        f"{KEY}: {folder}: no vocabulary there: neither an export nor a run of translation (it "
        f"would have a {JOINT[0]}, or {' and '.join(SEPARATE)})"
    )


def _check_sides(config: DataConfig, found: _Found) -> None:
    """Check that the vocabulary is joint, or not, as the recipe says, and of its languages.

    :raises DataError: it is not.
    """
    settings = config.vocabulary
    name = _name(settings)
    if settings.joint and len(found.files) == 2:
        raise DataError(
            f"{KEY}: {name} has a vocabulary for each side, and data.vocabulary.joint is true; set "
            "it and model.tied_embeddings to false"
        )
    if not settings.joint and len(found.files) == 1:
        raise DataError(
            f"{KEY}: {name} has one vocabulary for both sides, and data.vocabulary.joint is false; "
            "remove that, or name a file for each side: [SOURCE, TARGET]"
        )
    if found.languages is None or found.languages == config.languages:
        return
    if not settings.joint and found.languages == config.languages[::-1]:
        source, target = (str(path) for path in reversed(found.files))
        raise DataError(
            f"{KEY}: {name} goes from {' to '.join(found.languages)}, and the recipe from "
            f"{' to '.join(config.languages)}; name the files: [{source}, {target}]"
        )
    if {*found.languages} != {*config.languages}:
        log.warning(
            "vocabulary: %s was made for %s, and the recipe is for %s",
            name, " and ".join(found.languages), " and ".join(config.languages),
        )  # fmt: skip


def _check_symbols(wanted: Sequence[str], vocabulary: SentencePieceProcessor, path: Path) -> None:
    """Check that a vocabulary makes one token of each of these symbols, wherever it stands.

    :raises DataError: it does not.
    """
    lacks = []
    for symbol in wanted:
        token = vocabulary.piece_to_id(symbol)
        if token == UNK_IDX or token not in vocabulary.encode(f"a{symbol}a"):
            lacks.append(symbol)
    if lacks:
        raise DataError(
            f"{path} has no {', '.join(lacks)} (data.vocabulary.user_defined_symbols); symbols "
            "cannot be added to a vocabulary that is there"
        )
