# SPDX-License-Identifier: Apache-2.0
"""The connections of one process of a world, and the thread that reads them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from typing import Any, Protocol

from torchopt.distributed.link import Link, StrangerError, name_of

__all__ = ["Connections", "Listener"]

_STRANGERS = 64  # the most connections without the token, in addition to one for each rank


class Listener(Protocol):
    """Receives the events of `Connections`, in the reading thread."""

    def joined(self, rank: int) -> None:
        """A rank has joined."""

    def heard(self, rank: int, message: dict[str, Any]) -> None:
        """A rank has sent a message."""

    def lost(self, rank: int) -> None:
        """The connection to a rank has ended."""

    def awake(self) -> None:
        """The thread woke up and is about to read."""

    def beat(self) -> None:
        """It is time for a heartbeat."""


class Connections:
    """Reads from connected ranks: the hub reads from all ranks, the others from the hub.

    Args:
        rank: The rank of this process.
        ranks: The ranks that may join.
        token: The secret that they share.
        told: The receiver of events.
        period: Seconds between two beats.
        listener: The hub's listening socket; None elsewhere.
        hub: The connection to the hub; None at the hub itself.

    Attributes:
        admits: Whether ranks may still join.
        ended: The ranks whose connections have ended.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        token: str,
        told: Listener,
        period: float,
        *,
        listener: socket.socket | None,
        hub: Link | None,
    ) -> None:
        self._rank = rank
        self._ranks = ranks
        self._token = token
        self._told = told
        self._period = period
        self.admits = True
        self.ended: set[int] = set()
        self._links: dict[int, Link] = {}
        self._strangers: list[Link] = []
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._listener = listener
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, None)
        if hub is not None:
            self._links[hub.rank] = hub
            self._selector.register(hub.connection, selectors.EVENT_READ, hub)
        self._thread = threading.Thread(target=self._run, name="torchopt-watch", daemon=True)

    def start(self) -> None:
        """Start the reading thread."""
        for rank, link in self._links.items():
            self._told.joined(rank)
            for line in link.early:
                self._told.heard(rank, link.message(line))
        self._thread.start()

    @property
    def ranks(self) -> list[int]:
        """The ranks that have joined."""
        return list(self._links)

    @property
    def closing(self) -> bool:
        """Whether the connections are closed."""
        return self._closing

    @property
    def is_reading(self) -> bool:
        """Whether this is the reading thread, which must not wait for a message."""
        return threading.current_thread() is self._thread

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Send a message to a rank if it has joined."""
        link = self._links.get(rank)
        if link is not None:
            link.send(message)

    def close(self) -> None:
        """Stop reading."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake_writer.send(b".")
        if not self.is_reading:
            self._thread.join(timeout=5.0)

    def forget(self) -> None:
        """Close the sockets that a forked child has inherited; it has no reading thread."""
        self._closing, self._links = True, {}
        self._close_all()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        next_beat = 0.0
        try:
            while not self._closing:
                if not self.admits:
                    self._stop_listening()
                found = self._selector.select(max(0.0, next_beat - time.monotonic()))
                self._told.awake()
                for key, _ in found:
                    if key.fileobj is self._wake_reader:
                        self._wake_reader.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._read(key.data)
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._period
                    self._told.beat()
        except BaseException:  # a fault of this package: nobody reads from now on
            for rank in self.ranks:
                self._told.lost(rank)
            raise
        finally:
            self._close_all()

    def _stop_listening(self) -> None:
        """Leave the address to the next world, whose ranks would take this hub for theirs."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._wake_writer.close()
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        if len(self._strangers) >= _STRANGERS + len(self._ranks):
            self._drop(self._strangers[0])
        with contextlib.suppress(OSError):  # the other side has already closed it
            link = Link(self._listener.accept()[0])
            self._selector.register(link.connection, selectors.EVENT_READ, link)
            self._strangers.append(link)
            link.greet()

    def _read(self, link: Link) -> None:
        try:
            lines = link.receive()
            for line in lines or ():
                message = link.message(line)
                if link.rank < 0:
                    self._admit(link, message)
                else:
                    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                        self._told.heard(link.rank, message)
        except Exception as error:
            if link.rank >= 0 and not isinstance(error, StrangerError):
                raise
            lines = None  # whatever a stranger sends, it is disconnected
        if lines is None:
            self._drop(link)
            if link.rank >= 0:  # of a stranger nothing is told: a missing rank is named later
                self.ended.add(link.rank)
                self._told.lost(link.rank)

    def _drop(self, link: Link) -> None:
        with contextlib.suppress(KeyError, ValueError):  # already closed in this round
            self._selector.unregister(link.connection)
        link.connection.close()
        if link in self._strangers:
            self._strangers.remove(link)

    def _admit(self, link: Link, message: dict[str, Any]) -> None:
        if not self.admits:
            raise StrangerError
        rank = link.admit(message, self._token, self._refusal)
        self._strangers.remove(link)
        self._links[rank] = link
        self._told.joined(rank)

    def _refusal(self, rank: int, world: str) -> str | None:
        """Return why a process with the token cannot be a rank of this world, or None."""
        size = world.partition(":")[0]
        if size != str(len(self._ranks)):
            found = f"one of {len(self._ranks)} processes"
        elif rank in self._links:
            found = f"one in which {self._links[rank].who} is this rank"
        elif world != name_of(self._ranks) or rank == self._rank or rank not in self._ranks:
            found = f"one of ranks {list(self._ranks)}"
        else:
            return None
        return (
            f"rank {rank} of {size}: expected a world that waits for this process, found {found}; "
            "end what is left of an earlier run, and give each world a port (MASTER_PORT) or a "
            "TORCHOPT_TOKEN of its own"
        )
