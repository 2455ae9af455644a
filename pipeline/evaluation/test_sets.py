"""Test sets: that of the recipe, files, or sacreBLEU's by name; always raw text."""

# Functions import sacrebleu themselves: most recipes name none of its test sets.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from data_prep.corpora import read_lines
from data_prep.files import DataError, digest_of
from data_prep.held_out import HeldOut, in_training_text
from data_prep.identity import check_test_sets
from data_prep.stage import check_sealed
from data_prep.text import normalise
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import Recipe, slug_of
from pipeline.translation_recipe import TestSetFiles, TranslationRecipe


@dataclass(frozen=True)
class TestSet:
    """A test set: source sentences and their reference translations."""

    name: str
    sources: list[str]
    references: list[list[str]]
    """The references of one or more translators, each with a line for every source."""

    @property
    def slug(self) -> str:
        """Return the name as files and metrics have it."""
        return slug_of(self.name)

    @property
    def sha256(self) -> str:
        """Return a digest of the text."""
        return digest_of([self.sources, self.references])


def load_test_sets(recipe: TranslationRecipe) -> Iterator[TestSet]:
    """Read `data.test`, then those of `evaluation.test_sets`.

    :raises DataError: a test set cannot be read or fetched, is empty, or has sides of different
        length.
    """
    yield _checked(_test_set_of_recipe(recipe))
    for name, files in _others(recipe, _fetch_of_sacrebleu):
        yield _checked(_read_files(name, *files))


def test_sets_at_hand(recipe: TranslationRecipe) -> Iterator[tuple[str, str | None]]:
    """Yield the names of the same test sets, each with a digest of its text: None if that is not
    here, and empty if it cannot be read, or is not as it was prepared."""
    text = recipe.clean_text
    prepared = [text / f"test.{lang}" for lang in recipe.data.languages]
    own = HeldOut(recipe.data.test.name, tuple(prepared))
    for name, files in (own, *held_out_of(recipe)):
        if not files or not all(path.is_file() for path in files):
            yield name, None
            continue
        try:
            if name == own.name:
                check_sealed(text)
            yield name, _read_files(name, *files).sha256
        except (DataError, OSError):
            yield name, ""


def _checked(test_set: TestSet) -> TestSet:
    """Return a test set that can be scored.

    :raises DataError: it is not.
    """
    for reference in test_set.references:
        if len(reference) != len(test_set.sources):
            raise DataError(
                f"{test_set.name}: {len(test_set.sources)} source lines but {len(reference)} "
                "in a reference; they must have a line for each other's"
            )
    if not test_set.sources:
        raise DataError(f"{test_set.name}: no sentences")
    return test_set


def load_validation_set(recipe: TranslationRecipe) -> TestSet:
    """Read `data.valid` as the models see it, cleaned.

    :raises DataError: it is not as it was written.
    """
    return _read_clean(recipe, recipe.data.valid.name, "valid")


def _test_set_of_recipe(recipe: TranslationRecipe) -> TestSet:
    """Read `data.test`.

    :raises DataError: it is not here, or not as it was written.
    """
    if not (recipe.clean_text / f"test.{recipe.data.source_lang}").exists():
        raise DataError(f"{recipe.clean_text}: no test set; run `./run.sh prepare`")
    return _read_clean(recipe, recipe.data.test.name, "test")


def _read_clean(recipe: TranslationRecipe, name: str, split: str) -> TestSet:
    check_sealed(recipe.clean_text)
    files = (recipe.clean_text / f"{split}.{lang}" for lang in recipe.data.languages)
    return _read_files(name, *files)


def _read_files(name: str, source: Path, *references: Path) -> TestSet:
    for path in (source, *references):
        if not path.is_file():
            raise DataError(f"{name}: {path} does not exist")
    return TestSet(name, list(read_lines(source)), [list(read_lines(path)) for path in references])


