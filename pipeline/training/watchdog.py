"""The watchdog ends a rank that waits in vain for another one, and says so."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread


class Watchdog:
    """Ends this process when `seen` was not called for `seconds`, until `stop` is."""

    def __init__(self, seconds: float, rank: int, where: Callable[[], str], stacks: Path) -> None:
        """Begin to watch.

        :param where: tells the position in training, in words.
        :param stacks: the file that gets the Python stacks of this rank.
        """
        self._seconds, self._rank, self._where, self._stacks = seconds, rank, where, stacks
        self._seen, self._stopped = 0, Event()
        Thread(target=self._watch, name="watchdog", daemon=True).start()

    def seen(self) -> None:
        """Note that there is progress."""
        self._seen += 1

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def _watch(self) -> None:
        # Counted and not read from a clock: while this process is suspended (Ctrl-Z, `scontrol
        # suspend`), it waits for nobody.
        quiet, seen, tick = 0.0, 0, min(1.0, self._seconds)
        while quiet < self._seconds:
            if self._stopped.wait(tick):
                return
            last, seen = seen, self._seen
            quiet = quiet + tick if seen == last else 0.0
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
