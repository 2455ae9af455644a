"""The weights that a training starts with, where `training.init_from` names an export."""

# Functions import safetensors themselves: few trainings start so.

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import LayersConfig
from models.export_format import ClassifierSettings, ExportSettings, ModelError, load_weights
from pipeline.checkpoints.folder import CheckpointError

if TYPE_CHECKING:
    from torch import nn

FREE = {"dropout"}  # keys of `model` that weights do not depend on


def check_initial_weights(
    folder: Path, read: Callable[[], ExportSettings | ClassifierSettings], ours: LayersConfig
) -> None:
    """Compare an export with the model that it is to be the beginning of. Shapes alone do not tell
    heads, for example.

    :param read: compares it with the data, and returns what it is.
    :param ours: the recipe's model.
    :raises CheckpointError: it cannot be trained on, or is of another model or of other data.
    """
    try:
        settings = read()
        if settings.format != "safetensors":
            raise ModelError(
                f"{folder} is in format {settings.format}, and cannot be trained on; "
                "`./run.sh export --format safetensors` writes it as it was"
            )
        theirs = _shape(settings.model)
        for key, value in _shape(ours).items():
            if theirs[key] != value:
                raise ModelError(f"{folder} has model.{key} {theirs[key]}, the recipe says {value}")
    except (ModelError, OSError) as error:
        raise CheckpointError(f"training.init_from: {error}") from error


def _shape(model: LayersConfig) -> dict[str, Any]:
    """Return the keys that weights depend on; a rank that the paper chooses is a number, too."""
    keys = model.model_dump(mode="json", exclude=FREE)
    return {**keys, **{key: model.rank_of(keys[key]) for key in model.ranks}}


def load_initial_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of an export that fits.

    :raises CheckpointError: they are damaged, or not those of this model after all.
    """
    from safetensors import SafetensorError

    try:
        load_weights(model, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"training.init_from: {folder} does not fit: {text}") from error
