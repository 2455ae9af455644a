"""An exported image classifier: a folder that needs nothing else of the run."""

# Functions import torch and what needs it themselves: that takes seconds, and that an export is up
# to date is told before.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.identity import check_corpora
from models.export_format import ClassifierFormat, write_weights
from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.run_model import checkpoints_of_run, model_of_run
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.publishing.exports import write_export


def export_classifier(
    recipe: ClassificationRecipe,
    folder: Path,
    format: ClassifierFormat = "onnx",
    checkpoints: Sequence[Checkpoint] | None = None,
) -> None:
    """Bring an exported classifier up to date.

    The folder holds the averaged weights, in float32; export.json with architecture, classes and
    the size of images; and the model card.

    :param folder: to write.
    :param checkpoints: to average; by default those that `evaluation` names.
    :raises CheckpointError: the run has no checkpoint.
    """
    from pipeline.classification.classifier import settings_of_run
    from pipeline.publishing.image_card import image_card

    check_corpora(recipe.data, recipe.run_dir)  # the card says what the model has learnt from
    checkpoints = checkpoints or checkpoints_of_run(recipe)
    card = image_card(recipe, checkpoints)
    settings = settings_of_run(recipe, format)

    def write(partial: Path) -> dict[str, Any]:
        model = model_of_run(recipe, checkpoints).eval()
        if format == "onnx":
            from models.onnx_classifier import write_onnx_classifier

            write_onnx_classifier(model, partial)
        else:
            write_weights(model, partial)
        return {"parameters": model.parameter_counts.total}

    write_export(recipe, checkpoints, folder, settings, card, write)
