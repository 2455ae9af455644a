"""Checks of the environment before time is spent."""

# Functions import torch, fairseq2 and deepspeed themselves: to see whether they can be imported;
# and other functions of this file are for commands that do not wait for them.

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import psutil

from data_prep.files import first_line

GIB = 1 << 30


class PreflightError(Exception):
    """Training cannot work in this environment."""


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
