"""Translation models that can be analysed: of a run, or of an export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import digest_of
from data_prep.vocabulary import vocabulary_digest
from models.export_format import read_settings
from pipeline.analysis.examples import Subject, exported
from pipeline.evaluation.result import digest_of_weights
from pipeline.translation.run_model import checkpoints_of_run, model_of_run
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from models.seq2seq import TranslationModel


def subject_of_run(recipe: TranslationRecipe) -> Subject:
    """Return the model of a run's checkpoints, as `evaluation` names them.

    :raises CheckpointError: there is none, or it belongs to other data.
    """
    checkpoints = checkpoints_of_run(recipe)
    return Subject(
        name=recipe.run_dir.absolute().name,
        weights=digest_of_weights(recipe, checkpoints),
        bound_to=digest_of([vocabulary_digest(recipe.shards), recipe.data.languages]),
        heads=recipe.model.num_heads,
        load=partial(model_of_run, recipe, checkpoints),
    )


def subject_of_export(folder: Path) -> Subject:
    """Return an exported model.

    :raises ModelError: there is none.
    :raises UsageError: its format does not hold the model as PyTorch runs it.
    """
    settings = read_settings(folder)
    languages = settings.source_lang, settings.target_lang
    return exported(
        folder,
        settings,
        lambda: digest_of([vocabulary_digest(folder), languages]),
        partial(_load_export, folder),
    )


def _load_export(folder: Path) -> TranslationModel:
    from pipeline.translation.translator import Translator, load_exports

    translator = load_exports(folder, dtype="float32")
    assert isinstance(translator, Translator)  # of this format
    return translator.models[0]
