# SPDX-License-Identifier: Apache-2.0
"""Counters and barriers that the ranks share: the hub keeps them, and the others ask the hub.

member ──▶ hub    {"draw"}, {"enter"}
hub ──▶ member    {"drawn"}, {"open"}
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Rendezvous"]

_LOOK = 0.2  # seconds between two checks for the failure of another process
_TELLING = 2.0  # seconds that the judging process has to name the late one


class Rendezvous:
    """The counters and barriers of a world, as one process sees them.

    Args:
        rank: The rank of this process.
        hub: The rank of the process that keeps the counters and barriers.
        send: Sends a message to a rank.
        check: Raises if another process failed.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        rank: int,
        hub: int,
        send: Callable[[int, dict[str, Any]], None],
        check: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.rank = rank
        self.hub = hub
        self._send = send
        self._check = check
        self._clock = clock
        self._changed = threading.Condition()
        self._answers: dict[Any, Any] = {}
        self._numbers = itertools.count()
        self._counters: dict[str, tuple[int, int]] = {}
        self._entered: dict[str, list[int]] = {}

    def draw(self, counter: str, purpose: int, amount: int) -> int:
        """Add to a counter and return its old value; see `board.Counter`."""
        if self.rank == self.hub:
            return self._add(counter, purpose, amount)
        number = next(self._numbers)
        self._send(self.hub, {"draw": [counter, purpose, amount], "number": number})
        return int(self._answer(number, None, ""))

    def barrier(self, name: str, size: int, timeout: float) -> None:
        """Wait until `size` processes have reached the barrier of this name.

        Raises:
            WorkerError: Another process failed.
            TimeoutError: A process is late and cannot be identified.
        """
        if self.rank == self.hub:
            self._enter(name, size, self.rank)
        else:
            self._send(self.hub, {"enter": name, "size": size})
        self._answer(
            name,
            timeout,
            f"rank {self.rank}: expected {size} processes at the barrier within {timeout:g} s; one "
            "of them is late or does not come here",
        )

    def _answer(self, key: Any, timeout: float | None, late: str) -> Any:
        deadline = None if timeout is None else self._clock() + timeout + _TELLING
        with self._changed:
            while key not in self._answers:
                self._changed.wait(_LOOK)
                self._check()
                if deadline is not None and self._clock() > deadline:
                    raise TimeoutError(late)
            return self._answers.pop(key)

    # --- the watching thread ----------------------------------------------------------------------

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        """Handle a message from another rank."""
        if "draw" in message:
            value = self._add(*message["draw"])
            self._send(rank, {"drawn": message["number"], "value": value})
        elif "drawn" in message:
            self._keep(message["drawn"], message["value"])
        elif "enter" in message:
            self._enter(message["enter"], message["size"], rank)
        elif "open" in message:
            self._keep(message["open"], True)

    def wake(self) -> None:
        """Wake the waiting threads to check for a failure."""
        with self._changed:
            self._changed.notify_all()

    def _keep(self, key: Any, value: Any) -> None:
        with self._changed:
            self._answers[key] = value
            self._changed.notify_all()

    def _add(self, counter: str, purpose: int, amount: int) -> int:
        with self._changed:
            last, value = self._counters.get(counter, (purpose, 0))
            value = value if last == purpose else 0
            self._counters[counter] = purpose, value + amount
        return value

    def _enter(self, name: str, size: int, rank: int) -> None:
        with self._changed:
            here = self._entered.setdefault(name, [])
            here.append(rank)
            if len(here) < size:
                return
            del self._entered[name]
        for each in here:
            if each == self.rank:
                self._keep(name, True)
            else:
                self._send(each, {"open": name})
