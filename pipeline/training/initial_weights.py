"""The weights that a training starts with, where `training.init_from` names an export."""

# Functions import safetensors themselves: few trainings start so.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.config import LayersConfig
from models.export_format import ClassifierSettings, ExportSettings, ModelError, load_weights
from pipeline.checkpoints.folder import CheckpointError

if TYPE_CHECKING:
    from torch import nn

FREE = {"dropout"}  # keys of `model` that weights do not depend on


def load_initial_weights(
    model: nn.Module,
    folder: Path,
    settings: ExportSettings | ClassifierSettings,
    ours: LayersConfig,
) -> None:
    """Load the weights of an export into `model`.

    :param folder: of the export.
    :param settings: what it is. Shapes alone do not tell heads, for example.
    :param ours: the recipe's.
    :raises CheckpointError: the export cannot be trained on, or is of another model.
    """
    from safetensors import SafetensorError

    try:
        if settings.format != "safetensors":
            raise ModelError(
                f"{folder} is in format {settings.format}, and cannot be trained on; "
                "`./run.sh export --format safetensors` writes it as it was"
            )
        its = settings.model.model_dump(mode="json")
        for key, value in ours.model_dump(mode="json", exclude=FREE).items():
            if its[key] != value:
                raise ModelError(f"{folder} has model.{key} {its[key]}, the recipe says {value}")
        load_weights(model, folder)
    except (ModelError, OSError, RuntimeError, SafetensorError) as error:
        problem = "" if isinstance(error, ModelError) else f"{folder} does not fit: "
        text = " ".join(str(error).split())
        raise CheckpointError(f"training.init_from: {problem}{text}") from error
