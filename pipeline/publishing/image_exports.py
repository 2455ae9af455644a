"""An exported image classifier: a folder that needs nothing else of the run."""

# Functions import torch and what needs it themselves: that takes seconds, and that an export is up
# to date is told before.

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from data_prep.identity import check_corpora
from models.export_format import ClassifierFormat, write_settings, write_weights
from pipeline.checkpoints.folder import Checkpoint
from pipeline.classification.run_model import checkpoints_of_run, model_of_run
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.result import digest_of_weights
from pipeline.publishing.exports import write_export

log = logging.getLogger("export")

VERSION = 2  # raise it when the same weights would give other files


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

    def build(partial: Path) -> dict[str, Any]:
        model = model_of_run(recipe, checkpoints).eval()
        if format == "onnx":
            from models.onnx_classifier import write_onnx_classifier

            write_onnx_classifier(model, partial)
        else:
            write_weights(model, partial)
        write_settings(partial, settings)
        write_atomically(partial / "README.md", card)
        return {"parameters": sum(p.numel() for p in model.parameters())}

    inputs = {
        "version": VERSION,
        **settings.model_dump(mode="json"),
        "weights": digest_of_weights(recipe, checkpoints),
        "card": card,
    }
    write_export(folder, inputs, build)
