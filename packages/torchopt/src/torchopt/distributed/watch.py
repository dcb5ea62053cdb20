# SPDX-License-Identifier: Apache-2.0
"""Who is alive and what are they doing: one connection from every rank to the first, the hub.

Every process has a thread that sends, a few times a second, what its main thread does and for how
long. The thread of the hub is the one that judges, by `judge`; the others judge the hub alone, by
the same rules. A process that dies closes its connection, however it dies. One that hangs is told
apart by its own thread, which still runs and reports where the main thread stands. One that is
stopped falls silent.

    member ──▶ hub    {"doing"}, {"failure"}, {"bye"}, {"stands"}, {"draw"}, {"enter"}
    hub ──▶ member    {"doing"}, {"failure"}, {"bye", "orderly"}, {"where"}, {"drawn"}, {"open"},
                      {"abort"}: end the process
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from torchopt.distributed.board import Board
from torchopt.distributed.judge import Doing, Verdict, View, judge
from torchopt.distributed.link import Link, StrangerError
from torchopt.errors import WorkerError

__all__ = ["Watch", "stack_of"]

_BEAT = 0.2  # seconds between two messages of a process that is alive
_ANSWER = 1.0  # seconds that a late process has to say where it stands


def stack_of(thread_id: int) -> str:
    """Return where a thread of this process stands, as a traceback prints it."""
    frame = sys._current_frames().get(thread_id)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


class Watch:
    """Watches over the processes of a world, from one thread in each of them.

    Args:
        rank: Of this process, in the world.
        ranks: Those that take part, in order; the first is the hub.
        timeout: Seconds without a sign of life after which a process counts as gone.
        token: What the processes share.
        listener: The hub's listening socket; None elsewhere.
        hub: The connection to the hub; None there.
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
        self._token = token
        self._board = board
        self._changed = threading.Condition()
        self._links: dict[int, Link] = {}
        self._views: dict[int, View] = {rank: View()}
        self._asked: dict[int, tuple[float, Verdict]] = {}
        self._answers: dict[Any, Any] = {}
        self._numbers = itertools.count()
        self._counters: dict[str, int] = {}
        self._entered: dict[str, list[int]] = {}
        self._doing = Doing("other", None, 0.0, (), time.monotonic())
        self._thread_id = threading.get_ident()
        self._closing = False
        self._orderly = False  # the hub says that everyone came to the end
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._listener = listener
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, None)
        if hub is not None:
            self._join(hub)
            for message in hub.early:
                self._hear(hub, message)
        self._thread = threading.Thread(target=self._run, name="torchopt-watch", daemon=True)
        self._thread.start()

    def _join(self, link: Link) -> None:
        self._views[link.rank] = View()
        self._links[link.rank] = link
        if link.connection not in (key.fileobj for key in self._selector.get_map().values()):
            self._selector.register(link.connection, selectors.EVENT_READ, link)

    # --- what the main thread calls ---------------------------------------------------------------

    def wait_for_everyone(self, timeout: float) -> None:
        """Return when all ranks are connected to the hub; on other ranks, at once."""
        if self.rank != self.hub:
            return
        with self._changed:
            if self._changed.wait_for(lambda: len(self._views) == len(self.ranks), timeout):
                return
        missing = sorted(set(self.ranks) - set(self._views))
        raise TimeoutError(
            f"expected {len(self.ranks)} processes within {timeout:g} s, ranks {missing} are "
            "missing; start them all, or raise `timeout`"
        )

    @contextlib.contextmanager
    def task(self, name: str, timeout: float) -> Iterator[None]:
        """Hold this thread to finish what is inside in `timeout` seconds, and say what it does."""
        before, self._thread_id = self._doing, threading.get_ident()
        self._now(Doing("task", name, timeout, (), time.monotonic()))
        try:
            yield
        finally:
            after = before.name if before.kind == "task" else f"after {name}"
            self._now(before._replace(name=after, since=time.monotonic()))

    def start_operation(self, name: str, timeout: float, ranks: tuple[int, ...]) -> Doing:
        """Note that this thread waits for others; pass the result to `end_operation`."""
        before = self._doing
        self._doing = Doing("operation", name, timeout, ranks, time.monotonic())
        return before

    def end_operation(self, before: Doing) -> None:
        """Note that the operation is over."""
        self._doing = before._replace(since=time.monotonic())

    def note(self, place: str) -> None:
        """Say where this process is when it is in no task."""
        self._now(Doing("other", place, 0.0, (), time.monotonic()))

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
        """Return the failure of another process, waiting for the news of it."""
        self.failed.wait(timeout)
        return self.failure

    def draw(self, counter: str, amount: int = 1) -> int:
        """Add to a counter that all share, and return what it was; it starts at 0."""
        if self.rank == self.hub:
            return self._add(counter, amount)
        number = next(self._numbers)
        self._links[self.hub].send({"draw": counter, "amount": amount, "number": number})
        with self._changed:
            while number not in self._answers:
                self._changed.wait(_BEAT)
                self.check()
            return int(self._answers.pop(number))

    def discard(self, counter: str) -> None:
        """Forget a counter, at the hub."""
        self._counters.pop(counter, None)

    def barrier(self, name: str, size: int, ranks: tuple[int, ...], timeout: float) -> None:
        """Wait until `size` processes have come here with the same name.

        Raises:
            WorkerError: Another process failed, or `ranks` are known and one of them is late.
            TimeoutError: One of unknown rank is late.
        """
        before = self.start_operation(f"the barrier {name}", timeout, ranks)
        deadline = time.monotonic() + timeout + 2.0
        if self.rank == self.hub:
            self._enter(name, size, self.rank)
        else:
            self._links[self.hub].send({"enter": name, "size": size})
        try:
            with self._changed:
                while name not in self._answers:
                    self._changed.wait(_BEAT)
                    self.check()
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"rank {self.rank}: expected {size} processes at the barrier within "
                            f"{timeout:g} s; one of them is late or does not come here"
                        )
                del self._answers[name]
        finally:
            self.end_operation(before)

    def say_goodbye(self, excused: frozenset[int]) -> bool:
        """Tell that this process is done, and wait for the others: the hub for all of them, the
        others for the hub, which may need them until it is done itself. A slow one is waited for
        as long as it lives.

        Args:
            excused: Ranks that are not waited for; the hub ends them.

        Returns:
            Whether all processes came to their end: then the world may be taken down in order.
        """
        self._doing = self._doing._replace(kind="end")
        self._views[self.rank].leave()
        self._tell({"bye": True})
        others = [rank for rank in self._links if rank not in excused]

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
                # A failure that the hub has caught: its calls to this process go on.
                self._changed.wait_for(lambda: self._views[self.hub].left, self.timeout)
        orderly = not excused and not self.failed.is_set() and over()
        if self.rank != self.hub:
            return orderly and self._orderly
        for rank, link in list(self._links.items()):
            link.send(
                {"bye": True, "orderly": orderly}
                if self._views[rank].left or rank not in excused
                else {"abort": True}
            )
        return orderly

    def abort(self, rank: int) -> None:
        """End the process of another rank (from the hub)."""
        if rank in self._links:
            self._links[rank].send({"abort": True})

    def close(self) -> None:
        """Stop watching."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake_writer.send(b".")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    # --- the watching thread ----------------------------------------------------------------------

    def _run(self) -> None:
        next_beat = 0.0
        try:
            while not self._closing:
                for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                    if key.fileobj is self._wake_reader:
                        self._wake_reader.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + _BEAT
                    self._beat()
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self._wake_writer.close()
            self._selector.close()

    def _beat(self) -> None:
        doing = self._doing
        self._check_own(doing)
        now = time.monotonic()
        message = {"doing": [*doing[:4], now - doing.since]}
        for link in list(self._links.values()):
            link.send(message)
        own = self._views[self.rank]
        own.doing, own.heard = doing, now
        if self.failure is None:
            known = dict(self._views)
            if self.rank != self.hub:
                known = {rank: known[rank] for rank in (self.hub, self.rank)}
            verdict = judge(known, now, self.timeout, self.rank)
            if verdict is not None:
                self._convict(verdict, now)

    def _convict(self, verdict: Verdict, now: float) -> None:
        """Make a verdict a failure; one who is alive is asked first where it stands."""
        rank = verdict.rank
        if rank == self.rank and verdict.kind == "timed out":
            self._fail(verdict.error(stack_of(self._thread_id)))
        elif rank is not None and verdict.silent:
            self._fail(verdict._replace(task=self._last_note(rank)).error(""))
        elif rank is None or verdict.kind != "timed out":
            self._fail(verdict.error(""))
        elif rank not in self._asked:
            self._asked[rank] = (now, verdict)
            self._links[rank].send({"where": True})
        elif now > self._asked[rank][0] + _ANSWER:
            self._fail(verdict.error(""))

    def _accept(self) -> None:
        assert self._listener is not None
        link = Link(self._listener.accept()[0])
        self._selector.register(link.connection, selectors.EVENT_READ, link)
        link.greet()

    def _read(self, link: Link) -> None:
        try:
            messages = link.receive()
            if messages is None:
                self._selector.unregister(link.connection)
                link.connection.close()
                if link.rank >= 0:
                    self._lose(link.rank)
                return
            for message in messages:
                if link.rank < 0:
                    self._admit(link, message)
                else:
                    self._hear(link, message)
        except (StrangerError, KeyError, TypeError, ValueError):
            # Not one of us. A rank would be missed and named; a stranger is shown the door.
            if link.rank < 0:
                self._selector.unregister(link.connection)
                link.connection.close()

    def _admit(self, link: Link, message: dict[str, Any]) -> None:
        rank = link.admit(message, self._token)
        if rank not in self.ranks or rank in self._links or rank == self.rank:
            link.rank = -1
            raise StrangerError
        with self._changed:
            self._join(link)
            self._changed.notify_all()

    def _lose(self, rank: int) -> None:
        view = self._views[rank]
        if not view.left and not self._closing:
            self._fail(WorkerError(rank, self._last_note(rank), "lost", ""))
        with self._changed:
            view.leave()
            self._changed.notify_all()

    def _last_note(self, rank: int) -> str | None:
        """Return what a process did last that cannot be asked any more."""
        noted = None if self._board is None else self._board.read(rank)
        return noted or self._views[rank].doing.name

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        view = self._views[link.rank]
        if "doing" in message:
            *doing, age = message["doing"]
            kind, name, limit, ranks = doing
            view.heard = time.monotonic()
            view.doing = Doing(kind, name, limit, tuple(ranks), view.heard - age)
        elif "failure" in message:
            self._fail(WorkerError(**message["failure"]), tell=self.rank == self.hub)
        elif "where" in message:
            link.send({"stands": stack_of(self._thread_id)})
        elif "stands" in message and link.rank in self._asked:
            self._fail(self._asked[link.rank][1].error(message["stands"]))
        elif "draw" in message:
            value = self._add(message["draw"], message["amount"])
            link.send({"drawn": message["number"], "value": value})
        elif "drawn" in message:
            self._answer(message["drawn"], message["value"])
        elif "enter" in message:
            self._enter(message["enter"], message["size"], link.rank)
        elif "open" in message:
            self._answer(message["open"], True)
        elif "bye" in message:
            self._orderly = message.get("orderly", False)
            with self._changed:
                view.leave()
                self._changed.notify_all()
        elif "abort" in message:
            sys.stderr.write(f"rank {self.rank}: ended by rank {self.hub}; the run failed\n")
            sys.stderr.flush()
            os._exit(1)

    def _answer(self, key: Any, value: Any) -> None:
        with self._changed:
            self._answers[key] = value
            self._changed.notify_all()

    def _add(self, counter: str, amount: int) -> int:
        with self._changed:
            value = self._counters.get(counter, 0)
            self._counters[counter] = value + amount
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
                self._answer(name, True)
            else:
                self._links[each].send({"open": name})

    def _tell(self, message: dict[str, Any]) -> None:
        if self.rank != self.hub:
            self._links[self.hub].send(message)

    def _fail(self, failure: WorkerError, *, tell: bool = True) -> None:
        """Keep the first failure and pass it on."""
        if self.failure is None:
            self.failure = failure
        self.failed.set()
        with self._changed:
            self._changed.notify_all()
        if tell:
            record = {
                "rank": failure.rank,
                "task": failure.task,
                "kind": failure.kind,
                "remote_traceback": failure.remote_traceback,
            }
            for link in list(self._links.values()):
                link.send({"failure": record})

    def _check_own(self, doing: Doing) -> None:
        """End this process if its main thread is stuck in a task."""
        if doing.kind != "task" or time.monotonic() < doing.since + doing.limit:
            return
        failure = WorkerError(self.rank, doing.name, "timed out", stack_of(self._thread_id))
        self._fail(failure)
        sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        # The thread cannot be stopped from outside, and its peers wait for the connections of this
        # process: closing them is what lets everyone go on to the error.
        os._exit(1)
