"""Translate and score test sets, unless that was done before."""

# Functions import translators (torch, or the engine of an export) and rich themselves: when all
# scores are up to date, none is needed.

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from data_prep.files import digest_of
from data_prep.identity import check_corpora
from data_prep.stage import read_manifest
from data_prep.text import normalise
from data_prep.vocabulary import load_vocabularies
from models.export_format import digest_of_export, read_settings
from pipeline.checkpoints.folder import CheckpointError
from pipeline.checkpoints.trained_with import is_base
from pipeline.evaluation.comet import check_comet, comet_score
from pipeline.evaluation.result import (
    EvaluatedModel,
    Evaluation,
    bring_up_to_date,
    digest_of_weights,
)
from pipeline.evaluation.test_sets import (
    Overlap,
    TestSet,
    load_test_sets,
    load_validation_set,
    overlap_of,
)
from pipeline.evaluation.translations import TranslationResult
from pipeline.ranks import gather_shares, rank, share_of, share_progress, world_size
from pipeline.recipe import VALIDATION, UsageError
from pipeline.translation.run_model import checkpoints_of_run, untrained_model
from pipeline.translation.scores import bleu
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.serving import TextTranslator

log = logging.getLogger("evaluate")

VERSION = 4  # raise it when the same model would get other scores


@dataclass(frozen=True)
class EvaluatedTranslator(EvaluatedModel[TranslationRecipe, TranslationResult]):
    """The translation model to evaluate."""

    search: Mapping[str, Any]
    """Search keys: all of them for checkpoints; for an export those that differ from its own."""

    @classmethod
    def of(
        cls, recipe: TranslationRecipe, export: Path | None, search: Mapping[str, Any]
    ) -> EvaluatedTranslator:
        """Return the model in the folder `export`, or that of the run's checkpoints if it is None.

        :param search: search keys that differ from those of the export.
        :raises CheckpointError: there is nothing to evaluate, or it belongs to other data.
        """
        checkpoints = [] if export else checkpoints_of_run(recipe)
        check_corpora(recipe.data, recipe.run_dir)  # the test set is one of them
        if export is None:
            return cls(recipe, checkpoints, None, recipe.evaluation.search_of_checkpoints)
        if read_manifest(export) is None:
            raise CheckpointError(f"{export}: not an exported model")
        settings = read_settings(export)
        languages = settings.source_lang, settings.target_lang
        if None not in languages and languages != recipe.data.languages:
            raise CheckpointError(
                f"{export} translates {' to '.join(map(str, languages))}, the recipe says "
                f"data.source_lang {recipe.data.source_lang}, data.target_lang "
                f"{recipe.data.target_lang}"
            )
        return cls(recipe, [], export, search)

    @property
    def description(self) -> dict[str, Any]:
        if self.export:
            return super().description
        levels = self.recipe.evaluated_model.decoder_levels
        return {**super().description, "decoder_levels": levels, "search": dict(self.search)}

    def result(self, test_set: TestSet) -> TranslationResult:
        """Return the result on `test_set`: where its files belong, with the scores found there."""
        prefix = "test" if self._is_of_recipe(test_set) else test_set.slug
        name = f"{test_set.slug}{self.variant}"
        return self._result(test_set, name, f"{prefix}{self.variant}_")

    def results(self) -> list[TranslationResult]:
        return [self.result(test_set) for test_set in load_test_sets(self.recipe)]

    def result_on_validation(self) -> TranslationResult:
        return self._result(load_validation_set(self.recipe), VALIDATION, f"{VALIDATION}_")

    def _result(self, test_set: TestSet, name: str, metric_prefix: str) -> TranslationResult:
        sha256 = test_set.sha256
        depends_on = {
            "version": VERSION,
            "search": dict(self.search),
            "weights": self.weights,
            "export": self.export_digest,
            "untrained": self._step_0 if self.has_baseline(test_set) else None,
            "test set": [test_set.name, sha256],
            "target_lang": self.recipe.data.target_lang,  # of BLEU's tokeniser
            "longest line": None if self.export else self.recipe.data.max_tokens_per_side,
        }
        if comet := self.comet_model(name):
            check_comet(comet)
            status = comet.stat()
            depends_on["comet"] = [str(comet), status.st_size, status.st_ctime_ns]
        folder = self.recipe.evaluations / name
        fingerprint, target_lang = digest_of(depends_on), self.recipe.data.target_lang
        return TranslationResult(
            folder, metric_prefix, fingerprint, test_set.name, sha256, test_set, target_lang
        )

    def _is_of_recipe(self, test_set: TestSet) -> bool:
        return test_set.name == self.recipe.data.test.name

    @cached_property
    def _step_0(self) -> Any:
        """Return what the weights before the first step come from."""
        seed, base = self.recipe.training.seed, self.recipe.training.init_from
        return [seed, digest_of_export(base)] if base else seed

    def has_baseline(self, test_set: TestSet) -> bool:
        """Tell whether an untrained model is scored on `test_set` too."""
        wanted = self.recipe.evaluation.untrained_baseline
        of_it = wanted and self._is_of_recipe(test_set) and not self.export
        return of_it and self._is_base_here

    @cached_property
    def _is_base_here(self) -> bool:
        """Whether the weights that training began from can be had."""
        base = self.recipe.training.init_from
        if base is None or (base.is_dir() and is_base(self.checkpoints[-1], base)):
            return True
        text = "%s: the model that training began from is not here: untrained_baseline is left out"
        log.warning(text, base)
        return False

    @cached_property
    def has_learnt_here(self) -> bool:
        """Whether the training text of `run_dir` is what the model has learnt from."""
        if self.export is None:
            return True
        try:
            own = digest_of_weights(self.recipe, checkpoints_of_run(self.recipe))
        except (CheckpointError, UsageError):
            return False
        manifest = read_manifest(self.export) or {"inputs": {}}
        return bool(manifest["inputs"].get("weights") == own)

    def overlap(self, test_set: TestSet) -> Overlap | None:
        """Count what of a test set is in the training text; None if that is not known, as it is not
        of what a base has learnt."""
        found = overlap_of(self.recipe, test_set) if self.has_learnt_here else None
        return None if found and not any(found) and self.recipe.training.init_from else found

    def comet_model(self, name: str) -> Path | None:
        """Return the COMET model that scores a set too, by the name of its folder; None: none."""
        return None if name == VALIDATION else self.recipe.evaluation.comet

    def answer(self, missing: Sequence[TranslationResult]) -> None:
        from pipeline.translation.translator import Translator, load_exports

        translator: TextTranslator
        if self.export:
            translator = load_exports(self.export, **self.search)
            drawn = translator.search.sampling_topk is not None
            if drawn and world_size() > 1 and read_settings(self.export).format == "ctranslate2":
                raise UsageError(
                    f"{self.export}: what CTranslate2 draws depends on all that was drawn before: "
                    "evaluate it on one rank"
                )
        else:
            translator = Translator.of_run(self.recipe, self.checkpoints)
        for result in missing:
            _translate_and_score(self, translator, result)


