# SPDX-License-Identifier: Apache-2.0
"""Cached memory for the results of kernels on the CPU.

A step that is not in place returns new updates and a new state. Fresh memory from the system costs
a page fault for each 4 KiB, which takes several times as long as the kernel that fills it. So the
memory of results is kept when torch releases it, that is, when the last tensor, view, array or
graph that uses it is gone. The next results of the same size reuse it.

This needs torch 2.10 or newer. With older versions torch allocates the results, and nothing is
cached.
"""

from __future__ import annotations

from typing import NamedTuple

from torchopt import _C

__all__ = ["Usage", "release", "set_limit", "usage"]


class Usage(NamedTuple):
    """The memory of results, in bytes.

    Attributes:
        kept: Free memory that is kept for later results.
        used: Memory that tensors use now.
    """

    kept: int
    used: int


def usage() -> Usage:
    """Return how much memory is cached, and how much is in use."""
    return Usage(*_C.buffer_usage())


def set_limit(limit: int) -> int:
    """Set how many bytes of free memory are kept (1 GiB at first); return the previous limit.

    Memory above the limit is returned to the system at once, beginning with the sizes that have
    gone unused for longest. 0 keeps nothing.

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
