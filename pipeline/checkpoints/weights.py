"""The weights in checkpoints: those that evaluation takes, whole and in float32, averaged."""

# Functions import torch and deepspeed themselves: that takes seconds, and choosing needs neither.

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from data_prep.arrow import validation_digest
from data_prep.files import first_line
from data_prep.identity import check_recipe
from pipeline.checkpoints.folder import (
    EMA_FILE,
    Checkpoint,
    CheckpointError,
    DamagedCheckpointError,
    best_tag,
    list_checkpoints,
    scheduled_ones,
    tag_of,
)
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def checkpoints_to_average(recipe: Recipe) -> list[Checkpoint]:
    """Return the checkpoints of `run_dir` that `evaluation.checkpoint` names, oldest first.

    :raises CheckpointError: there is none, or one is damaged.
    """
    folder, wanted = recipe.checkpoints, recipe.evaluation.checkpoint
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"{recipe.run_dir}: no finished checkpoint; run `./run.sh train`")
    if wanted == "newest":
        # An interruption must not change which weights are evaluated; without any others its
        # checkpoint is all there is.
        regular = scheduled_ones(checkpoints) or checkpoints[-1:]
        chosen = regular[-recipe.evaluation.average_checkpoints :]
    else:
        tag = best_tag(folder) if wanted == "best" else tag_of(int(wanted))
        chosen = [checkpoint for checkpoint in checkpoints if checkpoint.tag == tag]
    if not chosen:
        steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
        raise CheckpointError(
            f"{folder}: evaluation.checkpoint {wanted} is not there; there are the steps {steps}"
        )
    for checkpoint in chosen:
        try:
            checkpoint.check()
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"{error}; `./run.sh train` goes back to the one before"
            ) from error
    return chosen


def fitting_checkpoints(
    recipe: Recipe, identity: Callable[[Any], dict[str, Any]]
) -> list[Checkpoint]:
    """Return the checkpoints that `checkpoints_to_average` does, if they fit the recipe.

    :param identity: gives what a model of a recipe is bound to.
    :raises CheckpointError: there is none, or one belongs to something else; or it is the best by
        another validation set.
    :raises DataError: the data were not prepared as the recipe says.
    """
    checkpoints = checkpoints_to_average(recipe)
    check_recipe(recipe.data, recipe.run_dir)
    bound_to = identity(recipe)
    for checkpoint in checkpoints:
        checkpoint.refuse_other(bound_to)
    if recipe.evaluation.checkpoint == "best":
        (best,) = checkpoints
        verdict = list_checkpoints(recipe.checkpoints)[-1].info.validation
        if not verdict.is_of(validation_digest(recipe.shards)):
            raise CheckpointError(
                f"{best.folder} was found best by another validation set than that of "
                f"{recipe.shards}; train on, or name a step by evaluation.checkpoint"
            )
    return checkpoints


def _stage(kind: Any, name: str) -> Any:
    """Return a member of DeepSpeed's enumeration of stages, and of nothing else: Python 3.11.0 to
    3.11.3 pickle it as `getattr(ZeroStageEnum, name)`.

    :raises UnpicklingError: of anything else.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise UnpicklingError(f"getattr({kind!r}, {name!r})")
    return ZeroStageEnum[name]


@contextmanager
def tensors_only() -> Iterator[None]:
    """Let `torch.load` read tensors and plain values only, whoever calls it in the block.

    A pickle may hold code, which DeepSpeed's own calls would run.

    :raises CheckpointError: a file holds something else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import safe_globals

    switches = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        kinds = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with safe_globals([*kinds, (_stage, "builtins.getattr")]):
            yield
    except UnpicklingError as error:
        raise CheckpointError(
            "a file holds more than tensors and plain values, and is not read: it could be code"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the whole weights in float32, under the model's own names.

    :raises CheckpointError: the checkpoint is damaged, or holds more than tensors.
    """
    import torch

    stage = checkpoint.info.zero_stage
    # DeepSpeed tells its progress on stdout, where `translate` writes translations.
    silence = io.StringIO()
    try:
        with redirect_stdout(silence), redirect_stderr(silence):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with tensors_only():
                state = {}
                if stage < 3:  # at stages 1 and 2 for what is not trained, which DeepSpeed omits
                    path = checkpoint.folder / "mp_rank_00_model_states.pt"
                    state = torch.load(path, map_location="cpu")["module"]
                if stage > 0:
                    folder, tag = str(checkpoint.folder.parent), checkpoint.tag
                    state |= get_fp32_state_dict_from_zero_checkpoint(folder, tag)
        return {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.folder}: cannot be read: {first_line(error)}"
        ) from error


def load_average(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the moving average of the weights, under the model's own names.

    :raises CheckpointError: the checkpoint has none.
    """
    import torch

    path = checkpoint.folder / EMA_FILE
    if not path.exists():
        raise CheckpointError(
            f"evaluation.use_ema: {checkpoint.folder} has no moving average; it is kept when "
            "training.ema_decay is set"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = saved["weights"]
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from error
    return weights


def average_weights(
    checkpoints: Sequence[Checkpoint], *, use_ema: bool = False
) -> dict[str, Tensor]:
    """Return the mean of the weights of several checkpoints, summed in float64.

    :raises CheckpointError: one is damaged, lacks a moving average, or not all are numbers.
    """
    load = load_average if use_ema else load_weights
    total = {name: tensor.double() for name, tensor in load(checkpoints[0]).items()}
    for checkpoint in checkpoints[1:]:
        for name, tensor in load(checkpoint).items():
            total[name] += tensor
    if not all(tensor.isfinite().all() for tensor in total.values()):
        raise CheckpointError(
            f"{', '.join(str(each.folder) for each in checkpoints)}: not all weights are numbers; "
            "training has diverged"
        )
    return {name: (tensor / len(checkpoints)).float() for name, tensor in total.items()}
