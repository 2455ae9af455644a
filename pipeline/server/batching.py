"""Requests of different clients are translated together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from pipeline.translation.serving import TextTranslator, Translation, thread_count

PATIENCE = 0.001  # seconds that the first of a batch waits for others
LINES_OF_CORE = 32  # a batch has for each; more would gain nothing, and those behind it wait

T = TypeVar("T")

Found = list[list[Translation]]
"""The translations of each line."""


class Job(NamedTuple):
    """A request waits for its translations."""

    lines: list[str]
    found: asyncio.Future[Found]


class Batcher:
    """Takes requests as they come, and translates those together that come within a millisecond,
    or while others are translated.

    Everything happens in the event loop but for the translator's work, which has a thread.
    """

    def __init__(
        self, translator: TextTranslator, max_waiting: int, on_batch: Callable[[int], None]
    ) -> None:
        """Make the queue.

        :param max_waiting: so many requests may wait.
        :param on_batch: is called with the number of lines of each batch.
        """
        self.translator, self._on_batch = translator, on_batch
        self._enough = LINES_OF_CORE * thread_count()
        self._max_waiting = max_waiting
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._waiting: set[asyncio.Future[Found]] = set()  # without those that nobody awaits
        self._thread = ThreadPoolExecutor(1, "translate")

    def waiting(self) -> int:
        """Return how many requests wait."""
        return len(self._waiting)

    def submit(self, lines: list[str]) -> asyncio.Future[Found]:
        """Return the future translations of a request; cancelled, they are not made.

        :raises asyncio.QueueFull: too many requests wait.
        """
        if len(self._waiting) >= self._max_waiting:
            raise asyncio.QueueFull
        job = Job(lines, asyncio.get_running_loop().create_future())
        self._waiting.add(job.found)
        job.found.add_done_callback(self._waiting.discard)
        self._queue.put_nowait(job)
        return job.found

    async def run(self) -> None:
        """Translate for ever."""
        while True:
            jobs = [await self._queue.get()]
            if self._queue.empty():
                await asyncio.sleep(PATIENCE)
            jobs = [job for job in jobs if not job.found.done()]
            while not self._queue.empty() and sum(len(job.lines) for job in jobs) < self._enough:
                job = self._queue.get_nowait()
                if not job.found.done():
                    jobs.append(job)
            self._waiting -= {job.found for job in jobs}
            if jobs:
                await self._translate(jobs)

    async def _translate(self, jobs: list[Job]) -> None:
        lines = [line for job in jobs for line in job.lines]
        self._on_batch(len(lines))
        try:
            found = iter(await self.in_thread(lambda: self.translator.n_best(lines)))
        except Exception as error:  # theirs, and not the next batch's
            for job in jobs:
                if not job.found.done():
                    job.found.set_exception(error)
            return
        for job in jobs:
            own = [next(found) for _ in job.lines]
            if not job.found.done():  # its client may have left meanwhile
                job.found.set_result(own)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what the translator's thread gives, when it comes to it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
