# SPDX-License-Identifier: Apache-2.0
"""A file from which a killed run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torchopt.distributed import plain, shards
from torchopt.distributed import session as _session
from torchopt.distributed.group import Group
from torchopt.distributed.signature import agree
from torchopt.errors import CheckpointError

__all__ = ["Checkpoint"]

_MARK = b"torchopt"  # then 32 bytes of checksum; torch.load skips both


class Checkpoint:
    """Keeps the state of a run in one file, which is complete at any moment.

    All ranks call `load` before the first step and `save` after each step. Rank 0 writes to a
    temporary file beside the old one and then renames it, which is atomic: a process that is killed
    at any moment leaves either the old state or the new one. Rank 0 also reads the file and sends
    the state to the other ranks of a collective world, which need no common file system.

    DTensors, from `fully_shard` or `distribute_tensor`, are saved by all ranks, each its shards,
    with `torch.distributed.checkpoint`. They go into a folder beside the file (`<path>.shards`),
    which all ranks must be able to read. They are loaded as DTensors, by any number of ranks.

    The file ends with a checksum, and the previous state is kept in `<path>.previous`. A file that
    was truncated or changed is refused with a warning that names it, and the previous state is
    used.

    Put into the state everything that the next step depends on: parameters, the state of the
    optimizer, that of `TaskParallel`, and the states of random number generators. Then a run that
    was interrupted ends bit for bit like one that was not.

    Args:
        path: The file; its folder is created if it does not exist.
        every: The number of steps between writes, >= 1.
        asynchronous: Copy the state in `save` and write it while the program continues. It becomes
            the current state in the next call of `save` or `wait`.

    Example:
        >>> import tempfile, os, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "state.pt")
        >>> checkpoint = Checkpoint(path, every=2)
        >>> checkpoint.load() is None
        True
        >>> for step in range(1, 4):
        ...     checkpoint.save(step, {"w": torch.full((2,), float(step))})
        >>> Checkpoint(path).load()
        (2, {'w': tensor([2., 2.])})
    """

    def __init__(
        self, path: str | os.PathLike[str], *, every: int = 1, asynchronous: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"`every`: expected a number of steps of at least 1, got {every}.")
        self.path = Path(path)
        self.every = every
        self.asynchronous = asynchronous
        self._writing: _Writing | None = None
        self._is_whole = False  # whether the file is known to be complete

    @property
    def _files(self) -> tuple[Path, Path]:
        return self.path, self.path.with_name(self.path.name + ".previous")

    @property
    def _folder(self) -> Path:
        return self.path.with_name(self.path.name + ".shards")

    def load(self, *, mesh: Any = None) -> tuple[int, Any] | None:
        """Return the step and the state that was saved last, or None if there is none.

        Only tensors, plain containers and the states of torchopt's optimizers are read: a
        checkpoint cannot run code.

        Args:
            mesh: A `DeviceMesh` for the DTensors; None: a mesh of all ranks with the dimensions of
                the one that they were saved with. Without a process group they become plain
                tensors.

        Raises:
            CheckpointError: There are files, but none of them is complete.
            ValueError: DTensors were saved on a mesh of several dimensions by another number of
                ranks, and no `mesh` is given.
        """
        self.wait()
        group = _group()
        with group.turn():
            return self._load(group, mesh)

    def _load(self, group: Group, mesh: Any) -> tuple[int, Any] | None:
        agree(group, "the load of a Checkpoint")
        refused: list[str] = []
        for path in self._files:
            data, problem = group.by_first(partial(_read, path), "the load of a Checkpoint")
            if data is None and problem is None:
                continue
            if problem is None and data is not None:
                step, state, manifest = plain.decode(data)
                problem = shards.problem(self._folder, manifest, group)
                if problem is None:
                    if refused:
                        warnings.warn(f"{refused[0]}; uses {path}, step {step}", stacklevel=3)
                    return step, shards.restored(self._folder, state, manifest, mesh)
            refused.append(f"Checkpoint: refuses {path}: {problem}")
        if refused:
            raise CheckpointError(f"{refused[0]}; there is no earlier one that is whole")
        return None

    def save(self, step: int, state: Any) -> None:
        """Save the state after a step if `every` divides the number of the step.

        Args:
            step: Number of steps done, counted from 1.
            state: A tree of tensors, numbers, strings and states of torchopt's optimizers, such as
                state dicts.

        Raises:
            TypeError: The state contains something that `load` would refuse.
        """
        if step % self.every != 0:
            return
        self.wait()
        group = _group()
        state, sharded = shards.split(state)
        if group.rank != 0 and not sharded:
            return
        with group.turn() if sharded else contextlib.nullcontext():
            writing = _Writing(self, step, state, sharded, group)
        if self.asynchronous:
            self._writing = writing
            writing.start()
        else:
            writing.run()
            writing.commit()

    def wait(self) -> None:
        """Wait until the last saved state is on disk; all ranks call this."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.join()
            writing.commit()


