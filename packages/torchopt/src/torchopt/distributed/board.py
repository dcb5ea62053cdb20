# SPDX-License-Identifier: Apache-2.0
"""What each process of this machine is doing, in files that all of them have mapped into memory.

Writing takes a tenth of a microsecond and no system call. A killed process can no longer report
what it was doing: its file can. Ranks that begin an operation see that the others begin the same
one, without a message.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

__all__ = ["Begun", "Board"]

_SIZE = 256


class Board:
    """The notes of the processes of one world on one machine.

    Args:
        folder: Private to the user; shared by the processes.
        rank: Of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        path = self._path(rank)
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    def _path(self, rank: int) -> Path:
        return self.folder / f"doing.{rank}"

    def write(self, text: str) -> None:
        """Record what this process is doing."""
        note = text.encode()[: _SIZE - 1] + b"\0"
        self._map[: len(note)] = note

    def read(self, rank: int) -> str | None:
        """Return the last note of a process; None if it has written none."""
        try:
            note = self._path(rank).read_bytes()
        except OSError:
            return None
        return note[: note.index(b"\0")].decode(errors="replace") or None


class Begun:
    """The operations that the ranks of a group have begun: how many, and a code of the last one.

    A rank begins an operation when those before it are over, and they are over when all ranks have
    taken part: so a rank that looks before it takes part sees what the others have begun.

    Args:
        path: A file that the ranks share.
        rank: Of this process in the group.
        size: Number of ranks.
    """

    def __init__(self, path: Path, rank: int, size: int) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(file, 8 * size)
        self._map = mmap.mmap(file, 8 * size)
        os.close(file)
        self._rank = rank
        self._format = struct.Struct(f"<{size}Q")
        self._number = 0

    def begin(self, code: int) -> None:
        """Say that this rank begins an operation; `code` has 32 bits."""
        self._number += 1
        own = (self._number & 0xFFFFFFFF) << 32 | code
        struct.pack_into("<Q", self._map, 8 * self._rank, own)  # in one store: it is aligned

    def is_common(self) -> bool | None:
        """Return whether all ranks have begun the same; None: some have not come to it."""
        found = self._format.unpack_from(self._map)
        own = found[self._rank]
        if all(x == own for x in found):
            return True
        return None if any(x >> 32 != own >> 32 for x in found) else False
