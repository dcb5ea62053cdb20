# SPDX-License-Identifier: Apache-2.0
"""Files that the processes of one machine map into memory, to tell each other what they do.

Writing takes a tenth of a microsecond and no system call. The file of a killed process still says
what the process was doing. It also holds the process ID, so that a stopped process can be
ended. Through such files the ranks add up numbers, check that they are about to do the same thing,
and draw from a shared counter, faster than by a message over a socket.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchopt.distributed.guard import ending

__all__ = ["Board", "Counter", "Messages"]

_SIZE = 256
_PAIR = struct.Struct("<QQ")


class Board:
    """The notes of the processes of one world on one machine.

    Args:
        folder: Private to the user; shared by the processes.
        rank: The rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        path = self._path(rank)
        path.write_bytes(bytes(_SIZE) + " ".join(_seen(os.getpid())).encode())
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

    def end_stopped(self, ranks: Iterable[int]) -> None:
        """End the stopped processes (SIGSTOP) of a world that is over.

        A launcher would ask them to end and wait a long time for an answer. A process that runs,
        however slowly, is left alone.
        """
        for rank in ranks:
            with contextlib.suppress(OSError, ValueError):
                _, pid, began = self._path(rank).read_bytes()[_SIZE:].decode().split()
                end = ending(int(pid))  # first: afterwards the number may belong to another process
                if _seen(int(pid)) == ("T", pid, began):
                    self._mark(rank).touch()
                    end()

    def was_ended(self, rank: int) -> bool:
        """Return whether a process was ended by another one because it was stopped."""
        return self._mark(rank).exists()

    def _mark(self, rank: int) -> Path:
        return self.folder / f"ended.{rank}"


def _seen(pid: int) -> tuple[str, ...]:
    """Return state, number and start time of a process; nothing where there is no /proc."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], str(pid), words[19]
    return ()


def _mapped(path: Path, size: int) -> tuple[int, mmap.mmap]:
    """Return a file that processes share, and its mapped memory."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if hasattr(os, "posix_fallocate"):  # on a full disk the first store would kill the process
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
    return file, mmap.mmap(file, size)


class Messages:
    """Messages between the ranks of a group: numbers, and a code for their meaning.

    No rank sends its next message before all ranks have sent theirs. So two slots for each rank are
    enough, and no slot is written to while another rank reads it.

    Args:
        path: A file that the ranks share.
        rank: The rank of this process in the group.
        size: The number of ranks.

    Attributes:
        room: Numbers in one message.
        number: The number of the last message, the same on every rank that has sent it.
    """

    room = 1020
    _head = 4  # words before the numbers: number of the message, code, length, checksum

    def __init__(self, path: Path, rank: int, size: int) -> None:
        place = self.room + self._head
        file, self._map = _mapped(path, 8 * place * size * 2)
        os.close(file)
        self._words = memoryview(self._map).cast("Q")
        numbers = torch.frombuffer(self._map, dtype=torch.float64)
        self._numbers = numbers.view(2, size, place)[..., self._head :]
        self._starts = [[(k * size + r) * place for r in range(size)] for k in (0, 1)]
        self._rank = rank
        self.number = self._length = 0

    def tell(self, code: int, numbers: Sequence[float] = (), vectors: Sequence[Tensor] = ()) -> int:
        """Send the next message and return its size in bytes; `code` has 32 bits."""
        self.number += 1
        place = self._numbers[self.number & 1, self._rank]
        end = len(numbers)
        if end:
            place[:end] = torch.tensor(numbers, dtype=torch.float64)
        for x in vectors:
            start, end = end, end + x.numel()
            place[start:end] = x
        self._length = end
        words, start = self._words, self._starts[self.number & 1][self._rank]
        words[start + 1], words[start + 2] = code, end
        words[start + 3] = self._checksum(start)
        words[start] = self.number  # last, in a single store
        return 8 * end

    def _checksum(self, start: int) -> int:
        # Other processors may see the stores in another order, hence the checksum.
        return zlib.crc32(self._words[start + 1 : start + 3]) ^ zlib.crc32(
            self._words[start + 4 : start + 4 + self._words[start + 2]]
        )

    def are_common(self) -> bool | None:
        """Return whether all ranks sent numbers of one meaning; None: some have not sent yet."""
        words, starts = self._words, self._starts[self.number & 1]
        own = starts[self._rank]
        is_common = True
        for start in starts:
            if start == own:
                continue
            if words[start] != self.number or words[start + 3] != self._checksum(start):
                return None
            is_common &= words[start + 1 : start + 3] == words[own + 1 : own + 3]
        return is_common

    def sums(self) -> Tensor:
        """Return the sums of the numbers, the same bits on every rank."""
        return self._numbers[self.number & 1, :, : self._length].sum(0)


class Counter:
    """A counter that the ranks of a group draw from; it starts at 0 for each purpose.

    The lock on the file ends with its process, so a process that is killed while it draws blocks
    nobody.

    Args:
        path: A file that the ranks share.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._map = _mapped(path, 16)
        weakref.finalize(self, os.close, self._file)

    def draw(self, purpose: int, amount: int) -> int | None:
        """Add to the counter and return what it was; None: another rank is drawing.

        Args:
            purpose: A number of 64 bits. All ranks have drawn for it before one draws for another.
            amount: What to add.
        """
        if sys.platform == "win32":
            raise NotImplementedError
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        try:
            last, value = _PAIR.unpack_from(self._map)
            value = value if last == purpose else 0
            _PAIR.pack_into(self._map, 0, purpose, value + amount)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        return int(value)
