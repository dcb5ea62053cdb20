# SPDX-License-Identifier: Apache-2.0
"""A small process that ends the workers of `spawn` when the process that called it is gone.

A worker cannot do so itself while it is stopped, imports torch, or holds the interpreter's lock.
Run as a script: it reads process numbers, one a line, and acts at the end of the input, which comes
with the end of the caller, however that ends.
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
    """Return what kills a process; on Linux never another one that got its number since."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        handle = os.pidfd_open(pid)
        return partial(signal.pidfd_send_signal, handle, signal.SIGKILL)
    return partial(os.kill, pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def main(folder: str) -> None:
    """Wait for the end of the input, then end the processes and remove the folder."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # the caller's end decides, not its terminal's
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    endings = []
    for line in sys.stdin:
        with contextlib.suppress(OSError):  # it has ended
            endings.append(ending(int(line)))
    for end in endings:
        with contextlib.suppress(OSError):
            end()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
