# SPDX-License-Identifier: Apache-2.0
"""Time that passes only while this process runs."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """A clock that stops while its process is stopped.

    If a terminal or a job scheduler suspends all processes of a world, the world continues
    afterwards: time in which a process could not run counts neither as waiting nor as delay.

    Args:
        longest: Seconds between two calls of `look`; whatever exceeds it does not count.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._looked = time.monotonic()
        self._lost = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return time.monotonic() - self._lost

    def look(self) -> None:
        """Bring the clock up to date; one thread calls this often."""
        now = time.monotonic()
        self._lost += max(0.0, now - self._looked - self._longest)
        self._looked = now
