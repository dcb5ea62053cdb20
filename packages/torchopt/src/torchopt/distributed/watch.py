# SPDX-License-Identifier: Apache-2.0
"""Find out which processes are alive and what they do.

Every rank is connected to the first one, the hub. In every process a thread sends, a few times a
second, what the main thread does and for how long. The thread of the hub judges all ranks, by
`judge`; the others judge only the hub, by the same rules. When a process dies, for whatever reason,
its connection closes. When its main thread hangs, its own watching thread still runs and reports
the stack. When a process is stopped, its heartbeats stop.

    member ──▶ hub    {"doing"}, {"failure"}, {"bye"}, {"stands"}; see also `rendezvous`
    hub ──▶ member    {"doing"}, {"failure"}, {"bye", "orderly"}, {"where"},
                      {"abort"}: end the process
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from torchopt.distributed.board import Board
from torchopt.distributed.clock import Clock
from torchopt.distributed.connections import Connections
from torchopt.distributed.inside import own
from torchopt.distributed.judge import Doing, Verdict, View, judge
from torchopt.distributed.link import Link
from torchopt.distributed.raised import stack_of
from torchopt.distributed.rendezvous import Rendezvous
from torchopt.errors import WorkerError

__all__ = ["Watch"]

_BEAT = 0.2  # seconds between two messages of a process that is alive
_AWAKE = 0.5  # seconds without a beat after which this process must have been stopped
_MUTE = 3.0  # seconds without a heartbeat before its end after which a process was stuck
_ANSWER = 1.0  # seconds that a late process has to send its stack


class _Task:
    """A block that must be left in time."""

    def __init__(self, watch: Watch, name: str, limit: float, ranks: tuple[int, ...]) -> None:
        self._watch, self._name, self._limit, self._ranks = watch, name, limit, ranks

    def __enter__(self) -> None:
        watch, self._outer = self._watch, own.tasks
        own.tasks = (*self._outer, self._ranks)
        self._before, watch._thread_id = watch._doing, threading.get_ident()
        watch._now(Doing("task", self._name, self._limit, (), watch._clock()))

    def __exit__(self, *error: object) -> None:
        before, own.tasks = self._before, self._outer
        after = before.name if before.kind == "task" else f"after {self._name}"
        self._watch._now(before._replace(name=after, since=self._watch._clock()))


class Watch:
    """Watches over the processes of a world, from one thread in each of them.

    Args:
        rank: The rank of this process in the world.
        ranks: The ranks that take part, in order; the first is the hub.
        timeout: Seconds without a heartbeat after which a process counts as lost.
        token: The secret that the processes share.
        listener: The hub's listening socket; None elsewhere.
        hub: The connection to the hub; None at the hub itself.
        board: Notes that outlive a process; None across machines.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        timeout: float,
        token: str,
        *,
        listener: socket.socket | None = None,
        hub: Link | None = None,
        board: Board | None = None,
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self.hub = ranks[0]
        self.timeout = timeout
        self.failure: WorkerError | None = None
        self.failed = threading.Event()
        self._board = board
        self._changed = threading.Condition()
        self._clock = Clock(_AWAKE)
        self._views: dict[int, View] = {rank: View(self._clock())}
        self._asked: dict[int, tuple[float, Verdict]] = {}
        self._doing = Doing("other", None, 0.0, (), self._clock())
        self._thread_id = threading.get_ident()
        self._orderly = False  # set when the hub reports that every rank reached its end
        self._connections = Connections(rank, ranks, token, self, _BEAT, listener=listener, hub=hub)
        self._rendezvous = Rendezvous(
            rank, self.hub, self._connections.send, self.check, self._clock, self._is_hub_there
        )
        self._connections.start()

    # --- called by the main thread ----------------------------------------------------------------

    def wait_for_everyone(self, timeout: float) -> None:
        """Wait until all ranks are connected to the hub; on other ranks, return at once."""
        if self.rank != self.hub:
            return

        def missing() -> set[int]:
            return {*self.ranks} - {*self._views}

        with self._changed:
            self._changed.wait_for(lambda: self.failed.is_set() or not missing(), timeout)
        self.check()
        if not missing():
            return
        raise TimeoutError(
            f"expected {len(self.ranks)} processes within {timeout:g} s, ranks "
            f"{sorted(missing())} are missing; start them all, or raise `timeout`"
        )

    def task(self, name: str, timeout: float, ranks: tuple[int, ...]) -> _Task:
        """Require this thread to leave the block within `timeout` seconds, and report its task.

        Args:
            name: What the task is, in words.
            timeout: Seconds that the task may take.
            ranks: The ranks that each have a task of their own in the meantime.
        """
        return _Task(self, name, timeout, ranks)

    def start_operation(self, name: str, timeout: float, ranks: tuple[int, ...]) -> Doing:
        """Record that this thread waits for others; pass the result to `end_operation`."""
        before = self._doing
        self._doing = Doing("operation", name, timeout, ranks, self._clock())
        return before

    def end_operation(self, before: Doing) -> None:
        """Record that the operation is over."""
        self._doing = before._replace(since=self._clock())

    @contextlib.contextmanager
    def operation(self, name: str, timeout: float, ranks: tuple[int, ...]) -> Iterator[None]:
        """Record that this thread waits for others until the end of the block."""
        before = self.start_operation(name, timeout, ranks)
        try:
            yield
        finally:
            self.end_operation(before)

    def note(self, place: str) -> None:
        """Report where this process is while it runs no task."""
        self._now(Doing("other", place, 0.0, (), self._clock()))

    def _now(self, doing: Doing) -> None:
        self._doing = doing
        if self._board is not None:
            self._board.write(doing.name or "")

    @property
    def doing_now(self) -> str | None:
        """What the main thread does, in words."""
        return self._doing.name

    def report(self, error: BaseException, task: str | None) -> WorkerError:
        """Tell everyone that this process failed, and return the failure as they see it."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        failure = WorkerError(self.rank, task, "raised", text)
        self._fail(failure)
        return failure

    def check(self) -> None:
        """Raise the failure of another process, if there is one."""
        if self.failure is not None:
            raise self.failure

    def wait_for_failure(self, timeout: float) -> WorkerError | None:
        """Wait for the report of the failure of another process, and return it."""
        self.failed.wait(timeout)
        return self.failure

    def draw(self, counter: str, purpose: int, amount: int, name: str, limit: float) -> int:
        """Add to a shared counter, an operation that waits for the hub; see `board.Counter`."""
        with self.operation(name, limit, (self.hub, self.rank)):
            return self._rendezvous.draw(counter, purpose, amount)

    def _is_hub_there(self) -> bool:
        return not self._connections.closing and self.hub not in self._connections.ended

    def ask(self, what: str, *args: Any, timeout: float | None = None, late: str = "") -> Any:
        """Ask the hub; see `Rendezvous.ask`.

        Raises:
            RuntimeError: This is the thread that would read the answer.
        """
        if self._connections.is_reading:
            raise RuntimeError(
                f"rank {self.rank}: expected a question to rank {self.hub} ({what}) in another "
                "thread, found one in the thread that reads the answers, where a finalizer or a "
                "signal handler has called torch.distributed; call it in a thread of the program"
            )
        return self._rendezvous.ask(what, *args, timeout=timeout, late=late)

    def wait_for_ends(self, timeout: float) -> None:
        """Wait, at the hub, until the connections of the others have ended."""
        if self.rank == self.hub:
            links = self._connections
            with self._changed:
                self._changed.wait_for(lambda: links.ended.issuperset(links.ranks), timeout)

    def barrier(self, name: str, size: int, ranks: tuple[int, ...], timeout: float) -> None:
        """Wait until `size` processes have reached the barrier of this name.

        Raises:
            WorkerError: Another process failed, or `ranks` are known and one of them is late.
            TimeoutError: A process of unknown rank is late.
        """
        with self.operation(f"the barrier {name}", timeout, ranks):
            self._rendezvous.barrier(name, size, timeout)

    def say_goodbye(self, excused: frozenset[int]) -> bool:
        """Announce that this process is done and wait for the others.

        The hub waits for all others. The others wait for the hub, which may need them until it is
        done itself. A slow process is waited for as long as it lives.

        Args:
            excused: Ranks that are not waited for.

        Returns:
            Whether all processes reached their end, so that the world can be shut down in order.
        """
        self._connections.admits = False
        self._doing = self._doing._replace(kind="end")
        self._views[self.rank].leave(self._clock())
        self._connections.send(self.hub, {"bye": True})  # does nothing at the hub
        others = [rank for rank in self._connections.ranks if rank not in excused]

        def over() -> bool:
            return self.failed.is_set() or all(self._views[rank].left for rank in others)

        with self._changed:
            if not self._changed.wait_for(over, self.timeout):
                late = [rank for rank in others if not self._views[rank].left]
                sys.stderr.write(
                    f"rank {self.rank}: at its end; waits for ranks {late}, which are alive\n"
                )
                self._changed.wait_for(over)
            if self.rank != self.hub and self.failure is not None and self.failure.rank != self.hub:
                # The hub has caught the failure and may still call this process.
                self._changed.wait_for(lambda: self._views[self.hub].left, self.timeout)
        orderly = not excused and not self.failed.is_set() and over()
        if self.rank != self.hub:
            return orderly and self._orderly
        for rank in self._connections.ranks:
            self._connections.send(rank, {"bye": True, "orderly": orderly})
        return orderly

    def abort(self, rank: int) -> None:
        """End the process of another rank (from the hub)."""
        self._connections.send(rank, {"abort": True})

    def end_stopped(self) -> None:
        """End the stopped processes of this machine."""
        if self._board is not None:
            self._board.end_stopped(self.ranks)

    def forget(self) -> None:
        """Release everything in a forked child, which is not a rank.

        If a child kept a connection, the end of its parent would go unnoticed.
        """
        self._board, own.tasks = None, ()
        self._changed = threading.Condition()
        self._rendezvous = Rendezvous(0, 0, lambda *_: None, lambda *_: None, self._clock)
        self._connections.forget()

    def close(self) -> None:
        """Stop watching."""
        self._connections.close()

    # --- called by the reading thread -------------------------------------------------------------

    def awake(self) -> None:
        """Update the clock before reading messages, which may have waited long."""
        self._clock.look()

    def beat(self) -> None:
        """Send what this process does, and judge the others."""
        doing = self._doing
        self._check_own(doing)
        now = self._clock()
        message = {"doing": [*doing[:4], now - doing.since]}
        for rank in self._connections.ranks:
            self._connections.send(rank, message)
        view = self._views[self.rank]
        view.doing, view.heard = doing, now
        if self.failure is None:
            known = dict(self._views)
            if self.rank != self.hub:
                known = {rank: known[rank] for rank in (self.hub, self.rank)}
            verdict = judge(known, now, self.timeout, self.rank)
            if verdict is not None:
                self._convict(verdict, now)

    def _convict(self, verdict: Verdict, now: float) -> None:
        """Turn a verdict into a failure; ask a process that is alive for its stack first."""
        rank = verdict.rank
        if rank == self.rank and verdict.kind == "timed out":
            self._fail(verdict.error(stack_of(self._thread_id)))
        elif rank is not None and verdict.silent:
            self._fail(verdict._replace(task=self._last_note(rank)).error(""))
        elif rank is None or verdict.kind != "timed out":
            self._fail(verdict.error(""))
        elif rank not in self._asked:
            self._asked[rank] = (now, verdict)
            self._connections.send(rank, {"where": True})
        elif now > self._asked[rank][0] + _ANSWER:
            self._fail(verdict.error(""))

    def joined(self, rank: int) -> None:
        """Add a rank."""
        self._views[rank] = View(self._clock())
        self._wake()

    def lost(self, rank: int) -> None:
        """Record that a process is gone."""
        view = self._views[rank]
        if not view.left and not self._connections.closing:
            # Another rank may have found that it is stuck, and somebody has ended it since.
            was_ended = self._board is not None and self._board.was_ended(rank)
            is_silent = self._clock() - view.heard > _MUTE
            kind = "timed out" if was_ended or is_silent else "lost"
            self._fail(WorkerError(rank, self._last_note(rank), kind, ""))
        view.leave(self._clock())
        self._wake()

    def _last_note(self, rank: int) -> str | None:
        """Return the last known activity of a lost process."""
        noted = None if self._board is None else self._board.read(rank)
        return noted or self._views[rank].doing.name

    def heard(self, rank: int, message: dict[str, Any]) -> None:
        """Handle a message."""
        view = self._views[rank]
        if "doing" in message:
            *doing, age = message["doing"]
            kind, name, limit, ranks = doing
            view.heard = self._clock()
            view.doing = Doing(kind, name, limit, tuple(ranks), view.heard - age)
        elif "failure" in message:
            self._fail(WorkerError(**message["failure"]), tell=self.rank == self.hub)
        elif "where" in message:
            self._connections.send(rank, {"stands": stack_of(self._thread_id)})
        elif "stands" in message and rank in self._asked:
            self._fail(self._asked[rank][1].error(message["stands"]))
        elif "bye" in message:
            self._orderly = message.get("orderly", False)
            view.leave(self._clock())
            self._wake()
        elif "abort" in message:
            sys.stderr.write(f"rank {self.rank}: ended by rank {self.hub}; the run failed\n")
            sys.stderr.flush()
            os._exit(1)
        else:
            self._rendezvous.hear(rank, message)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._rendezvous.wake()

    def _fail(self, failure: WorkerError, *, tell: bool = True) -> None:
        """Keep the first failure and send it to the other ranks."""
        self._connections.admits = False
        if self.failure is None:
            self.failure = failure
        self.failed.set()
        self._wake()
        if tell:
            parts = ("rank", "task", "kind", "remote_traceback")
            record = {part: getattr(failure, part) for part in parts}
            for rank in self._connections.ranks:
                self._connections.send(rank, {"failure": record})

    def _check_own(self, doing: Doing) -> None:
        """End this process if its main thread is stuck in a task."""
        if doing.kind != "task" or self._clock() < doing.since + doing.limit:
            return
        failure = WorkerError(self.rank, doing.name, "timed out", stack_of(self._thread_id))
        self._fail(failure)
        sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        # A thread cannot be stopped from outside, and the peers wait on connections of this
        # process. Only when the process ends do they get their errors.
        os._exit(1)
