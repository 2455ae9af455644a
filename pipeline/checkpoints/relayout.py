"""Continue a checkpoint on other ranks, or at another ZeRO stage, than it was written with.

Rank 0 takes the checkpoint apart into DeepSpeed's universal format: a folder of a parameter's
weights and Adam moments for every parameter. Then every rank reads its part of it. Nothing is
rounded: weights and moments stay fp32, and Adam's step goes on.
"""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import get_model_state_file

from pipeline.checkpoints.folder import Checkpoint, CheckpointError, scratch_folder
from pipeline.checkpoints.weights import load_weights, tensors_only
from pipeline.ranks import from_rank_0

MOMENTS = ("exp_avg", "exp_avg_sq")


def carry_over(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Load `checkpoint` into an engine that cuts the optimizer state differently.

    Every rank calls this. It needs about three times the checkpoint's space on disk beside it.

    :raises CheckpointError: the checkpoint cannot be taken apart; on other ranks RankZeroFailed.
    """
    scratch = scratch_folder(checkpoint)
    folder = scratch / "state"  # DeepSpeed's converter writes beside it, too
    try:
        from_rank_0(lambda: _take_apart(engine, checkpoint, folder))
        with tensors_only():
            _read_part(engine, folder)
        dist.barrier()  # before rank 0 deletes what others read
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


# ── Rank 0 ──────────────────────────────────────────────────────────────────────────────────────


def _take_apart(engine: DeepSpeedEngine, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the universal format into `folder`.

    :raises CheckpointError: the checkpoint cannot be read, or the folder not written.
    """
    try:
        with tensors_only():
            _write_universal(engine, checkpoint, folder)
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.folder} cannot be changed to this run's ranks and ZeRO stage "
            f"({type(error).__name__}: {error}); continue with those that wrote it, or remove it "
            "to go on from the one before"
        ) from error


def _write_universal(engine: DeepSpeedEngine, checkpoint: Checkpoint, folder: Path) -> None:
    """Write `folder`: zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt, and common.pt for the rest."""
    shutil.rmtree(folder, ignore_errors=True)
    stage = checkpoint.info.zero_stage
    states = _load(Path(get_model_state_file(str(checkpoint.folder), stage)))
    if stage == 0:
        _write_parameters(
            states, [name for name, _ in _trained_parameters(engine)], folder / "zero"
        )
    else:
        _convert_partitions(checkpoint.folder, folder)
    common = {key: states[key] for key in ("global_steps", "skipped_steps")}
    # DeepSpeed's module lacks what ZeRO-3 has cut; ours lacks parameters that are not trained.
    common["module"] = {**states["module"], **load_weights(checkpoint)}
    torch.save(common, folder / "common.pt")
    # For DeepSpeed's loaders, which look here for hyperparameters; the engine keeps its own.
    groups: list[dict[str, Any]] = [{} for _ in engine.basic_optimizer.param_groups]
    optimizer = {"state": {0: {"step": _adam_step(common)}}, "param_groups": groups}
    torch.save(
        {
            "ds_version": deepspeed.__version__,
            "param_groups": groups,
            "optimizer_state_dict": optimizer,
        },
        folder / "zero" / "optimizer_state.pt",
    )


def _write_parameters(states: dict[str, Any], names: list[str], folder: Path) -> None:
    """Write the parameters of stage 0, whose optimizer numbers them: `names` are in that order."""
    for index, moments in states["optimizer"]["state"].items():
        name = names[index]
        (folder / name).mkdir(parents=True)
        torch.save({"param": states["module"][name]}, folder / name / "fp32.pt")
        for key in MOMENTS:
            torch.save({"param": moments[key]}, folder / name / f"{key}.pt")


def _convert_partitions(source: Path, folder: Path) -> None:
    """Write the parameters of stages 1 to 3, with DeepSpeed's converter."""
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(folder),
        num_extract_workers=1,  # in this process: a fork of one that has a GPU may hang
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    silence = io.StringIO()
    with redirect_stdout(silence), redirect_stderr(silence):
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(arguments)
    for path in folder.glob("zero/*/*.pt"):
        tensor = _load(path)
        if path.stem != "step" and isinstance(tensor, torch.Tensor):  # ZeRO-3's have no wrapping
            torch.save({"param": tensor}, path)


# ── Every rank ──────────────────────────────────────────────────────────────────────────────────


def _read_part(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load what `_take_apart` has written, as far as this rank holds it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    common = _load(folder / "common.pt")
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(common, fetch_z3_params=stage == 3)
    if stage == 0:
        optimizer.load_state_dict(_whole_optimizer_state(engine, folder))
    else:
        optimizer.load_state_dict(None, checkpoint_folder=str(folder))
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_epilogue()
    torch_adam = isinstance(engine.basic_optimizer, (torch.optim.Adam, torch.optim.AdamW))
    step = _adam_step(common)
    for state in engine.basic_optimizer.state.values():
        device = state["exp_avg"].device
        state["step"] = torch.tensor(float(step), device=device) if torch_adam else step
    engine.global_steps, engine.skipped_steps = common["global_steps"], common["skipped_steps"]


def _whole_optimizer_state(engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Return the state of stage 0's optimizer, which is torch's."""
    state = {
        index: {
            "step": 0,  # the caller sets it
            **{
                key: _load(folder / "zero" / name / f"{key}.pt")["param"].view_as(parameter)
                for key in MOMENTS
            },
        }
        for index, (name, parameter) in enumerate(_trained_parameters(engine))
    }
    return {"state": state, "param_groups": engine.optimizer.state_dict()["param_groups"]}


def _trained_parameters(engine: DeepSpeedEngine) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the trained parameters in the order in which torch's optimizer numbers them."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _adam_step(common: dict[str, Any]) -> int:
    """Return Adam's step: DeepSpeed counts a step whose gradient overflowed, Adam does not."""
    return int(common["global_steps"] - common["skipped_steps"])


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
