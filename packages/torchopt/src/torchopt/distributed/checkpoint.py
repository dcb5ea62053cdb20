# SPDX-License-Identifier: Apache-2.0
"""A file from which a run that was killed continues."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from torchopt.distributed import session as _session
from torchopt.distributed.group import Group

__all__ = ["Checkpoint"]


class Checkpoint:
    """Keeps the state of a run in one file, which is always whole.

    Every rank calls `load` before the first step and `save` after each. Rank 0 writes: into a file
    beside the old one, which it then replaces in one step of the file system, so that a process
    that is killed at any moment leaves either the old state or the new one. Rank 0 reads, too, and
    hands the state to the others of a collective world: they need no common file system.

    The state is what the next step depends on: parameters, optimizer, `TaskParallel`, generators of
    random numbers. Then a run that was interrupted ends with the bits of one that was not.

    Args:
        path: The file; its folder is made.
        every: Write after every so many steps, >= 1.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "state.pt")
        >>> checkpoint = Checkpoint(path, every=2)
        >>> checkpoint.load() is None
        True
        >>> for step in range(1, 4):
        ...     checkpoint.save(step, {"w": torch.full((2,), float(step))})
        >>> Checkpoint(path).load()
        (2, {'w': tensor([2., 2.])})
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"`every`: expected a number of steps of at least 1, got {every}.")
        self.path = Path(path)
        self.every = every

    def load(self) -> tuple[int, Any] | None:
        """Return the step and the state that was saved last, or None if there is none.

        Only tensors and plain containers are read (`weights_only`): a checkpoint cannot run code.
        """
        group = _group()
        data = self.path.read_bytes() if group.rank == 0 and self.path.exists() else None
        data = group.broadcast_bytes(data)
        if data is None:
            return None
        loaded = torch.load(io.BytesIO(data), weights_only=True)
        return int(loaded["step"]), loaded["state"]

    def save(self, step: int, state: Any) -> None:
        """Save the state after a step, on rank 0 and if it is the turn of the step.

        Args:
            step: Number of steps done, from 1.
            state: A tree of tensors, numbers and texts, such as state dicts.
        """
        if step % self.every != 0 or _group().rank != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        with part.open("wb") as file:
            torch.save({"step": step, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
        _sync_folder(self.path.parent)


def _group() -> Group:
    """Return the ranks that hold the state: with remote calls, the one that calls."""
    session = _session.current()
    if session is not None and session.backend == "rpc":
        return Group.alone(session.rank)
    return Group()


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
