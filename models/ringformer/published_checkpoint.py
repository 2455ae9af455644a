"""This module reads checkpoints of the published implementation (code of arXiv 2502.13181)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_prep.files import first_line

FFN_SIGNAL, VISION_FFN_SIGNAL = "encoder.lev_param_FF_01", "transformer.encoder.lev_embed_FF_01"
"""Tensors that tell by their names which model a checkpoint is of."""


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, also below a key of its own; tensors only, never code.

    :returns: a state dict with `FFN_SIGNAL` or `VISION_FFN_SIGNAL`.
    :raises ValueError: it is not a checkpoint of the published implementation.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types, where a file is damaged
        raise ValueError(f"{path}: not a file of tensors only: {first_line(error)}") from error
    for state_dict in (content, *(content.values() if isinstance(content, dict) else ())):
        if isinstance(state_dict, dict) and not state_dict.keys().isdisjoint(
            (FFN_SIGNAL, VISION_FFN_SIGNAL)
        ):
            return state_dict
    raise ValueError(f"{path}: not a RingFormer of the published implementation")


def copy_weights(weights: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> None:
    """Copy the weights in a checkpoint to parameters.

    :param names: published name → parameter, or a view into one.
    :raises KeyError: a tensor is missing.
    :raises ValueError: a tensor has another shape than the parameter.
    """
    with torch.no_grad():
        for name, parameter in names.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{name} is {list(weights[name].shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(weights[name])
