# SPDX-License-Identifier: Apache-2.0
"""Small messages by which the ranks add up numbers and check that they do the same thing."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from torchopt.distributed.board import Messages
from torchopt.distributed.group import Group

__all__ = ["DifferenceError", "Packet"]


class DifferenceError(Exception):
    """The ranks called different operations at the same time; raised on all of them."""


class Packet:
    """Numbers that all ranks add up, and a check that they agree on their meaning.

    On one machine they go through shared memory. Across machines every packet has the same size: if
    ranks run different programs, torch's operations do not crash, and the ranks notice.

    Args:
        group: The ranks.
        meaning: A text that must be the same on all ranks.
        numbers: Numbers to add up.
        vectors: More numbers to add up, on the CPU; at most `room` numbers in total.

    Attributes:
        room: How many numbers a packet holds.
    """

    room = Messages.room

    def __init__(
        self,
        group: Group,
        meaning: str,
        numbers: Sequence[float] = (),
        vectors: Sequence[Tensor] = (),
    ) -> None:
        group.require_open()
        self._group = group
        code = zlib.crc32(meaning.encode())
        if group.messages is not None:
            group.bytes_sent += group.messages.tell(code, numbers, vectors)
            return
        low, high = float(code & 0xFFFF), float(code >> 16)
        row = torch.zeros(self.room + 4, dtype=torch.float64)
        end = 4 + len(numbers)
        head = [low, low * low, high, high * high, *numbers]
        row[:end] = torch.tensor(head, dtype=torch.float64)
        for x in vectors:
            start, end = end, end + x.numel()
            row[start:end] = x
        self._row = row.to(group.device)
        self._work = group.start_sum(self._row)

    def sums(self, name: str, limit: float) -> Tensor:
        """Return the sums of the numbers; across machines, zeros may follow.

        Raises:
            DifferenceError: The ranks disagree.
            WorkerError: Another process failed in the meantime.
        """
        group = self._group
        if group.messages is not None:
            if not group.until(group.messages.are_common, name, limit):
                raise DifferenceError
            return group.messages.sums()
        group.wait(self._work, name, limit)
        self._row = self._row.cpu()
        low, low_squares, high, high_squares = self._row[:4].tolist()
        # The two sides of the Cauchy-Schwarz inequality are equal only if all codes are. The
        # numbers are integers, so the test is exact.
        if group.size * low_squares != low * low or group.size * high_squares != high * high:
            raise DifferenceError
        return self._row[4:]
