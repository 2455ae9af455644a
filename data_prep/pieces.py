"""A map over pieces on any `concurrent.futures.Executor`, which can be interrupted and continued.

The files made from a piece appear all at once, by a rename, so a killed command loses only the
pieces that were being worked on. They depend on nothing but the piece: the bytes are the same for
any number of workers, on one machine or on many. Steps that are not cut by pieces of a corpus (a
shard to gather, a range of hashes to compare) are mapped over in the same way.
"""

from __future__ import annotations

import asyncio
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
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from data_prep.config import Preparation
from data_prep.files import (
    DataError,
    are_whole,
    first_line,
    fsync,
    read_json,
    sha256_of,
    write_json,
)
from data_prep.stage import log

PieceT = TypeVar("PieceT")
Result = dict[str, Any]
"""What work on a piece returned, in JSON values."""

RESULT = "result.json"  # in the folder of a piece: what work returned, and digests of its files
SECONDS_TO_CONNECT = 10
SECONDS_BETWEEN_LINES = 20.0  # of progress in the log, where there is no terminal


@contextmanager
def open_executor(config: Preparation) -> Iterator[Executor]:
    """Start processes on this machine, or connect to the workers of a Dask scheduler.

    :raises DataError: Dask is not installed, or its scheduler does not answer.
    """
    if config.executor == "dask":
        with _dask_executor(str(config.scheduler)) as executor:
            yield executor
        return
    workers = config.workers or len(os.sched_getaffinity(0))
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others keep freed memory
    # Not forked: a child would inherit the lock on run_dir and hold it after its parent is killed.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=tie_to_parent) as pool:
        yield pool


def tie_to_parent() -> None:
    """Let this worker leave Ctrl-C to its parent, and end when its parent has ended."""
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
            f"data.scheduler {scheduler}: no Dask scheduler answers there ({first_line(error)})"
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
    work: Callable[[PieceT, Path], Mapping[str, Any]],
    pieces: Sequence[PieceT],
    folder: Path,
    lines: Callable[[PieceT], int] | None = None,
) -> list[Result]:
    """Call `work(piece, its folder)` for every piece that has no whole folder in `folder` yet.

    :param work: a module-level function (it is pickled), which writes files into the folder it is
        given and returns JSON values.
    :param folder: receives a folder `NNNNN` for each piece; an absolute path that all workers see.
    :param lines: how many a piece has, where their rate is worth telling.
    :returns: what `work` returned for each piece, in the order of `pieces`.
    :raises DataError: a worker died, or `work` raised it; finished pieces stay.
    """
    folder.mkdir(exist_ok=True)
    label = folder.name.removeprefix("scratch-")
    _remove_unfinished(folder)
    places = [folder / f"{index:05d}" for index in range(len(pieces))]
    there = [place for place in places if place.exists()]
    with ThreadPoolExecutor() as threads:
        for place, whole in zip(there, threads.map(_is_whole, there), strict=True):
            if not whole:
                log.info("%s: not whole, made anew", place)
                shutil.rmtree(place)
    todo = [index for index, place in enumerate(places) if not place.exists()]
    if len(todo) < len(pieces):
        log.info(
            "%s: %d of %d pieces were done before",
            label,
            len(pieces) - len(todo),
            len(pieces),
        )
    if len(todo) == 1:  # not worth a worker
        _make_folder(work, pieces[todo[0]], places[todo[0]])
    else:
        futures: dict[Future[None], int] = {}  # and their sizes
        try:
            for index in todo:
                future = executor.submit(_make_folder, work, pieces[index], places[index])
                futures[future] = lines(pieces[index]) if lines else 1
            for future in _show_progress(label, futures, "lines" if lines else "pieces"):
                future.result()
        except Exception as error:
            # Dask may not be installed, so its error is known by name only.
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
        _remove_unfinished(folder)  # left by a worker that died and whose piece another one took
    return [read_json(place / RESULT)["result"] for place in places]


def _remove_unfinished(folder: Path) -> None:
    for unfinished in folder.glob(".*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_whole(place: Path) -> bool:
    """Tell whether the folder of a piece that was made before is as it was written."""
    files = read_json(place / RESULT).get("files")
    return isinstance(files, dict) and are_whole(place, files)


def _make_folder(
    work: Callable[[PieceT, Path], Mapping[str, Any]], piece: PieceT, place: Path
) -> None:
    """Call `work` on a piece in a temporary folder, and rename that to `place` when it is whole."""
    partial = place.with_name(f".{place.name}.{uuid4().hex}")
    partial.mkdir()
    try:
        result = work(piece, partial)
        files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        write_json(partial / RESULT, {"result": result, "files": files})
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.exists():  # a worker of a killed command may have been faster
                raise
        fsync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _show_progress(
    label: str, futures: Mapping[Future[None], int], unit: str
) -> Iterator[Future[None]]:
    """Yield what is done; show a bar meanwhile, or write a line now and then to the log.

    :param futures: with their sizes.
    :param unit: of the sizes; the rate is told of lines only.
    """
    console = Console(stderr=True)
    columns = (TextColumn(f"{label}:"), *Progress.get_default_columns()[1:3])
    started = said = time.monotonic()
    total, count, rate = sum(futures.values()), 0, ""
    with Progress(
        *columns, MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(label, total=total, text=unit)
        for item in as_completed(futures):
            yield item
            count, now = count + futures[item], time.monotonic()
            rate = f" ({count / (now - started):.1f} a second)" if unit == "lines" else ""
            left = (now - started) / count * (total - count)
            text = f"{unit}{rate}, {left:.0f} s left"
            progress.update(task, completed=count, text=text)
            if not console.is_terminal and now - said > SECONDS_BETWEEN_LINES:
                said = now
                log.info("%s: %d of %d %s", label, count, total, text)
    if rate:
        log.info("%s: %d lines in %.1f s%s", label, count, time.monotonic() - started, rate)
