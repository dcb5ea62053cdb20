# SPDX-License-Identifier: Apache-2.0
"""The folder in which the processes of a world on one machine meet.

Each process holds a shared lock on a file in the folder. A lock ends with its process, however the
process ends. A process that can lock the file exclusively is the last one and removes the folder.
If all processes were killed, the next world of the user finds the folder and removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

__all__ = ["FOLDER", "HUB", "Folder", "has_locks", "is_met_at", "place_of", "point"]

FOLDER = "TORCHOPT_FOLDER"  # where the processes of `spawn` meet
HUB = "hub"  # a file that rank 0 keeps locked
_HELD = "held"


class Folder:
    """A folder that only this user can read, held by this process.

    Args:
        path: A folder that another process holds; None: a new one.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._is_new = path is None
        self._claims: list[int] = []
        if path is not None:
            self.path = path
            self._lock = os.open(path / _HELD, os.O_RDWR)
            _try_to_lock(self._lock, alone=False)
            return
        inside = os.environ.get(FOLDER)
        if inside is None:
            _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix="torchopt-", dir=inside))
        part = self.path / f"{_HELD}.part"  # renamed once it is locked
        self._lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _try_to_lock(self._lock, alone=False)
        part.rename(self.path / _HELD)

    def claim(self, name: str) -> Path:
        """Return a new file in the folder that only this process locks, until it leaves."""
        path = self.path / name
        self._claims.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        _try_to_lock(self._claims[-1], alone=True)
        return path

    def leave(self) -> None:
        """Release the folder; the last process removes it."""
        is_last = _try_to_lock(self._lock, alone=True) if has_locks() else self._is_new
        if is_last:
            shutil.rmtree(self.path, ignore_errors=True)
        self.forget()

    def forget(self) -> None:
        """Release the folder in a process that was forked from one that holds it."""
        for file in (self._lock, *self._claims):
            os.close(file)


def place_of(port: str) -> Path:
    """Return the file through which processes meet if all they know is a port."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"torchopt-of-{user}-{port}"


def point(place: Path, path: Path) -> None:
    """Copy the file at `path` to `place` atomically, readable by this user only."""
    part = place.with_name(f"{place.name}.{secrets.token_hex(8)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(path.read_text())
    os.replace(part, place)


def is_met_at(place: Path) -> bool:
    """Return whether a world whose rank 0 is alive uses a meeting file."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if has_locks() and not place.is_symlink() and place.lstat().st_uid == os.getuid():
            held = os.open(Path(json.loads(place.read_text())["folder"]) / HUB, os.O_RDWR)
            try:
                return not _try_to_lock(held, alone=True)
            finally:
                os.close(held)
    return False


def has_locks() -> bool:
    """Return whether files can be locked here."""
    return sys.platform != "win32"


def _try_to_lock(file: int, *, alone: bool) -> bool:
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(temporary: Path) -> None:
    """Remove the files of this user's worlds whose processes were all killed."""
    if sys.platform == "win32":
        return
    for found in temporary.glob("torchopt-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if found.lstat().st_uid != os.getuid() or found.is_symlink():
                continue
            if found.is_dir():
                held = os.open(found / _HELD, os.O_RDWR)
                try:
                    if _try_to_lock(held, alone=True):
                        shutil.rmtree(found, ignore_errors=True)
                finally:
                    os.close(held)
            elif not Path(json.loads(found.read_text())["folder"]).exists():
                found.unlink()
