# SPDX-License-Identifier: Apache-2.0
"""Time as far as this process could notice it."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """A clock that stands while its process is stopped.

    A world that is suspended as a whole, by a terminal or a job scheduler, goes on afterwards: who
    could not listen has not waited, and who could not run has not been late.

    Args:
        longest: Seconds between two looks; of a longer time the rest does not count.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._looked = time.monotonic()
        self._lost = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return time.monotonic() - self._lost

    def look(self) -> None:
        """Notice the time; one thread calls this often."""
        now = time.monotonic()
        self._lost += max(0.0, now - self._looked - self._longest)
        self._looked = now
