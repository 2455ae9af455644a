"""Test sets: that of the recipe, files, or sacreBLEU's by name; always raw text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpora import read_lines
from data_prep.files import DataError, digest_of
from pipeline.recipe import Recipe, TestSetFiles


@dataclass(frozen=True)
class TestSet:
    """A test set."""

    name: str
    sources: list[str]
    references: list[list[str]]
    """Of one or more translators, each a line for every source."""

    @property
    def slug(self) -> str:
        """The name as files and metrics have it."""
        return slug_of(self.name)

    @property
    def sha256(self) -> str:
        return digest_of([self.sources, self.references])


def slug_of(name: str) -> str:
    """With the characters only that MLflow takes, and file systems."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def load_test_sets(recipe: Recipe) -> Iterator[TestSet]:
    """`data.test`, then those of `evaluation.test_sets`.

    :raises DataError: one cannot be had, its sides differ in length, or two have one name.
    """
    slugs: set[str] = set()
    for test_set in _read(recipe):
        for reference in test_set.references:
            if len(reference) != len(test_set.sources):
                raise DataError(
                    f"{test_set.name}: {len(test_set.sources)} source lines but {len(reference)} "
                    "in a reference; they must have a line for each other's"
                )
        if not test_set.sources:
            raise DataError(f"{test_set.name}: no sentences")
        if test_set.slug in slugs:
            raise DataError(f"evaluation.test_sets: two test sets are called {test_set.slug}")
        if slugs and test_set.slug == "test":
            raise DataError("evaluation.test_sets: `test` is the recipe's own in MLflow; rename it")
        slugs.add(test_set.slug)
        yield test_set


def _read(recipe: Recipe) -> Iterator[TestSet]:
    source_lang, target_lang = recipe.data.languages
    text = recipe.clean_text
    if not (text / f"test.{source_lang}").exists():
        raise DataError(f"{text}: no test set; run `./run.sh prepare`")
    yield _of_files(
        recipe.data.test.name, text / f"test.{source_lang}", text / f"test.{target_lang}"
    )
    root = recipe.data.root
    for wanted in recipe.evaluation.test_sets:
        if isinstance(wanted, TestSetFiles):
            references = (root / path for path in wanted.references)
            yield _of_files(wanted.name, root / wanted.source, *references)
        else:
            yield _of_sacrebleu(wanted, f"{source_lang}-{target_lang}")


def _of_files(name: str, source: Path, *references: Path) -> TestSet:
    for path in (source, *references):
        if not path.is_file():
            raise DataError(f"{name}: {path} does not exist")
    return TestSet(name, list(read_lines(source)), [list(read_lines(path)) for path in references])


def _of_sacrebleu(name: str, languages: str) -> TestSet:
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

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
    try:
        source = dataset.get_source_file(languages)
        references = dataset.get_reference_files(languages)
    except (Exception, SystemExit) as error:  # it ends the program when a download fails
        raise DataError(
            f"{name}: sacreBLEU cannot fetch it ({error or 'download failed'}); bring it from "
            f"another machine's {SACREBLEU_DIR}, or name its files in evaluation.test_sets"
        ) from error
    return _of_files(name, Path(source), *map(Path, references))
