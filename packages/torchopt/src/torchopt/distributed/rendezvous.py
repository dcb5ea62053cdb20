# SPDX-License-Identifier: Apache-2.0
"""Counters, barriers and values of all ranks: the hub keeps them, and the others ask the hub.

member ──▶ hub    {"ask", "number"}
hub ──▶ member    {"answer", "value"}
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Rendezvous"]

_LOOK = 0.2  # seconds between two checks for the failure of another process
_TELLING = 2.0  # seconds that the judging process has to name the late one

_Asker = tuple[int, int]  # rank, and the number of its question
_Answers = list[tuple[_Asker, Any]]


class Rendezvous:
    """What the ranks of a world share, as one process sees it.

    Args:
        rank: The rank of this process.
        hub: The rank of the process that keeps everything.
        send: Sends a message to a rank.
        check: Raises if another process failed.
        clock: Returns the time in seconds.
        is_reached: Returns whether the hub can still answer.
    """

    def __init__(
        self,
        rank: int,
        hub: int,
        send: Callable[[int, dict[str, Any]], None],
        check: Callable[[], None],
        clock: Callable[[], float],
        is_reached: Callable[[], bool] = lambda: True,
    ) -> None:
        self.rank = rank
        self.hub = hub
        self._send = send
        self._check = check
        self._clock = clock
        self._is_reached = is_reached
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._asked: set[int] = set()  # the questions of this process that are not answered
        self._answers: dict[int, tuple[Any, str | None]] = {}  # values, and what was wrong
        self._counters: dict[str, tuple[int, int]] = {}
        self._entered: dict[str, list[_Asker]] = {}
        self._values: dict[str, str] = {}
        self._waiting: list[tuple[_Asker, list[str]]] = []  # for values that are not there yet

    def draw(self, counter: str, purpose: int, amount: int) -> int:
        """Add to a counter and return its old value; see `board.Counter`."""
        return int(self.ask("draw", counter, purpose, amount))

    def barrier(self, name: str, size: int, timeout: float) -> None:
        """Wait until `size` processes have reached the barrier of this name.

        Raises:
            WorkerError: Another process failed.
            TimeoutError: A process is late and cannot be identified.
        """
        late = (
            f"rank {self.rank}: expected {size} processes at the barrier within {timeout:g} s; one "
            "of them is late or does not come here"
        )
        self.ask("enter", name, size, timeout=timeout + _TELLING, late=late)

    def ask(self, what: str, *args: Any, timeout: float | None = None, late: str = "") -> Any:
        """Ask the hub and return its answer.

        Args:
            what: A method of this class, without `do_`.
            *args: Its arguments, which JSON can represent.
            timeout: Seconds to wait for the answer; None: no limit.
            late: The text of the error after this time.

        Raises:
            WorkerError: Another process failed.
            TimeoutError: There is no answer in time.
            ConnectionError: The hub has left the world.
            RuntimeError: The hub cannot do it.
        """
        number = next(self._numbers)
        deadline = None if timeout is None else self._clock() + timeout
        self._asked.add(number)
        try:
            if self.rank == self.hub:
                self._settle((self.rank, number), what, *args)
            else:
                self._send(self.hub, {"ask": [what, *args], "number": number})
            with self._changed:
                while number not in self._answers:
                    self._changed.wait(_LOOK)
                    if number in self._answers:
                        break
                    self._check()
                    if not self._is_reached():
                        raise ConnectionError(
                            f"rank {self.rank}: expected an answer from rank {self.hub}, which has "
                            "left the world"
                        )
                    if deadline is not None and self._clock() > deadline:
                        raise TimeoutError(late)
                value, wrong = self._answers[number]
        finally:
            with self._changed:
                self._asked.discard(number)
                is_answered = self._answers.pop(number, None) is not None
            if not is_answered:
                self._forget(number)
        if wrong is not None:
            raise RuntimeError(f"rank {self.hub} was asked for {what!r} and cannot answer: {wrong}")
        return value

    def _forget(self, number: int) -> None:
        """Tell the hub that nobody waits for the answer to a question any more."""
        if self.rank == self.hub:
            self._settle((self.rank, number), "forget")
        else:
            self._send(self.hub, {"ask": ["forget"], "number": number})

    # --- the watching thread ----------------------------------------------------------------------

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        """Handle a message from another rank."""
        if "ask" in message:
            number, question = message["number"], message["ask"]
            try:
                self._settle((rank, number), *question)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
                self._send(rank, {"answer": number, "value": None, "wrong": wrong})
        elif "answer" in message:
            self._keep(message["answer"], message["value"], message.get("wrong"))

    def wake(self) -> None:
        """Wake the waiting threads to check for a failure."""
        with self._changed:
            self._changed.notify_all()

    def _keep(self, number: int, value: Any, wrong: str | None = None) -> None:
        with self._changed:
            if number in self._asked:
                self._answers[number] = value, wrong
                self._changed.notify_all()

    # --- at the hub -------------------------------------------------------------------------------

    def _settle(self, asker: _Asker, what: str, *args: Any) -> None:
        """Do what is asked, and send the answers that are ready."""
        with self._changed:
            ready = getattr(self, f"do_{what}")(asker, *args)
        for (rank, number), value in ready:
            if rank == self.rank:
                self._keep(number, value)
            else:
                self._send(rank, {"answer": number, "value": value})

    def do_draw(self, asker: _Asker, counter: str, purpose: int, amount: int) -> _Answers:
        """Add to a counter; answer with its old value."""
        last, value = self._counters.get(counter, (purpose, 0))
        value = value if last == purpose else 0
        self._counters[counter] = purpose, value + amount
        return [(asker, value)]

    def do_enter(self, asker: _Asker, name: str, size: int) -> _Answers:
        """Enter a barrier; answer all when all have entered."""
        here = self._entered.setdefault(name, [])
        here.append(asker)
        if len(here) < size:
            return []
        del self._entered[name]
        return [(each, True) for each in here]

    def do_get(self, asker: _Asker, keys: list[str]) -> _Answers:
        """Answer with the values of keys when all are there."""
        self._waiting.append((asker, keys))
        return self._found()

    def do_set(self, asker: _Asker, values: dict[str, str]) -> _Answers:
        """Set values."""
        self._values.update(values)
        return [(asker, None), *self._found()]

    def do_exchange(self, asker: _Asker, key: str, expected: str, desired: str) -> _Answers:
        """Set a value if it is the expected one; answer with the value afterwards.

        As in torch's stores, a key that is not there equals "", and otherwise `expected` is the
        answer.
        """
        before = self._values.get(key)
        if (before or "") != expected:
            return [(asker, expected if before is None else before)]
        self._values[key] = desired
        return [(asker, desired), *self._found()]

    def do_add(self, asker: _Asker, key: str, amount: int) -> _Answers:
        """Add to a number; answer with the sum."""
        self._values[key] = str(int(self._values.get(key, "0")) + amount)
        return [(asker, self._values[key]), *self._found()]

    def do_append(self, asker: _Asker, key: str, more: str) -> _Answers:
        """Append to a value."""
        self._values[key] = self._values.get(key, "") + more
        return [(asker, None), *self._found()]

    def do_delete(self, asker: _Asker, key: str) -> _Answers:
        """Delete a value; answer whether there was one."""
        return [(asker, self._values.pop(key, None) is not None)]

    def do_check(self, asker: _Asker, keys: list[str]) -> _Answers:
        """Answer whether all keys are there."""
        return [(asker, all(key in self._values for key in keys))]

    def do_count(self, asker: _Asker) -> _Answers:
        """Answer with the number of keys."""
        return [(asker, len(self._values))]

    def do_forget(self, asker: _Asker) -> _Answers:
        """Remove a question whose answer nobody waits for."""
        self._waiting = [each for each in self._waiting if each[0] != asker]
        return []

    def _found(self) -> _Answers:
        """Return the answers to those who wait for values that are there now."""
        ready, waiting = [], []
        for asker, keys in self._waiting:
            if all(key in self._values for key in keys):
                ready.append((asker, [self._values[key] for key in keys]))
            else:
                waiting.append((asker, keys))
        self._waiting = waiting
        return ready
