"""Work in independent pieces, on any `concurrent.futures.Executor`, restartable piece by piece.

A piece's files appear all at once, by a rename, so that a killed command loses only the pieces that
it had in hand. What a piece holds depends on nothing but the piece: the bytes are the same for any
number of workers, on one machine or on many.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.config import DataConfig
from data_prep.files import DataError, fsync, write_json
from data_prep.stage import log

Piece = TypeVar("Piece")
Result = dict[str, Any]

SECONDS_TO_CONNECT = 10
SECONDS_BETWEEN_LINES = 20.0  # of progress, where there is no terminal


@contextmanager
def executor_of(config: DataConfig) -> Iterator[Executor]:
    """Processes of this machine, or the workers of a Dask scheduler.

    :raises DataError: Dask is not installed, or its scheduler does not answer.
    """
    if config.executor == "dask":
        with _dask_executor(str(config.scheduler)) as executor:
            yield executor
        return
    workers = config.workers or len(os.sched_getaffinity(0))
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others keep what is freed
    # Not forked: a child would inherit the lock of run_dir and hold it after our death.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    """A worker leaves interrupts to its parent and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _dask_executor(scheduler: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError as error:
        raise DataError(
            "data.executor dask needs the extra `cluster`: pip install -e '.[cluster]'"
        ) from error
    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.scheduler {scheduler}: no Dask scheduler answers there ({error})"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
        except asyncio.TimeoutError as error:  # not the builtin one on 3.10
            raise DataError(f"data.scheduler {scheduler} has no workers") from error
        # Not pure: what an earlier command computed may be gone from the disk.
        yield client.get_executor(pure=False)  # type: ignore[no-untyped-call]


def map_pieces(
    executor: Executor,
    work: Callable[[Piece, Path], Mapping[str, Any]],
    pieces: Sequence[Piece],
    folder: Path,
) -> list[Result]:
    """Call `work(piece, its folder)` for every piece that `folder` does not hold yet.

    :param work: a function of a module (it is pickled); writes files into the folder it is given
        and returns JSON values.
    :param folder: receives a folder `NNNNN` of each piece; absolute, seen by all workers.
    :returns: what `work` returned for each piece, in the order of `pieces`.
    :raises DataError: a worker died, or what `work` raises; finished pieces stay.
    """
    folder.mkdir(exist_ok=True)
    label = folder.name.removeprefix("scratch-")
    _remove_torn(folder)
    done = {place.name for place in folder.iterdir()}
    places = [folder / f"{index:05d}" for index in range(len(pieces))]
    todo = [index for index, place in enumerate(places) if place.name not in done]
    if len(todo) < len(pieces):
        log.info(
            "%s: %d of %d pieces were done before",
            label,
            len(pieces) - len(todo),
            len(pieces),
        )
    if len(todo) == 1:  # not worth a worker
        _do(work, pieces[todo[0]], places[todo[0]])
    else:
        futures: list[Future[None]] = []
        try:
            for index in todo:
                futures.append(executor.submit(_do, work, pieces[index], places[index]))
            for future in _with_progress(label, as_completed(futures), len(futures)):
                future.result()
        except Exception as error:
            # Dask's is named here, for it may not be installed.
            died = isinstance(error, BrokenProcessPool | CancelledError)
            if not died and type(error).__name__ != "KilledWorker":
                raise
            raise DataError(
                f"{label}: a worker died (killed, or out of memory: fewer --data.workers "
                "need less); run the same command again to continue"
            ) from error
        finally:
            for future in futures:
                future.cancel()
        _remove_torn(folder)  # of a worker that died and whose piece another one took
    return [json.loads((place / "result.json").read_text(encoding="utf-8")) for place in places]


def _remove_torn(folder: Path) -> None:
    for torn in folder.glob(".*"):
        shutil.rmtree(torn, ignore_errors=True)


def _do(work: Callable[[Any, Path], Mapping[str, Any]], piece: Any, place: Path) -> None:
    partial = place.with_name(f".{place.name}.{uuid4().hex}")
    partial.mkdir()
    try:
        write_json(partial / "result.json", work(piece, partial))
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.exists():  # else a worker of a killed command was faster
                raise
        fsync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_progress(label: str, done: Iterator[Any], total: int) -> Iterator[Any]:
    console = Console(stderr=True)
    columns = (TextColumn(f"{label}:"), *Progress.get_default_columns()[1:3])
    started = said = time.monotonic()
    with Progress(
        *columns, MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(label, total=total)
        for count, item in enumerate(done, start=1):
            yield item
            progress.advance(task)
            now = time.monotonic()
            if not console.is_terminal and now - said > SECONDS_BETWEEN_LINES:
                said, left = now, (now - started) / count * (total - count)
                log.info("%s: %d of %d pieces, %.0f s left", label, count, total, left)
