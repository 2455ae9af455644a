"""TODO docstring."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import digest_of
from data_prep.stage import read_manifest
from data_prep.vocabulary import load_vocabularies
from pipeline.checkpoints.folder import Checkpoint, CheckpointError
from pipeline.checkpoints.weights import checkpoints_to_average
from pipeline.evaluation.metrics import bleu
from pipeline.evaluation.results import Result, weights_digest
from pipeline.evaluation.test_sets import Sentences, load_test_sets, slug_of
from pipeline.recipe import SEARCH, Recipe

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator

log = logging.getLogger("evaluate")


VERSION = 2  # raise it when the same model would get other scores


NO_OPTIONS: Mapping[str, object] = {}


@dataclass(frozen=True)
class Subject:
    """What is evaluated: checkpoints of the run, or an exported model."""

    recipe: Recipe
    checkpoints: Sequence[Checkpoint]
    export: Path | None
    search: Mapping[str, object]
    """What is otherwise than the export says."""

    @classmethod
    def of(cls, recipe: Recipe, export: Path | None, search: Mapping[str, object]) -> Subject:
        """:raises CheckpointError: nothing to evaluate, or it belongs to other data."""
        if export is None:
            evaluation = recipe.evaluation.model_dump(mode="json", include=SEARCH)
            return cls(recipe, checkpoints_to_average(recipe), None, evaluation)
        if read_manifest(export) is None:
            raise CheckpointError(f"{export}: not an exported model")
        return cls(recipe, [], export, search)

    @cached_property
    def weights(self) -> str:
        """Digest of what the checkpoints hold."""
        return weights_digest(self.recipe, self.checkpoints)

    @property
    def description(self) -> dict[str, Any]:
        if self.export:
            return {"model": str(self.export)}
        tags = [checkpoint.tag for checkpoint in self.checkpoints]
        return {
            "checkpoints": tags,
            "step": self.checkpoints[-1].step,
            "weights_sha256": self.weights,
        }

    def result(self, test_set: Sentences) -> Result:
        """Where the scores on `test_set` belong, and whether they are there."""
        variant = f"--{slug_of(self.export.resolve().name)}" if self.export else ""
        of = {
            "version": VERSION,
            "search": dict(self.search),
            "weights": self.weights,
            "export": read_manifest(self.export) if self.export else None,
            "untrained": self.recipe.training.seed if self.has_baseline(test_set) else None,
            "test set": test_set.sha256,
            "target_lang": self.recipe.data.target_lang,  # of BLEU's tokeniser
            "longest line": None if self.export else self.recipe.data.max_tokens_per_side,
        }
        name = f"{test_set.slug}{variant}"
        folder = self.recipe.run_dir / "evaluation" / name
        prefix = "test" if self._is_own(test_set) else test_set.slug
        return Result(test_set, folder, f"{prefix}{variant}_", digest_of(of))

    def _is_own(self, test_set: Sentences) -> bool:
        return test_set.name == self.recipe.data.test.name

    def has_baseline(self, test_set: Sentences) -> bool:
        """Whether an untrained model is scored too."""
        wanted = self.recipe.evaluation.untrained_baseline
        return wanted and self._is_own(test_set) and not self.export

    def translator(self) -> TextTranslator:
        from pipeline.translation.translator import Translator

        if self.export:
            return Translator.of_export(self.export, **self.search)
        return Translator.of_run(self.recipe, self.checkpoints)


def evaluate(
    recipe: Recipe, export: Path | None = None, search: Mapping[str, object] = NO_OPTIONS
) -> tuple[Subject, list[Result]]:
    """Bring `RUN_DIR/evaluation/TEST_SET/` up to date for each test set.

    Every rank calls it; rank 0 decides, scores and writes.

    :param export: a folder written by `./run.sh export`, to evaluate instead of the checkpoints.
    :param search: its `evaluation` keys that shall be otherwise than it was exported with.
    :returns: what was evaluated, and the results of every test set, that of the recipe first.
    :raises CheckpointError: nothing to evaluate, or it belongs to other data.
    :raises DataError: a test set cannot be had.
    """
    if world_size() > 1:
        from pipeline.ranks import from_rank_0

        subject, results, missing = from_rank_0(lambda: _look(recipe, export, search))
    else:
        subject, results, missing = _look(recipe, export, search)
    if missing:
        translator = subject.translator()
        for result in missing:
            _evaluate(subject, translator, result)
    return subject, results


def _look(
    recipe: Recipe, export: Path | None, search: Mapping[str, object]
) -> tuple[Subject, list[Result], list[Result]]:
    """What there is to evaluate, all results, and those that are missing."""
    subject = Subject.of(recipe, export, search)
    results = [subject.result(test_set) for test_set in load_test_sets(recipe)]
    for result in results:
        if result.up_to_date:
            log.info("%s: up to date, reused (%s)", result.test_set.name, result.folder)
    return subject, results, [result for result in results if not result.up_to_date]


def _evaluate(subject: Subject, translator: TextTranslator, result: Result) -> None:
    recipe, test_set, description = subject.recipe, result.test_set, subject.description
    what = description.get("model") or ", ".join(description["checkpoints"])
    log.info("test set %s, %d sentences; %s", test_set.name, len(test_set.sources), what)
    started = time.monotonic()
    hypotheses = _translate(translator, test_set.sources, "translating")
    seconds = time.monotonic() - started
    more = {
        **description,
        "beam_size": translator.search.beam_size,
        "length_penalty": translator.search.length_penalty,
        "sentences_per_second": round(len(test_set.sources) / seconds, 2),
        "ranks": world_size(),
    }
    if subject.has_baseline(test_set):
        from pipeline.translation.translator import Translator, untrained_model

        vocabularies = load_vocabularies(recipe.run_dir / "shards")
        untrained = Translator(untrained_model(recipe), vocabularies, recipe.evaluation)
        lines = _translate(untrained, test_set.sources, "translating with an untrained model")
        found = bleu(lines, test_set.references, recipe.data.target_lang)
        more["untrained_bleu"] = round(found.score, 2)
    if rank() == 0:
        lengths = [len(ids) for ids in translator.source_vocabulary.encode(test_set.sources)]
        result.write(hypotheses, lengths, recipe.data.target_lang, more)


def _translate(translator: TextTranslator, sources: Sequence[str], what: str) -> list[str]:
    """Each rank translates its share. :returns: all translations, on every rank."""
    from rich.console import Console
    from rich.progress import Progress

    own = slice(0, len(sources))
    if world_size() > 1:
        from pipeline.ranks import gather_shares, share_of

        own = share_of(sources, rank(), world_size())
    console = Console(stderr=True)
    shown = console.is_terminal and rank() == 0
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(what, total=own.stop - own.start)
        lines = translator.translate(
            sources[own], lambda count: progress.advance(task, count), first_line=own.start + 1
        )
    return gather_shares(lines) if world_size() > 1 else lines


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
