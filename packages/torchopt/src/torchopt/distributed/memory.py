# SPDX-License-Identifier: Apache-2.0
"""Return the memory of remote calls to the system.

glibc keeps freed memory. Small objects that outlive a large tensor stay in the gaps around it, so
that the next large tensor gets new memory: a process would grow by most of the parameters with
every call. And the threads of torch's agent, more than a hundred, would each keep some memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from typing import Any

__all__ = ["count_freed", "share_arenas"]

_MUCH = 32 * 2**20  # bytes that were freed before memory is returned
_ARENAS = 4  # the most parts of the heap; a thread takes memory from one of them
_M_ARENA_MAX = -8  # of malloc.h

_lock = threading.Lock()
_freed = 0


def count_freed(size: int) -> None:
    """Record that this many bytes are free, or will soon be; return memory if it is much."""
    global _freed
    with _lock:
        _freed += size
        if _freed <= _MUCH:
            return
        _freed = 0
    _give_back()


def _give_back() -> None:
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def share_arenas() -> None:
    """Let threads that start from now on share a few parts of the heap.

    `MALLOC_ARENA_MAX` in the environment has precedence.
    """
    option = _of_glibc("mallopt")
    if option is not None and "MALLOC_ARENA_MAX" not in os.environ:
        option(_M_ARENA_MAX, _ARENAS)


def _of_glibc(name: str) -> Any:
    """Return a function of glibc; None on other systems."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    return getattr(library, name)
