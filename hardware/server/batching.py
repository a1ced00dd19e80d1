"""Micro-batching without waiting: whenever a runtime is free, it takes what is queued, up to a limit of images."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError


@dataclass(frozen=True)
class Answer:
    """What a runtime says of images, a row each.

    Attributes:
        readouts: int64 ``(samples, classes)``.
        spikes: int64 ``(samples, spiking populations)``, over all steps and neurons; None where not counted.
    """

    readouts: NDArray[np.int64]
    spikes: NDArray[np.int64] | None = None

    def __getitem__(self, rows: slice) -> Answer:
        """The answer to some of the images."""
        return Answer(self.readouts[rows], None if self.spikes is None else self.spikes[rows])


SWEEP_SECONDS = 0.1
SHORT_SECONDS = 0.002
"""Batches that are expected to take less are run in the event loop, where nobody waits for longer than that."""
Run = Callable[[NDArray[np.uint8], bool], Answer]
"""Codes ``(samples, *shape)``, and whether to count their spikes."""


class FullError(SpikeguardError):
    """The queue is full; ``seconds`` says when to try again."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"the queue is full; try again in {seconds} s")


@dataclass(eq=False, slots=True)
class _Waiting:
    codes: NDArray[np.uint8]
    counts_spikes: bool
    deadline: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Gathers requests into batches for a runtime that takes its time, in threads. To be made in the event loop.

    All methods are for the event loop's thread.

    Args:
        run: answers a batch of at most ``batch`` images. Requests that do not want their spikes counted share a batch
            with those that do.
        batch: images that are run at once; a request of more is run in parts.
        queue: images that may wait. A request of more is taken if none wait.
        timeout: seconds for an answer.
        inline: run batches that are expected to be short in the event loop, which is for ``run`` that only computes.
        concurrency: batches that run at the same time.
        watch: is told the images of each batch.
    """

    def __init__(
        self,
        run: Run,
        batch: int,
        queue: int,
        concurrency: int,
        timeout: float,
        inline: bool = False,
        watch: Callable[[int], Any] = lambda _images: None,
    ) -> None:
        self._run, self._batch, self._limit, self._timeout, self._watch = run, batch, queue, timeout, watch
        self._free, self._inline = concurrency, inline and concurrency == 1
        self._loop = asyncio.get_running_loop()
        self._batches: SimpleQueue[list[_Waiting] | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"batch-{n}", daemon=True) for n in range(concurrency)]
        for thread in self._threads:
            thread.start()
        self._waiting: deque[_Waiting] = deque()
        self._running: set[_Waiting] = set()
        self._scheduled = False
        self._sweeping = False
        self._seconds_per_image = math.inf
        self.queued = 0

    async def answer(self, codes: NDArray[np.uint8], counts_spikes: bool = False) -> Answer:
        """Wait for the answer to images; to be cancelled by whoever does not want it any more.

        Raises:
            FullError: if too many images wait already.
            TimeoutError: if it takes too long.
            SpikeguardError: if the runtime did not finish.
        """
        if self.queued and self.queued + len(codes) > self._limit:
            seconds = self.queued * self._seconds_per_image
            raise FullError(max(1, math.ceil(seconds)) if math.isfinite(seconds) else 1)
        item = _Waiting(codes, counts_spikes, self._loop.time() + self._timeout, self._loop.create_future())
        self._waiting.append(item)
        self.queued += len(codes)
        self._schedule()
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_SECONDS, self._sweep)
        return await item.answer

    def close(self) -> None:
        """Wait for the batches that run; nothing else must wait any more."""
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join()

    def _schedule(self) -> None:
        """Start batches once all that has arrived in this turn of the loop is queued."""
        if self._free and self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        self._scheduled = False
        while self._free and (items := self._take()):
            if self._is_short(items):
                self._finish(items, *self._timed(items))
                self._schedule()  # others have their turn before the next batch
                return
            self._free -= 1
            self._running.update(items)
            self._batches.put(items)

    def _sweep(self) -> None:
        """Give up what has waited too long: one timer for all costs less than one for each request."""
        now = self._loop.time()
        for item in (*self._waiting, *self._running):
            if item.deadline < now and not item.answer.done():
                item.answer.set_exception(TimeoutError())
        self._sweeping = bool(self._waiting or self._running)
        if self._sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _take(self) -> list[_Waiting]:
        items: list[_Waiting] = []
        images = 0
        while self._waiting and (not items or images + len(self._waiting[0].codes) <= self._batch):
            item = self._waiting.popleft()
            self.queued -= len(item.codes)
            if not item.answer.done():  # else nobody waits for it any more
                items.append(item)
                images += len(item.codes)
        return items

    def _is_short(self, items: list[_Waiting]) -> bool:
        """Whether a batch takes less time than handing it to a thread and back is worth."""
        images = sum(len(item.codes) for item in items)
        plain = not any(item.counts_spikes for item in items)
        return self._inline and plain and images * self._seconds_per_image < SHORT_SECONDS

    def _work(self) -> None:
        """A thread: batches in, answers out, until the end."""
        while (items := self._batches.get()) is not None:
            found = self._timed(items)
            self._loop.call_soon_threadsafe(self._finish_work, items, *found)

    def _finish_work(self, items: list[_Waiting], found: Answer | Exception, seconds: float) -> None:
        self._free += 1
        self._running.difference_update(items)
        self._finish(items, found, seconds)
        self._schedule()

    def _timed(self, items: list[_Waiting]) -> tuple[Answer | Exception, float]:
        """The answer to a batch, or why there is none, and how long it took."""
        start = time.perf_counter()
        found: Answer | Exception
        try:
            found = self._answers(items)
        except Exception as error:
            found = error
        return found, time.perf_counter() - start

    def _answers(self, items: list[_Waiting]) -> Answer:
        """The answers to all images, in order."""
        codes = items[0].codes if len(items) == 1 else np.concatenate([item.codes for item in items])
        counts_spikes = any(item.counts_spikes for item in items)
        if len(codes) <= self._batch:
            return self._run(codes, counts_spikes)
        parts = [
            self._run(codes[first : first + self._batch], counts_spikes) for first in range(0, len(codes), self._batch)
        ]
        spikes = [part.spikes for part in parts if part.spikes is not None]
        readouts = np.concatenate([part.readouts for part in parts])
        return Answer(readouts, np.concatenate(spikes) if len(spikes) == len(parts) else None)

    def _finish(self, items: list[_Waiting], found: Answer | Exception, seconds: float) -> None:
        first = 0
        for item in items:
            last = first + len(item.codes)
            if not item.answer.done():
                if isinstance(found, Exception):
                    item.answer.set_exception(found)
                else:
                    item.answer.set_result(found[first:last])
            first = last
        self._seconds_per_image = seconds / first
        self._watch(first)
