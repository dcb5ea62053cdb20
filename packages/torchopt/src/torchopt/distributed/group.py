# SPDX-License-Identifier: Apache-2.0
"""Collective operations that end when another process fails, and count what they send."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchopt.distributed import session as _session
from torchopt.distributed.inside import require_no_task
from torchopt.distributed.raised import Raised
from torchopt.distributed.session import DEFAULT_TIMEOUT
from torchopt.torch_internals import collective_options

__all__ = ["Group", "share_of"]

T = TypeVar("T")

_POLL = timedelta(seconds=0.2)
_SPIN = 2e-4  # seconds of looking at what the others tell before a pause
_LOOK = 1e-3  # longest pause between two looks, in seconds
_NEWS = 2.0  # seconds in which the report of a failure arrives after a connection broke
_NOTHING = contextlib.nullcontext()
_LONG = timedelta(days=365)  # torch's own limit, which must not expire before ours
_turn = threading.RLock()


def _renew() -> None:
    """Make a new lock in a forked process: a thread of its parent may hold the old one."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def share_of(count: int, rank: int, size: int) -> range:
    """Return the consecutive items of `count` that a rank takes; shares differ by one at most.

    Example:
        >>> [list(share_of(5, rank, 3)) for rank in range(3)]
        [[0], [1, 2], [3, 4]]
    """
    return range(count * rank // size, count * (rank + 1) // size)


class Group:
    """The ranks that compute together: the world, or a part of it.

    Args:
        group: A process group of torch.distributed; None: the open world.
        timeout: Seconds that other ranks may take to reach an operation; None: the timeout of the
            world.

    Attributes:
        rank: The rank of this process in the group.
        size: The number of ranks; 1 without an open collective world.
        ranks: The ranks of the group, as the world numbers them.
        timeout: Seconds that other ranks may take.
        bytes_sent: Bytes sent by this process, counted as in a ring: 2 (n - 1)/n times the size for
            a sum, n - 1 times the size of its part for a gather.
        operations: The number of collective operations that this process has taken part in.
        messages: Messages through shared memory; None across machines.
        counter: A counter in a shared file; None across machines.
        slots: Shared memory for larger sums; None across machines.

    Raises:
        RuntimeError: There are several processes, and their world is not a collective one, or its
            process group was destroyed.
        ValueError: This process is not in the group.
    """

    def __init__(self, group: Any = None, timeout: float | None = None) -> None:
        session = _session.current()
        if timeout is None:
            timeout = DEFAULT_TIMEOUT if session is None else session.timeout
        self.timeout = timeout
        self.bytes_sent = self.operations = 0
        self.ranks: tuple[int, ...] = (0,)
        self.session: _session.Session | None = None
        self._group = group
        if group is None and (session is None or session.world_size == 1):
            opened = session is None and dist.is_available() and dist.is_initialized()
            self._group = dist.group.WORLD if opened else None
        elif group is None and session is not None:
            if session.backend != "collective":
                raise RuntimeError(
                    "expected a world opened with auto_init_rpc(backend='collective'), or a "
                    f"process group of torch.distributed, found one of {session.backend!r}"
                )
            self._group = dist.group.WORLD
            if self._group is None:
                raise RuntimeError(
                    f"expected the process group of the {session.world_size} ranks, found that it "
                    "was destroyed; call torchopt.distributed.shutdown() before "
                    "torch.distributed.destroy_process_group()"
                )
        if self._group is not None:
            if dist.get_rank(self._group) < 0:
                raise ValueError(
                    f"`group`: expected a process group with this process in it, rank "
                    f"{dist.get_rank()} is not; make the engine on the ranks of the group alone"
                )
            self.ranks = tuple(dist.get_process_group_ranks(self._group))
        self.size = len(self.ranks)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        if self.size > 1:
            covers = session is not None and session.watch is not None
            self.session = session if covers else _session.adopt(self._group, timeout)
        self.name = "-".join(map(str, self.ranks)) if group is not None else "all"
        self._on_cuda = self.size > 1 and dist.get_backend(self._group) == "nccl"
        self.messages, self.counter, self.slots = (
            (None, None, None) if self.session is None else self.session.boards(self)
        )

    @classmethod
    def alone(cls, rank: int = 0) -> Group:
        """Return a group of this process, whatever the world."""
        group = cls.__new__(cls)
        group._group, group.session, group.name = None, None, "alone"
        group.rank, group.size, group.bytes_sent, group.operations = rank, 1, 0, 0
        group.ranks, group.timeout, group._on_cuda = (rank,), DEFAULT_TIMEOUT, False
        group.messages = group.counter = group.slots = None
        return group

    @property
    def world_rank(self) -> int:
        """The rank of this process in the world."""
        return self.ranks[self.rank]

    @property
    def device(self) -> torch.device:
        """Where small tensors must lie to be exchanged."""
        if self._on_cuda:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock that lets one thread at a time work with the other ranks."""
        self.require_open()
        return _NOTHING if self.size == 1 else _turn

    def require_open(self) -> None:
        """Raise a `RuntimeError` if the ranks cannot run an operation together now.

        Either this process has left the world, or it is in a task while other ranks of this group
        are each in a task of their own.
        """
        if self.session is not None and self.session.is_over:
            raise RuntimeError(
                f"expected a rank of the open world of {self.size} processes, found one that has "
                "left it (shutdown), or a process that was forked from a rank; open a world with "
                "auto_init_rpc, and make engines inside of it"
            )
        require_no_task(self.ranks)

    def task(self, name: str, timeout: float) -> contextlib.AbstractContextManager[None]:
        """Require this process to leave the block within `timeout` seconds without other ranks."""
        watch = None if self.session is None else self.session.watch
        return _NOTHING if watch is None else watch.task(name, timeout, self.ranks)

    def note(self, place: str) -> None:
        """Report where this process is while it runs no task."""
        if self.session is not None and self.session.watch is not None:
            self.session.watch.note(place)

    def until(self, look: Callable[[], T | None], name: str, limit: float) -> T:
        """Call `look` until other ranks let it return something other than None; return that."""
        if (found := look()) is not None:
            return found
        assert self.session is not None
        assert self.session.watch is not None
        watch = self.session.watch
        before = watch.start_operation(name, limit, self.ranks)
        started = time.perf_counter()
        try:
            while (found := look()) is None:
                waited = time.perf_counter() - started
                watch.check()
                time.sleep(0.0 if waited < _SPIN else min(_LOOK, waited / 10))
        finally:
            watch.end_operation(before)
        return found

    def wait(self, work: Any, name: str = "an operation", limit: float | None = None) -> None:
        """Wait for an operation.

        Args:
            work: The operation, from `start_sum`.
            name: What it is for, in words.
            limit: Seconds that other ranks may take to reach it; None: `timeout`.

        Raises:
            WorkerError: Another process failed in the meantime.
        """
        if self.session is None or self.session.watch is None:
            work.wait()
            return
        watch = self.session.watch
        with watch.operation(name, self.timeout if limit is None else limit, self.ranks):
            self._wait(work, watch)

    def _wait(self, work: Any, watch: Any) -> None:
        if isinstance(work, _OnCuda):
            # NCCL would abort the operation if a wait timed out.
            while not work.work.is_completed():
                watch.check()
                time.sleep(5e-5)
            work.work.wait()
            return
        while (error := _waited(work)) is not None:
            if work.is_completed():  # it ended just after the wait, or it failed
                error = _waited(work)
                if error is None:
                    return
                watch.wait_for_failure(_NEWS)
                watch.check()
                raise RuntimeError(f"a collective operation failed: {error}") from error
            watch.check()

    def start_sum(self, x: Tensor) -> Any:
        """Start to replace `x` by its sum over the ranks; pass the result to `wait`."""
        if self.size == 1:
            return _DONE
        self.count_sum(x.numel() * x.element_size())
        work = _pg(self._group).allreduce([_real(x)], _options("AllreduceOptions"))
        return _started(x, work)

    def count_sum(self, size: int) -> None:
        """Count a sum of vectors of this size in bytes."""
        self.operations += 1
        self.bytes_sent += 2 * (self.size - 1) * size // self.size

    def sum_(self, x: Tensor, name: str = "a sum", limit: float | None = None) -> Tensor:
        """Replace `x` by its sum over the ranks and return it."""
        self.wait(self.start_sum(x), name, limit)
        return x

    def sums(
        self, tensors: Sequence[Tensor], name: str = "a sum", limit: float | None = None
    ) -> list[Tensor]:
        """Return the sums of tensors over the ranks, in one operation for each dtype and device."""
        kinds: dict[Any, list[int]] = {}
        for k, x in enumerate(tensors):
            kinds.setdefault((x.dtype, x.device), []).append(k)
        found = list(tensors)
        for members in kinds.values():
            total = self.sum_(flat([tensors[k] for k in members]), name, limit)
            for k, part in zip(members, total.split([tensors[k].numel() for k in members])):
                found[k] = part.view(tensors[k].shape)
        return found

    def gather(self, x: Tensor, name: str = "an exchange", limit: float | None = None) -> Tensor:
        """Return the `x` of every rank as `[size, *shape]`; all must have the same shape."""
        if self.size == 1:
            return x[None].clone()
        out = x.new_empty((self.size, *x.shape))
        self.operations += 1
        self.bytes_sent += (self.size - 1) * x.numel() * x.element_size()
        parts = [list(_real(out).unbind(0))]
        own = [_real(_plain(x))]
        work = _pg(self._group).allgather(parts, own, _options("AllgatherOptions"))
        self.wait(_started(x, work), name, limit)
        return out

    def broadcast_(self, x: Tensor, name: str = "a broadcast") -> Tensor:
        """Replace `x` by the `x` of the first rank and return it."""
        if self.size > 1:
            self.operations += 1
            if self.rank == 0:
                self.bytes_sent += (self.size - 1) * x.numel() * x.element_size()
            options = _options("BroadcastOptions")  # from the first rank
            whole = _plain(x)
            self.wait(_started(x, _pg(self._group).broadcast([_real(whole)], options)), name)
            if whole is not x:
                x.copy_(whole)
        return x

    def gather_bytes(self, content: bytes, name: str = "an exchange") -> list[bytes]:
        """Return the bytes of every rank."""
        if self.size == 1:
            return [content]
        data = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(self.device)
        sizes = self.gather(torch.tensor([len(content)], device=self.device), name)
        padded = data.new_zeros(max(1, int(sizes.max())))
        padded[: len(data)] = data
        rows = self.gather(padded, name).cpu()
        return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes.flatten().tolist())]

    def gather_objects(self, obj: Any, name: str = "an exchange") -> list[Any]:
        """Return the objects of all ranks, which are sent pickled."""
        if self.size == 1:
            return [obj]
        return [pickle.loads(part) for part in self.gather_bytes(pickle.dumps(obj), name)]

    def broadcast_bytes(self, content: bytes | None, name: str = "a broadcast") -> bytes | None:
        """Return the bytes of the first rank, which may be None."""
        if self.size == 1:
            return content
        size = torch.tensor([-1 if content is None else len(content)], device=self.device)
        count = int(self.broadcast_(size, name))
        if count <= 0:
            return None if count < 0 else b""
        buffer = torch.zeros(count, dtype=torch.uint8, device=self.device)
        if self.rank == 0 and content is not None:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        data: bytes = self.broadcast_(buffer, name).cpu().numpy().tobytes()
        return data

    def by_first(self, func: Callable[[], T], name: str) -> T:
        """Run a function on the first rank, and return its result, or raise its error, on all."""
        if self.size == 1:
            return func()
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = func()
            except Exception as error:
                outcome = Raised(error, self.world_rank, name)
        outcome = pickle.loads(self.broadcast_bytes(pickle.dumps(outcome), name) or b"")
        if isinstance(outcome, Raised):
            raise outcome.as_error()
        found: T = outcome
        return found

    def draw(self, purpose: int, amount: int, name: str, limit: float) -> int:
        """Add to a counter that all ranks share and return its old value; see `Counter`."""
        if self.counter is not None:
            draw = self.counter.draw
            return self.until(lambda: draw(purpose, amount), name, limit)
        assert self.session is not None
        assert self.session.watch is not None
        return self.session.watch.draw(self.name, purpose, amount, name, limit)


def _waited(work: Any) -> RuntimeError | None:
    """Wait briefly; return None if the operation is over, else torch's error."""
    try:
        work.wait(_POLL)
    except RuntimeError as error:
        return error
    return None


def _pg(group: Any) -> Any:
    return dist.group.WORLD if group is None else group


@functools.cache
def _options(kind: str) -> Any:
    # For each operation, so that the timeout of a group that the program made stays as it is.
    return collective_options(kind, _LONG)


def _plain(x: Tensor) -> Tensor:
    """Return x, or a copy of it that is contiguous and has no bit for a sign."""
    return x.contiguous().resolve_conj().resolve_neg()


def _real(x: Tensor) -> Tensor:
    """Return a view that gloo accepts: complex numbers as pairs."""
    return torch.view_as_real(x) if x.is_complex() else x


@dataclass
class _OnCuda:
    work: Any


def _started(x: Tensor, work: Any) -> Any:
    return _OnCuda(work) if x.device.type == "cuda" else work


class _Done:
    def wait(self, timeout: Any = None) -> bool:
        del timeout
        return True


_DONE = _Done()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one dtype, concatenated into a new vector."""
    return torch.cat([x.detach().reshape(-1) for x in tensors])
