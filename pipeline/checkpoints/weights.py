"""TODO docstring."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

from data_prep.vocabulary import vocabulary_digest
from pipeline.checkpoints.folder import (
    EMA_FILE,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    tag_of,
)
from pipeline.checkpoints.resume import refuse_foreign
from pipeline.recipe import Recipe

if TYPE_CHECKING:  # torch and deepspeed take seconds to import
    from torch import Tensor


def checkpoints_to_average(recipe: Recipe) -> list[Checkpoint]:
    """Those of `run_dir` that `evaluation.checkpoint` names, oldest first.

    :raises CheckpointError: there is none, or one belongs to another vocabulary or model.
    """
    folder, wanted = recipe.run_dir / "checkpoints", recipe.evaluation.checkpoint
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{recipe.run_dir}: no finished checkpoint; run `./run.sh train`")
    identity = {
        "model": recipe.model.model_dump(mode="json"),
        "vocabulary": vocabulary_digest(recipe.run_dir / "shards"),
    }
    if wanted == "newest":
        chosen = checkpoints[-recipe.evaluation.average_checkpoints :]
    else:
        best = (folder / "best").read_text("utf-8") if (folder / "best").exists() else "none yet"
        tag = best if wanted == "best" else tag_of(int(wanted))
        chosen = [checkpoint for checkpoint in checkpoints if checkpoint.tag == tag]
    if not chosen:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise CheckpointError(
            f"{folder}: evaluation.checkpoint {wanted} is not there; there are the steps {steps}"
        )
    for checkpoint in chosen:
        if damage := checkpoint.damage():
            raise CheckpointError(
                f"{checkpoint.folder}: {damage}; `./run.sh train` goes back to the one before"
            )
        refuse_foreign(checkpoint.folder, checkpoint.info, identity)
    return chosen


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The consolidated fp32 weights, under the model's own names.

    :raises CheckpointError: damaged.
    """
    import torch

    # DeepSpeed tells its progress on stdout, where `translate` writes translations.
    silence = io.StringIO()
    try:
        with redirect_stdout(silence), redirect_stderr(silence):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if checkpoint.info["zero_stage"] == 0:
            path = checkpoint.folder / "mp_rank_00_model_states.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)["module"]
        else:
            with redirect_stdout(silence), redirect_stderr(silence):
                state = get_fp32_state_dict_from_zero_checkpoint(
                    str(checkpoint.folder.parent), checkpoint.tag
                )
            if checkpoint.info["zero_stage"] < 3:  # DeepSpeed leaves out what is not trained
                path = checkpoint.folder / "mp_rank_00_model_states.pt"
                whole = torch.load(path, map_location="cpu", weights_only=False)["module"]
                state = {**whole, **state}
    except Exception as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be read: {error}") from error
    return {name: tensor.float() for name, tensor in state.items()}


def load_average(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The moving average of the weights, under the model's own names.

    :raises CheckpointError: it has none.
    """
    import torch

    path = checkpoint.folder / EMA_FILE
    if not path.exists():
        raise CheckpointError(
            f"evaluation.use_ema: {checkpoint.folder} has no moving average; it is kept when "
            "training.ema_decay is set"
        )
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["weights"]
    return weights


def average_weights(
    checkpoints: Sequence[Checkpoint], *, use_ema: bool = False
) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints, summed in float64."""
    load = load_average if use_ema else load_weights
    total = {name: tensor.double() for name, tensor in load(checkpoints[0]).items()}
    for checkpoint in checkpoints[1:]:
        for name, tensor in load(checkpoint).items():
            total[name] += tensor
    return {name: (tensor / len(checkpoints)).float() for name, tensor in total.items()}
