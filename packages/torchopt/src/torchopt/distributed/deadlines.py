# SPDX-License-Identifier: Apache-2.0
"""Functions that are called at a given time unless they are cancelled first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import traceback
from collections.abc import Callable

__all__ = ["Deadlines"]

_CALLED_OFF = 64  # cancelled entries before the queue is rebuilt


class Deadlines:
    """Calls functions at given times, from a thread of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[tuple[float, int]] = []
        self._functions: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, seconds: float, func: Callable[[], None]) -> int:
        """Call `func` after some seconds (<= 0: never). Return a number to pass to `call_off`."""
        number = next(self._numbers)
        if seconds <= 0:
            return number
        with self._changed:
            at = time.monotonic() + seconds
            self._functions[number] = func
            heapq.heappush(self._queue, (at, number))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            if self._queue[0][0] == at:
                self._changed.notify()
        return number

    def call_off(self, number: int) -> None:
        """Cancel a call that has not happened yet."""
        with self._changed:
            self._functions.pop(number, None)
            if len(self._queue) > 2 * len(self._functions) + _CALLED_OFF:
                self._queue = [entry for entry in self._queue if entry[1] in self._functions]
                heapq.heapify(self._queue)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue or self._queue[0][0] > time.monotonic():
                    wait = self._queue[0][0] - time.monotonic() if self._queue else None
                    self._changed.wait(wait)
                _, number = heapq.heappop(self._queue)
                func = self._functions.pop(number, None)
            try:
                if func is not None:
                    func()
            except Exception:  # the others are called at their times all the same
                traceback.print_exc()
            del func  # so that it does not live until the next one
