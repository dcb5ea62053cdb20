# SPDX-License-Identifier: Apache-2.0
"""Memory of one machine in which the ranks of a group add up vectors.

Each rank copies a vector into its slot. Two or three ranks then read all slots and add them up. If
there are more, each rank adds up one part, puts the sum in the place of its own numbers, and
collects the parts of the others.

The memory has no name in any file system, so nothing is left of it however the processes end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Shares", "Slots"]

_PAGE = 4096
_LINE = 64  # bytes: the marks of a rank have a line of the cache of their own
_FEW = 3  # ranks that each read all slots


class Slots:
    """The slots of all ranks of a group.

    The first rank makes the memory, and writes in a file where the others find it. They look for
    it once, with `open`, when all ranks have made their `Slots`.

    Args:
        path: A file in a folder that only the ranks can read.
        rank: The rank of this process in the group.
        size: The number of ranks.

    Attributes:
        room: Bytes of a slot.
        is_open: Whether this process has found the memory.
    """

    room = 8 * 2**20

    def __init__(self, path: Path, rank: int, size: int) -> None:
        self._path, self._rank, self._size = path, rank, size
        self._has_looked = False
        self.is_open = False
        self._lock = threading.Lock()
        head = -(-_LINE * (size + 1) // _PAGE) * _PAGE
        self._starts = [head + rank * self.room for rank in range(size)]
        self._bytes = head + size * self.room
        if rank == 0 and can_share():
            with contextlib.suppress(OSError):  # there are limits for files; then nobody finds it
                self._make()

    def _make(self) -> None:
        token = secrets.token_hex(_LINE // 2)
        file = os.memfd_create("torchopt")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, self._bytes)
        os.write(file, token.encode())
        self._path.write_text(f"/proc/{os.getpid()}/fd/{file} {token}")

    def open(self) -> None:
        """Look for the memory, once; `is_open` says whether it was found."""
        if self._has_looked:
            return
        self._has_looked = True
        with contextlib.suppress(OSError, ValueError):
            place, token = self._path.read_text().split()
            file = os.open(place, os.O_RDWR)
            try:
                found = mmap.mmap(file, self._bytes)
            finally:
                os.close(file)
            self._words = memoryview(found).cast("Q")
            self._memory = torch.frombuffer(found, dtype=torch.uint8)
            # In another namespace the number of the process may belong to another one.
            self.is_open = found[:_LINE] == token.encode()

    def put(self, parts: Sequence[Tensor], start: int, number: int) -> Shares | None:
        """Copy vectors of one dtype into the slot of this rank, one after the other.

        Args:
            parts: The vectors, on one device.
            start: Where to put them, as a multiple of 64 bytes from the start of the slot. What was
                there must have been summed by all ranks.
            number: A number that grows with each call, of 48 bits; the same on every rank.

        Returns:
            The sum to be; None: there is no room for them, or they are not on the CPU.
        """
        dtype, count = parts[0].dtype, sum(x.numel() for x in parts)
        if not parts[0].is_cpu or start + count * dtype.itemsize > self.room:
            return None
        slots = [self._view(at + start, count, dtype) for at in self._starts]
        torch.cat([*parts], out=slots[self._rank])
        self._mark(0, number)
        return Shares(self, slots, number)

    def _view(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self._memory[start : start + count * dtype.itemsize].view(dtype)

    def _mark(self, which: int, number: int) -> None:
        """Tell the others that this rank has written what belongs to a number."""
        self.fence()
        self._words[(self._rank + 1) * _LINE // 8 + which] = number

    def are_marked(self, which: int, number: int) -> bool:
        """Return whether all ranks have written what belongs to a number."""
        first, last = _LINE // 8 + which, (self._size + 1) * _LINE // 8
        if any(self._words[k] < number for k in range(first, last, _LINE // 8)):
            return False
        self.fence()
        return True

    def fence(self) -> None:
        """Let other processors see the accesses to memory before this before those after it.

        The release of a lock comes after what is before it, and the next acquisition comes after
        the release and before what follows.
        """
        for _ in range(2):
            with self._lock:
                pass


class Shares:
    """A sum to be, of vectors in the slots of all ranks.

    Attributes:
        nbytes: The size of the vector of one rank.
    """

    def __init__(self, slots: Slots, vectors: list[Tensor], number: int) -> None:
        self._slots, self._vectors, self._number = slots, vectors, number
        self.nbytes = vectors[0].numel() * vectors[0].element_size()

    def sum(self, until: Callable[[Callable[[], Any]], Any]) -> Tensor:
        """Return the sum, the same bits on every rank, in new memory.

        Args:
            until: Calls a function until it returns something other than None.
        """
        slots, vectors = self._slots, self._vectors
        until(lambda: slots.are_marked(0, self._number) or None)
        if len(vectors) <= _FEW:
            total = _added(vectors)
        else:
            parts = [x.tensor_split(len(vectors)) for x in vectors]
            own = slots._rank
            parts[own][own].copy_(_added([part[own] for part in parts]))
            slots._mark(1, self._number)
            until(lambda: slots.are_marked(1, self._number) or None)
            total = torch.cat([part[k] for k, part in enumerate(parts)])
        slots.fence()  # whatever this rank tells next, it has read
        return total


def can_share() -> bool:
    """Return whether processes can share memory without a name here."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def _added(vectors: Sequence[Tensor]) -> Tensor:
    first, second, *others = vectors
    total = first + second
    for x in others:
        total += x
    return total
