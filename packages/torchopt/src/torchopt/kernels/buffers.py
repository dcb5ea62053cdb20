# SPDX-License-Identifier: Apache-2.0
"""Cached memory for the results of kernels on the CPU.

A step that is not in place returns new updates and a new state. Fresh memory from the
system costs a page fault every 4 KiB, several times what a kernel needs to fill it. So the memory
of results is kept when torch releases it, that is when the last tensor, view, array or graph that
uses it is gone, and the next results of the same size are put there.

This needs torch 2.10 or newer; with an older one, torch allocates results and nothing is kept.
"""

from __future__ import annotations

from typing import NamedTuple

from torchopt import _C

__all__ = ["Usage", "release", "set_limit", "usage"]


class Usage(NamedTuple):
    """Bytes of memory for results.

    Attributes:
        kept: Free, and kept for the next results.
        used: In tensors.
    """

    kept: int
    used: int


def usage() -> Usage:
    """Return how much memory is cached, and how much is in use."""
    return Usage(*_C.buffer_usage())


def set_limit(limit: int) -> int:
    """Keep at most `limit` bytes that are free, 1 GiB if never called; return the previous limit.

    Memory above the limit goes back to the system at once, that of the sizes that were not asked
    for the longest first. 0 keeps nothing.

    Raises:
        ValueError: `limit` is negative.

    Example:
        >>> previous = set_limit(2**20)
        >>> set_limit(previous)
        1048576
    """
    if limit < 0:
        raise ValueError(f"set_limit: expected a number of bytes of at least 0, got {limit}.")
    return _C.set_buffer_limit(limit)


def release() -> None:
    """Return all cached memory to the system.

    Example:
        >>> release()
        >>> usage().kept
        0
    """
    _C.release_buffers()
