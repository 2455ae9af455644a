"""Image classifiers that can be analysed: of a run, or of an export."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import digest_of, sha256_of
from data_prep.images.shards import read_images_manifest
from models.config import VisionConfig
from models.export_format import (
    WEIGHTS,
    ClassifierSettings,
    ModelError,
    load_weights,
    read_classifier_settings,
)
from pipeline.analysis.examples import AnalysedModel, Settings, Subject
from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.run_model import checkpoints_of_run, model_of_run
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import UsageError

if TYPE_CHECKING:
    import torch

    from models.image_classifier import ImageClassifier
    from pipeline.analysis.images import Images


def subject_of_run(recipe: ClassificationRecipe) -> Subject:
    """Return the model of a run's checkpoints, as `evaluation` names them.

    :raises CheckpointError: there is none, or it belongs to other data.
    """
    checkpoints = checkpoints_of_run(recipe)
    data = read_images_manifest(recipe.shards)
    infos = [checkpoint.info.model_dump(mode="json") for checkpoint in checkpoints]
    return Subject(
        name=recipe.run_dir.absolute().name,
        weights=digest_of([recipe.evaluation.use_ema, infos]),
        bound_to=digest_of([data.channels, recipe.data.image_size, list(data.classes)]),
        heads=recipe.model.num_heads,
        load=partial(_load_run, recipe, checkpoints),
    )


def subject_of_export(folder: Path) -> Subject:
    """Return an exported model.

    :raises ModelError: there is none.
    :raises UsageError: its format does not hold the model as PyTorch runs it.
    """
    settings = read_classifier_settings(folder)
    if settings.format != "safetensors":
        raise UsageError(
            f"{folder}: an export in format {settings.format} does not show what it computes level "
            "by level; export with `--format safetensors`"
        )
    try:
        config = VisionConfig.model_validate(settings.model)
        weights = sha256_of(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    return Subject(
        name=folder.resolve().name,
        weights=weights,
        bound_to=digest_of([settings.channels, settings.image_size, settings.classes]),
        heads=config.num_heads,
        load=partial(_load_export, folder, settings, config),
    )


def _load_run(
    recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint], device: torch.device
) -> AnalysedModel:
    model = model_of_run(recipe, checkpoints)
    return _analysed(model, device)


def _load_export(
    folder: Path, settings: ClassifierSettings, config: VisionConfig, device: torch.device
) -> AnalysedModel:
    from safetensors import SafetensorError

    from models.factory import create_classifier
    from models.image_classifier import ImageShape

    shape = ImageShape(settings.channels, settings.image_size)
    try:
        model = create_classifier(config, shape, len(settings.classes))
        load_weights(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    return _analysed(model, device)


def _analysed(model: ImageClassifier, device: torch.device) -> AnalysedModel:
    model = model.eval().to(device)
    return AnalysedModel(model, {"encoder": model.encoder})


def examples(recipe: ClassificationRecipe, settings: Settings, device: torch.device) -> Images:
    """Return images of the recipe's validation set.

    :raises UsageError: there are too few.
    """
    from pipeline.analysis.images import Images

    return Images(recipe.shards, recipe.data.image_size, settings, device)