class _Writing(threading.Thread):
    """One state that is being written."""

    def __init__(
        self, checkpoint: Checkpoint, step: int, state: Any, sharded: dict[str, Any], group: Group
    ) -> None:
        super().__init__(name="torchopt-checkpoint")
        self.checkpoint = checkpoint
        self.group = group
        self.step = step
        self.error: BaseException | None = None
        self.shards: shards.Writing | None = None
        if not sharded:
            self.data = plain.encode(step, state)  # a copy
            return
        agree(group, f"the save of a Checkpoint with {len(sharded)} DTensors")
        group.by_first(partial(self._encode, step, state), "the save of a Checkpoint")
        find = partial(shards.fresh, checkpoint._folder, step, checkpoint._files)
        self.shards = shards.Writing(find, sharded, group, copy=checkpoint.asynchronous)

    def _encode(self, step: int, state: Any) -> None:
        self.data = plain.encode(step, state)

    def run(self) -> None:
        try:
            if self.shards is not None:
                self.shards.write()
            elif self.checkpoint.asynchronous:
                self._replace(self.data)
        except BaseException as error:
            self.error = error

    def commit(self) -> None:
        """Make this the current state."""
        if self.shards is not None:
            with self.group.turn():
                manifest = self.shards.finish(self.error)
                self.group.by_first(
                    lambda: self._replace(plain.with_manifest(self.data, manifest)),
                    "the end of a Checkpoint",
                )
        elif self.error is not None:
            raise self.error
        elif not self.checkpoint.asynchronous:
            self._replace(self.data)

    def _replace(self, data: bytes) -> None:
        path, previous = self.checkpoint._files
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            file.write(data)
            file.write(_MARK + _checksum(data))
            file.flush()
            os.fsync(file.fileno())
        second = path.with_name(previous.name + ".part")
        second.unlink(missing_ok=True)
        if path.exists() and (self.checkpoint._is_whole or _read(path)[1] is None):
            try:
                os.link(path, second)
            except OSError:  # a file system without links
                shutil.copyfile(path, second)
        # In this order no two names share one file: a process may be killed in between.
        os.replace(part, path)
        if second.exists():
            os.replace(second, previous)
        self.checkpoint._is_whole = True
        _sync_folder(path.parent)
        shards.clean(self.checkpoint._folder, self.checkpoint._files)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _read(path: Path) -> tuple[bytes | None, str | None]:
    """Return the content of a file and what is wrong with it; (None, None): no file."""
    if not path.exists():
        return None, None
    data = path.read_bytes()
    size = len(_MARK) + 32
    content, end = data[:-size], data[-size:]
    if not data:
        return None, "it is empty"
    if not end.startswith(_MARK):
        return None, "it is cut short, or no checkpoint of torchopt"
    if end[len(_MARK) :] != _checksum(content):
        return None, "its content was changed (the checksum differs)"
    return content, None


def _group() -> Group:
    """Return the ranks that hold the state: with remote calls, only the calling process."""
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
