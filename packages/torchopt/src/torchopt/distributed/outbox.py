# SPDX-License-Identifier: Apache-2.0
"""Which contents each worker has received from this process, and which it can drop."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict, deque

from torch import Tensor

from torchopt.distributed import memory, stats

__all__ = ["Outbox"]

_KEPT = 256 * 2**20  # bytes that a worker keeps for each sender; beyond it the oldest are dropped


class Outbox:
    """Tracks which contents each worker has received from this process.

    A worker keeps a content as long as a living tensor of this process had this content when it was
    last sent, or a call that needs it is in flight.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has: dict[int, OrderedDict[bytes, int]] = {}
        self._version: dict[int, dict[int, bytes]] = {}  # by tensor and worker
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._dead: deque[int] = deque()  # filled by the collector, in any thread
        self._holders: Counter[tuple[int, bytes]] = Counter()
        self._in_use: Counter[tuple[int, bytes]] = Counter()
        self._outdated: dict[int, set[bytes]] = {}

    def missing(
        self, rank: int, contents: dict[bytes, Tensor]
    ) -> tuple[dict[bytes, Tensor], list[bytes]]:
        """Return what to send ahead of a message, and which old contents the worker can drop.

        The contents count as in use until `done` is called.
        """
        new, drop = self._missing(rank, contents)
        memory.count_freed(sum(map(stats.nbytes, new.values())))  # when they have been sent
        return new, drop

    def _missing(
        self, rank: int, contents: dict[bytes, Tensor]
    ) -> tuple[dict[bytes, Tensor], list[bytes]]:
        with self._lock:
            self._bury()
            has = self._has.setdefault(rank, OrderedDict())
            new = {}
            for name, x in contents.items():
                size = x.numel() * x.element_size()
                self._in_use[rank, name] += 1
                self._hold(rank, name, x)
                if name in has:
                    stats.count(parameter_bytes_saved=size)
                    has.move_to_end(name)
                else:
                    # A copy: the caller may change the tensor before it is sent.
                    new[name] = x.detach().clone()
                    has[name] = size
                    stats.count(parameter_bytes=size)
            drop = self._dropped(rank)
            total = sum(has.values())
            for name in list(has):
                if total <= _KEPT:
                    break
                if not self._in_use[rank, name]:
                    drop.append(name)
                    total -= has.pop(name)
            return new, drop

    def _hold(self, rank: int, name: bytes, x: Tensor) -> None:
        """Record the current content of a tensor."""
        key = id(x)
        if key not in self._alive:
            dead = self._dead
            self._alive[key] = weakref.ref(x, lambda _: dead.append(key))
        versions = self._version.setdefault(key, {})
        before = versions.get(rank)
        if before == name:
            return
        versions[rank] = name
        self._holders[rank, name] += 1
        if before is not None:
            self._let_go(rank, before)

    def _let_go(self, rank: int, name: bytes) -> None:
        self._holders[rank, name] -= 1
        if self._holders[rank, name] <= 0:
            del self._holders[rank, name]
            self._outdated.setdefault(rank, set()).add(name)

    def _bury(self) -> None:
        """Release the contents of dead tensors."""
        while self._dead:
            key = self._dead.popleft()
            self._alive.pop(key, None)
            for rank, name in self._version.pop(key, {}).items():
                self._let_go(rank, name)

    def _dropped(self, rank: int) -> list[bytes]:
        """Return and forget the contents that no tensor has any more and no call uses."""
        has, outdated = self._has[rank], self._outdated.get(rank, set())
        outdated -= {name for name in outdated if self._holders[rank, name] or name not in has}
        drop = [name for name in outdated if not self._in_use[rank, name]]
        for name in drop:
            outdated.remove(name)
            del has[name]
        return drop

    def done(self, rank: int, contents: dict[bytes, Tensor]) -> None:
        """Record that the worker has answered a message."""
        with self._lock:
            for name in contents:
                self._in_use[rank, name] -= 1
                if self._in_use[rank, name] <= 0:
                    del self._in_use[rank, name]

    def forget(self, rank: int | None = None) -> None:
        """Record that a worker, or every worker, has no contents."""
        with self._lock:
            if rank is not None:
                self._has.pop(rank, None)
                return
            for table in (self._has, self._version, self._alive, self._holders, self._in_use):
                table.clear()
            self._outdated.clear()
            self._dead.clear()
