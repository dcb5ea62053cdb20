# SPDX-License-Identifier: Apache-2.0
"""Who is alive and what are they doing: one connection from every rank to rank 0.

The connections carry one JSON object a line and no tensors. A process that dies closes its
connection, however it dies, so that rank 0 knows at once and without guessing from silence. A
process that hangs is told apart by its own watching thread, which still runs and reports where the
main thread stands; one that cannot even do that falls silent in the middle of a task.

    rank r ──▶ rank 0    {"rank"}, {"task", "since"}, {"failure"}, {"bye"}
    rank 0 ──▶ rank r    {"failure"}: someone failed;  {"bye", "orderly"}: the run is over;
                         {"abort"}: end the process
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchopt.errors import WorkerError

__all__ = ["Watch", "stack_of"]

_GRACE = 2.0  # seconds that a late worker gets to say where it stands before rank 0 speaks for it


def stack_of(thread_id: int) -> str:
    """Return where a thread of this process stands, as a traceback prints it."""
    frame = sys._current_frames().get(thread_id)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


@dataclass
class _Peer:
    """What is known of a connected process.

    Attributes:
        rank: -1 until it says so.
        task: What it is doing; None between tasks.
        deadline: When, by this process's clock, its task is overdue.
        left: It said good-bye.
    """

    connection: socket.socket
    rank: int = -1
    task: str | None = None
    deadline: float | None = None
    left: bool = False
    pending: bytes = b""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: dict[str, Any]) -> None:
        with self.lock, contextlib.suppress(OSError):  # a lost peer is noticed by the reader
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Watch:
    """Watches over the processes of a world, from one thread in each of them.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        listener: Rank 0's listening socket; None elsewhere.
        connection: The connection to rank 0; None there.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        listener: socket.socket | None = None,
        connection: socket.socket | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.failure: WorkerError | None = None
        self.failed = threading.Event()
        self._peers: dict[int, _Peer] = {}
        self._everyone = threading.Event()
        self._changed = threading.Condition()
        self._own: tuple[str, float, int] | None = None  # task, deadline, thread
        self._closing = False
        self._orderly = False  # rank 0 says that everyone came to the end
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._listener = listener
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, None)
        if connection is not None:
            peer = _Peer(connection, rank=0)
            self._peers[0] = peer
            peer.send({"rank": rank})
            self._selector.register(connection, selectors.EVENT_READ, peer)
        if world_size == 1 or rank != 0:
            self._everyone.set()
        self._thread = threading.Thread(target=self._run, name="torchopt-watch", daemon=True)
        self._thread.start()

    # --- what the main thread calls ---------------------------------------------------------------

    def wait_for_everyone(self, timeout: float) -> None:
        """Return when all ranks are connected to rank 0; on other ranks, at once."""
        if not self._everyone.wait(timeout):
            missing = sorted(set(range(1, self.world_size)) - set(self._peers))
            raise TimeoutError(
                f"expected {self.world_size} processes within {timeout:g} s, ranks {missing} are "
                "missing; start them all, or raise `timeout`"
            )

    @contextlib.contextmanager
    def task(self, name: str, timeout: float) -> Iterator[None]:
        """Hold this thread to finish what is inside in `timeout` seconds, and say what it does."""
        self._own = (name, time.monotonic() + timeout, threading.get_ident())
        self._tell({"task": name, "timeout": timeout})
        self._wake()
        try:
            yield
        finally:
            self._own = None
            self._tell({"task": None})

    def report(self, error: BaseException, task: str | None) -> WorkerError:
        """Tell everyone that this process failed, and return the failure as rank 0 shows it."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        failure = WorkerError(self.rank, task, "raised", text)
        self._fail(failure)
        return failure

    def check(self) -> None:
        """Raise the failure of another process, if there is one."""
        if self.rank == 0:
            self._check_silent()
        if self.failure is not None:
            raise self.failure

    def wait_for_failure(self, timeout: float) -> WorkerError | None:
        """Return the failure of another process, waiting for the news of it."""
        self.failed.wait(timeout)
        return self.failure

    def say_goodbye(self, patience: float, excused: frozenset[int] = frozenset()) -> bool:
        """Tell that this process is done, and wait for the others: rank 0 for all of them, the
        others for rank 0, which may need them until it is done itself.

        Args:
            patience: Seconds to wait; rank 0 then ends those that are not done.
            excused: Ranks that are not waited for.

        Returns:
            Whether all processes came to their end: then the world may be taken down in order.
        """
        self._tell({"bye": True})
        peers = [self._peers[0]] if self.rank != 0 else list(self._peers.values())
        awaited = [p for p in peers if p.rank not in excused]
        with self._changed:
            everyone = self._changed.wait_for(lambda: all(p.left for p in awaited), patience)
        orderly = everyone and not excused and not self.failed.is_set()
        if self.rank != 0:
            return orderly and self._orderly
        for peer in peers:
            peer.send({"bye": True, "orderly": orderly} if peer.left else {"abort": True})
        return orderly

    def abort(self, rank: int) -> None:
        """End the process of another rank (from rank 0)."""
        if rank in self._peers:
            self._peers[rank].send({"abort": True})

    def close(self) -> None:
        """Stop watching."""
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    # --- the watching thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(self._seconds_left()):
                    if key.fileobj is self._wake_reader:
                        self._wake_reader.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                self._check_own()
        finally:
            self._selector.close()
            for peer in list(self._peers.values()):
                peer.connection.close()
            for other in (self._listener, self._wake_reader, self._wake_writer):
                if other is not None:
                    other.close()

    def _seconds_left(self) -> float | None:
        own = self._own
        return None if own is None else max(0.0, own[1] - time.monotonic())

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_writer.send(b".")

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(65536)
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(peer.connection)
            if peer.rank >= 0 and not peer.left and not self._closing:
                self._fail(WorkerError(peer.rank, peer.task, "lost", ""), tell=self.rank == 0)
            peer.left = True
            self._notify()
            return
        *lines, peer.pending = (peer.pending + received).split(b"\n")
        try:
            for line in lines:
                self._hear(peer, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            # Not one of us. A rank would be missed and named; a stranger is shown the door.
            self._selector.unregister(peer.connection)
            peer.connection.close()

    def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "rank" in message:
            if not 0 < int(message["rank"]) < self.world_size or message["rank"] in self._peers:
                raise ValueError(f"unexpected rank {message['rank']}")
            peer.rank = int(message["rank"])
            self._peers[peer.rank] = peer
            if len(self._peers) == self.world_size - 1:
                self._everyone.set()
        if "task" in message:
            peer.task = message["task"]
            peer.deadline = None
            if peer.task is not None:
                peer.deadline = time.monotonic() + message["timeout"] + _GRACE
        if "failure" in message:
            self._fail(WorkerError(**message["failure"]), tell=self.rank == 0)
        if "bye" in message:
            self._orderly = message.get("orderly", False)
            peer.left = True
            self._notify()
        if "abort" in message:
            self._end()

    def _end(self) -> None:
        sys.stderr.write(f"rank {self.rank}: ended by rank 0, because the run failed\n")
        sys.stderr.flush()
        os._exit(1)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _tell(self, message: dict[str, Any]) -> None:
        if self.rank != 0:
            self._peers[0].send(message)

    def _fail(self, failure: WorkerError, *, tell: bool = True) -> None:
        """Keep the first failure and pass it on."""
        if self.failure is None:
            self.failure = failure
        self.failed.set()
        self._notify()
        if tell:
            record = {
                "rank": failure.rank,
                "task": failure.task,
                "kind": failure.kind,
                "remote_traceback": failure.remote_traceback,
            }
            for peer in list(self._peers.values()):
                peer.send({"failure": record})

    def _check_own(self) -> None:
        """End this process if its main thread is stuck in a task."""
        own = self._own
        if own is None or time.monotonic() < own[1]:
            return
        name, _, thread = own
        self._own = None
        failure = WorkerError(self.rank, name, "timed out", stack_of(thread))
        self._fail(failure)
        sys.stderr.write(f"{failure}\n")
        sys.stderr.flush()
        # The thread cannot be stopped from outside, and its peers wait for the connections of this
        # process: closing them is what lets everyone go on to the error.
        os._exit(1)

    def _check_silent(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if peer.deadline is not None and now > peer.deadline and not peer.left:
                self._fail(WorkerError(peer.rank, peer.task, "timed out", ""))
                return