def evaluate(
    recipe: TranslationRecipe,
    export: Path | None = None,
    search: Mapping[str, Any] | None = None,
) -> Evaluation[TranslationResult]:
    """Bring the results up to date, on every rank; see `bring_up_to_date`.

    :param export: a folder written by `./run.sh export`, to evaluate instead of the checkpoints.
    :param search: search keys that differ from those that the model was exported with.
    :raises CheckpointError: there is nothing to evaluate, or it belongs to other data.
    :raises DataError: a test set cannot be read or fetched.
    """
    return bring_up_to_date(lambda: EvaluatedTranslator.of(recipe, export, search or {}))


def _translate_and_score(
    model: EvaluatedTranslator, translator: TextTranslator, result: TranslationResult
) -> None:
    """Translate a test set on all ranks; score the translations and write `result` on rank 0."""
    recipe, test_set = model.recipe, result.test_set
    log.info("test set %s, %d sentences; %s", test_set.name, len(test_set.sources), model)
    started = time.monotonic()
    hypotheses = _translate(translator, test_set.sources, "translating")
    seconds = time.monotonic() - started
    more = {
        **model.description,
        "beam_size": translator.search.beam_size,
        "length_penalty": translator.search.length_penalty,
        "sentences_per_second": round(len(test_set.sources) / seconds, 2),
        "ranks": world_size(),
    }
    if model.has_baseline(test_set):
        from pipeline.translation.translator import Translator

        vocabularies = load_vocabularies(recipe.shards)
        untrained = Translator(
            [untrained_model(recipe)],
            vocabularies,
            recipe.evaluation,
            recipe.data.max_tokens_per_side,
        )
        lines = _translate(untrained, test_set.sources, "translating with an untrained model")
        found = bleu(lines, test_set.references, recipe.data.target_lang)
        more["untrained_bleu"] = round(found.score, 2)
    if rank() == 0:
        lines = list(map(normalise, test_set.sources))
        lengths = [len(ids) for ids in translator.source_vocabulary.encode(lines)]
        overlap = model.overlap(test_set)
        more["in_training_text"] = overlap and overlap._asdict()
        if comet := model.comet_model(result.folder.name):
            log.info("test set %s: COMET", test_set.name)
            each = (
                comet_score(comet, test_set.sources, hypotheses, reference)
                for reference in test_set.references
            )
            more["comet"] = round(mean(each), 4)
        result.write(hypotheses, lengths, more)


def _translate(translator: TextTranslator, sources: Sequence[str], what: str) -> list[str]:
    """Translate this rank's share, and return all translations, on every rank.

    :param what: the label of the progress bar.
    """
    share = share_of(sources, rank(), world_size())
    with share_progress(what, share.stop - share.start) as advance:
        lines = translator.translate(sources[share], advance, first_line=share.start + 1)
    return gather_shares(lines)
