"""Exported models as teachers of synthetic corpora (`data_prep/synthesize.py`)."""

# Functions import torch, and what needs it, themselves: most data are prepared without.

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.config import DataConfig, TrainingCorpus
from data_prep.files import DataError, digest_of
from data_prep.stage import SYNTHETIC, read_manifest
from models.export_format import ModelError, digest_of_export, read_ensemble
from models.search_config import SearchConfig
from pipeline.translation.serving import TextTranslator, Translation


class ExportedTeacher(NamedTuple):
    """A teacher that is an export, or an ensemble of some; see `data_prep.synthesize.Teacher`."""

    folders: tuple[Path, ...]
    digest: str
    search: Mapping[str, Any]

    keys: tuple[tuple[str, Any], ...]
    """Those of `search` that differ from what was exported."""

    draws_in_order: bool
    """What it draws depends on all that was drawn before: CTranslate2."""

    workers: int | None

    def n_best(self, sentences: Sequence[str], first_line: int) -> list[list[Translation]]:
        """Translate sentences; what comes out depends on them and their place alone."""
        keys = dict(self.keys)
        load: Callable[..., TextTranslator] = _load
        if self.draws_in_order:  # so for each piece it is loaded anew, with a seed of its own
            seed = digest_of([self.search["sampling_seed"], first_line])
            keys["sampling_seed"] = int(seed[:8], 16)
            load = _load.__wrapped__
        translator = load(self.folders, self.digest, tuple(sorted(keys.items())))
        return translator.n_best(sentences, first_line=first_line)


def open_teacher(corpus: TrainingCorpus, languages: tuple[str, str]) -> ExportedTeacher:
    """Return the teacher that a corpus names with `translate_with`.

    :param languages: source and target language of the recipe.
    :raises DataError: it is no exported model, or one for other languages.
    """
    settings = corpus.translate_with
    assert settings is not None
    way = languages if corpus.made_side == "target" else languages[::-1]
    folders = tuple(folder.absolute() for folder in settings.models)
    where = f"data.train: {corpus.name}: translate_with"
    keys = settings.model_dump(include={*SearchConfig.model_fields}, exclude_none=True)
    if "sampling_topk" in keys and len(corpus.files) == 1:
        keys.setdefault("beam_size", 1)  # one is drawn
    try:
        exports = read_ensemble(folders)
        digest = _digest_of(folders)
        format = exports[0].format
        if format == "ctranslate2":
            keys["shortlist"] = False  # with one it would translate sentences one by one
        search = (exports[0].evaluation or SearchConfig()).replaced(keys)
    except (ModelError, OSError, ValueError) as error:
        raise DataError(f"{where}: {error}") from error
    for folder, export in zip(folders, exports, strict=True):
        its = (export.source_lang, export.target_lang)
        if None not in its and its != way:
            hint = "; it makes the other side" if its == way[::-1] else ""
            raise DataError(
                f"{where}: {folder} goes from {its[0]} to {its[1]}, and the {corpus.made_side} of "
                f"{corpus.name} needs a model from {way[0]} to {way[1]}{hint}"
            )
    return ExportedTeacher(
        folders,
        digest,
        search.model_dump(mode="json"),
        tuple(sorted(keys.items())),
        draws_in_order=format == "ctranslate2" and search.sampling_topk is not None,
        workers=1 if format == "safetensors" and _has_gpu() else None,
    )


def check_teachers(data: DataConfig, run_dir: Path) -> None:
    """Compare the models that have made sides of corpora with those that the recipe names, as far
    as they are at hand.

    :raises DataError: one has changed.
    """
    for corpus in data.train:
        if corpus.translate_with is None:
            continue
        made, folders = (
            read_manifest(run_dir / SYNTHETIC / corpus.name),
            corpus.translate_with.models,
        )
        if made is None or not all(folder.is_dir() for folder in folders):
            continue
        if made["inputs"].get("model") != _digest_of(folders):
            names = ", ".join(map(str, folders))
            raise DataError(
                f"data.train: {corpus.name} was translated by another model than {names} is now; "
                "run `./run.sh prepare` to translate it anew"
            )


def _digest_of(folders: Sequence[Path]) -> str:
    """Return a digest of the exports that are one teacher."""
    return digest_of([digest_of_export(folder) for folder in folders])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.lru_cache(maxsize=1)
def _load(
    folders: tuple[Path, ...], digest: str, keys: tuple[tuple[str, Any], ...]
) -> TextTranslator:
    """Load a model to translate in one thread: with more, sums could differ in their last digits.

    :raises ModelError: it cannot be loaded, or has changed since the command began.
    """
    from pipeline.translation.translator import Translator, load_exports

    translator = load_exports(*folders, threads=1, **dict(keys))
    translator.warns = False  # there may be many such lines
    if isinstance(translator, Translator):
        import torch

        torch.set_num_threads(1)
    if _digest_of(folders) != digest:
        names = ", ".join(map(str, folders))
        raise ModelError(f"{names} has changed since this command began; run it again")
    return translator