def _others(
    recipe: TranslationRecipe, find: Callable[[str, tuple[str, str]], list[Path]]
) -> Iterator[HeldOut]:
    """Yield the test sets of `evaluation.test_sets`.

    :param find: returns source and references of one of sacreBLEU's, by name and languages.
    """
    root = recipe.data.root
    for wanted in recipe.evaluation.test_sets:
        if isinstance(wanted, TestSetFiles):
            files = (root / path for path in (wanted.source, *wanted.references))
            yield HeldOut(wanted.name, tuple(files))
        else:
            yield HeldOut(wanted, tuple(find(wanted, recipe.data.languages)))


# ── sacreBLEU's ─────────────────────────────────────────────────────────────────────────────────


def _fetch_of_sacrebleu(name: str, languages: tuple[str, str]) -> list[Path]:
    """Return source and references of a test set of sacreBLEU's, fetched unless in its cache."""
    from sacrebleu.utils import SACREBLEU_DIR

    try:
        return _files_of_sacrebleu(name, "-".join(languages))
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # it ends the program when a download fails
        raise DataError(
            f"{name}: sacreBLEU cannot fetch it ({error or 'download failed'}); bring it from "
            f"another machine's {SACREBLEU_DIR}, or name its files in evaluation.test_sets"
        ) from error


def _find_in_cache(name: str, languages: tuple[str, str]) -> list[Path]:
    """Return source and references of a test set of sacreBLEU's; none if its cache lacks it."""

    def only_look(url: str, path: str, **more: object) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(path)

    with patch("sacrebleu.dataset.base.download_file", only_look):
        try:
            return _files_of_sacrebleu(name, "-".join(languages))
        except DataError:
            raise
        except Exception:  # half a file in the cache may end in anything
            return []


def _files_of_sacrebleu(name: str, languages: str) -> list[Path]:
    """Return what sacreBLEU says where source and references are, once it has them.

    :param languages: `de-en`, for example.
    :raises DataError: it has no such test set.
    """
    from sacrebleu.dataset import DATASETS

    if name not in DATASETS:
        near = ", ".join(sorted(known for known in DATASETS if known[:5] == name[:5]))
        raise DataError(
            f"evaluation.test_sets: sacreBLEU has no test set {name}"
            + (f"; it has {near}" if near else "; `sacrebleu --list` shows those it has")
        )
    dataset: Any = DATASETS[name]
    if languages not in dataset.langpairs:
        raise DataError(
            f"evaluation.test_sets: {name} has no {languages}, but {', '.join(dataset.langpairs)}"
        )
    source, references = dataset.get_source_file(languages), dataset.get_reference_files(languages)
    return [Path(source), *map(Path, references)]


# ── What of them is in the training text ────────────────────────────────────────────────────────


class Overlap(NamedTuple):
    """Sentences of a test set that are in the training text too."""

    sources: int

    references: int
    """Of how many sentences a reference is."""


def held_out_of(recipe: TranslationRecipe) -> list[HeldOut]:
    """Return the test sets of `evaluation.test_sets`, as far as they are at hand.

    :raises DataError: sacreBLEU has no test set of that name.
    """
    return list(_others(recipe, _find_in_cache))


def check_training_text(recipe: Recipe) -> None:
    """Check that the training text was compared with all test sets.

    :raises DataError: sentences of one may be in the training text.
    """
    if isinstance(recipe, TranslationRecipe):
        trained = bool(list_checkpoints(recipe.checkpoints))
        check_test_sets(held_out_of(recipe), recipe.run_dir, trained=trained)


def overlap_of(recipe: TranslationRecipe, test_set: TestSet) -> Overlap | None:
    """Count what of a test set is in the training text of `run_dir`; None if that is not here."""
    sources, *references = (
        [normalise(line).encode() for line in side]
        for side in (test_set.sources, *test_set.references)
    )
    wanted = frozenset(sources) - {b""}, frozenset(chain.from_iterable(references)) - {b""}
    found = in_training_text(recipe.data, recipe.clean_text, wanted)
    if found is None:
        return None
    return Overlap(
        sum(line in found[0] for line in sources),
        sum(not found[1].isdisjoint(of_one) for of_one in zip(*references, strict=True)),
    )
