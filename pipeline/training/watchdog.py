"""A rank that waits for others which hang says so and ends, instead of waiting in silence."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread


class Watchdog:
    """Ends this process when `seen` was not called for `seconds`, until `stop` is."""

    def __init__(self, seconds: float, rank: int, where: Callable[[], str], stacks: Path) -> None:
        """
        :param where: what to say about the position in training.
        :param stacks: file for the Python stacks of this rank.
        """
        self._seconds, self._rank, self._where, self._stacks = seconds, rank, where, stacks
        self._last, self._stopped = time.monotonic(), Event()
        Thread(target=self._watch, name="watchdog", daemon=True).start()

    def seen(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while (left := self._last + self._seconds - time.monotonic()) > 0:
            if self._stopped.wait(min(left, 1.0)):
                return
        print(
            f"train: error: rank {self._rank} on {socket.gethostname()}: no progress for "
            f"{self._seconds:.0f} s {self._where()} (training.collective_timeout). A rank that "
            f"does not say this hangs or was lost; where this one waits is in {self._stacks}. Run "
            "the same command again to continue from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        writer = Thread(target=self._write_stacks, daemon=True)  # the disk may hang, too
        writer.start()
        writer.join(5)
        os._exit(1)

    def _write_stacks(self) -> None:
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
