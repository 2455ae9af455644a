"""Checks before time is spent: the environment, and the room for checkpoints."""

# Functions import torch, fairseq2 and deepspeed themselves: to see whether they can be imported;
# and other functions of this file are for commands that do not wait for them.

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

from data_prep.files import first_line
from pipeline.recipe import Recipe

GIB = 1 << 30


class PreflightError(Exception):
    """Training cannot work in this environment."""


class Space(NamedTuple):
    """Room on the disk for checkpoints, in GiB."""

    free: float
    needed: float  # by all checkpoints together


def check_environment() -> list[str]:
    """Check that what training needs can be imported and compiled.

    :returns: lines that describe the environment and the machine.
    :raises PreflightError: it says what does not fit, and what to do.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise PreflightError(
            f"Python {platform.python_version()}: fairseq2 0.8 has wheels for 3.10 to 3.12; set "
            "PYTHON=python3.12 and run ./run.sh setup again"
        )
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise PreflightError("no C++ compiler: DeepSpeed builds its CPU operators with one")
    if shutil.which("ninja") is None:
        raise PreflightError("no `ninja` on PATH: put .venv/bin there, as ./run.sh does")
    try:
        import torch
    except (ImportError, OSError) as error:
        raise PreflightError(f"torch {version('torch')} cannot be imported: {error}") from error
    try:
        import fairseq2.models.transformer  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise PreflightError(
            f"fairseq2 {version('fairseq2')} does not fit torch {torch.__version__}: "
            f"{first_line(error)}"
        ) from error
    try:
        from deepspeed.accelerator import get_accelerator
    except (ImportError, OSError, RuntimeError) as error:
        raise PreflightError(
            f"deepspeed {version('deepspeed')} cannot be imported: {error}"
        ) from error
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        _build_cpu_operator()
    memory = psutil.virtual_memory().total / GIB
    packages = ("torch", "fairseq2", "deepspeed", "sentencepiece", "sacrebleu", "mlflow")
    return [
        f"Python {platform.python_version()}; "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        f"accelerator {accelerator.device_name()} × {accelerator.device_count()}; "
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory",
    ]


def remove_dead_build_locks() -> list[Path]:
    """Remove what killed builds of DeepSpeed's operators have locked; torch would wait for ever.

    Operators are built in the environment (unless TORCH_EXTENSIONS_DIR says where), so that another
    environment with another torch does not interfere. A build that is alive has its lock open.

    :returns: the locks that were removed.
    """
    home = Path(sys.prefix) if os.access(sys.prefix, os.W_OK) else Path.home() / ".cache"
    root = os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(home / "torch_extensions"))
    locks = sorted(Path(root).glob("*/lock"))
    if not locks:
        return []
    held: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended, or another user's
            held.update(file.path for file in process.open_files())
    dead = [lock for lock in locks if str(lock.resolve()) not in held]
    for lock in dead:
        lock.unlink(missing_ok=True)
    return dead


def check_space(recipe: Recipe, parameters: int) -> Space:
    """Check that there is room for the checkpoints that `recipe` will keep.

    :param parameters: how many the model has.
    :raises PreflightError: the folder cannot be written, or there is not enough room.
    """
    # Weights; for the optimizer a float32 copy of them and two moments; the moving average.
    checkpoint_bytes = (20 if recipe.training.ema_decay else 16) * parameters
    folder = recipe.checkpoints
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PreflightError(f"{folder}: cannot be written: {error.strerror}") from error
    # Besides them the best, and one more: a new one is written before an old one is deleted.
    needed = checkpoint_bytes * (recipe.training.keep_checkpoints + 2)
    ours = folder.glob("step-" + 8 * "[0-9]" + "/*")
    there = sum(path.stat().st_size for path in ours if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise PreflightError(
            f"{folder}: {recipe.training.keep_checkpoints} checkpoints, the best and a new one "
            f"take {needed / GIB:.2f} GiB, and {(free + there) / GIB:.2f} GiB are there; make "
            "room, or lower training.keep_checkpoints"
        )
    return Space(free / GIB, needed / GIB)


def _build_cpu_operator() -> None:
    """Compile what DeepSpeed needs for ranks on CPUs, now rather than in the first training.

    :raises PreflightError: it cannot be compiled.
    """
    from deepspeed.accelerator import get_accelerator

    remove_dead_build_locks()
    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except Exception as error:
        raise PreflightError(
            f"DeepSpeed cannot compile its CPU operator: {first_line(error)}"
        ) from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a build removes its lock
    try:
        report = check_environment()
    except PreflightError as problem:
        sys.exit(f"preflight: error: {problem}")
    print("\n".join(f"preflight: {line}" for line in report), file=sys.stderr)
