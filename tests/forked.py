"""Programs as processes that are forked from a server, which has done the imports: a start takes a
second, not ten."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from pipeline.recipe import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pipeline.train",
        "pipeline.training.run",
        "pipeline.translation.validation",
        "pipeline.evaluate",
        "tests.pipeline.ranks",
        # What these import when they are first used takes most of a short training's time.
        "mlflow",
        "mlflow.store.tracking.sqlalchemy_store",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.zero.stage3",
        "torch.utils.hipify.hipify_python",
    ]
)


def run_module(module: str, arguments: list[str], streams: Path, seconds: float) -> int | None:
    """Run `python -m MODULE ARGUMENTS…` in the checkout, with this process's environment.

    :param streams: a folder with the file `stdin`; it gets `stdout` and `stderr`.
    :param seconds: a process that does not end is killed.
    :returns: the exit code.
    """
    target = (module, arguments, str(streams), dict(os.environ))
    process = SERVER.Process(target=_run_module, args=target)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{module} did not end: {(streams / 'stderr').read_text()}")
    return process.exitcode


def _run_module(
    module: str, arguments: list[str], streams: str, environment: dict[str, str]
) -> None:
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        os.dup2(os.open(f"{streams}/{name}", flags), number)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has closed it
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # runpy would warn of it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
