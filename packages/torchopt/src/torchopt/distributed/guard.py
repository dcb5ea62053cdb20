# SPDX-License-Identifier: Apache-2.0
"""A small process that ends the workers of `spawn` when the process that called `spawn` is gone.

A worker cannot end itself while it is stopped, imports torch, or holds the interpreter's lock. This
file runs as a script. It reads process IDs, one a line. At the end of its input, which comes
when the caller ends for whatever reason, it kills these processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial


def ending(pid: int) -> Callable[[], None]:
    """Return a function that kills a process; on Linux never a later process with its number."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        handle = os.pidfd_open(pid)
        return partial(signal.pidfd_send_signal, handle, signal.SIGKILL)
    return partial(os.kill, pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def main(folder: str) -> None:
    """Wait for the end of the input, then end the processes and remove the folder."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # the terminal's signals must not end the guard first
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    endings = []
    for line in sys.stdin:
        with contextlib.suppress(OSError):  # the process has already ended
            endings.append(ending(int(line)))
    for end in endings:
        with contextlib.suppress(OSError):
            end()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
