# SPDX-License-Identifier: Apache-2.0
"""A small process that ends the workers of `spawn` when the process that called `spawn` is gone.

A worker cannot end itself while it is stopped, imports torch, or holds the interpreter's lock. This
file runs as a script. It reads process IDs, one a line. When the caller ends, for whatever reason,
it kills these processes. It learns of that by the end of its input, or by a new parent: a process
that was forked from the caller keeps the input open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

_LOOK = 0.2  # seconds between two looks at the caller
_endings: list[Callable[[], None]] = []  # by the processes in the input
_ended = threading.Event()  # the input has ended


def ending(pid: int) -> Callable[[], None]:
    """Return a function that kills a process; on Linux never a later process with its number."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        handle = os.pidfd_open(pid)
        return partial(signal.pidfd_send_signal, handle, signal.SIGKILL)
    return partial(os.kill, pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _read() -> None:
    """Read the processes from the input, until its end."""
    for line in sys.stdin:
        with contextlib.suppress(OSError):  # the process has already ended
            _endings.append(ending(int(line)))
    _ended.set()


def main(folder: str) -> None:
    """Wait for the end of the caller, then end the processes and remove the folder."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # the terminal's signals must not end the guard first
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_read, daemon=True).start()
    parent = os.getppid()
    while not _ended.wait(_LOOK) and os.getppid() == parent:
        pass
    _ended.wait(_LOOK)  # the last process may still be in the input
    for end in _endings:
        with contextlib.suppress(OSError):
            end()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
