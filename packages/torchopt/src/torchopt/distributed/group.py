# SPDX-License-Identifier: Apache-2.0
"""Collective operations that end when another process fails, and count what they send."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchopt.distributed import session as _session

__all__ = ["Group", "share_of"]

_POLL = timedelta(seconds=0.2)
_NEWS = 5.0  # seconds for the news of a failure to arrive after a connection broke


def share_of(count: int, rank: int, size: int) -> range:
    """Return which of `count` items a rank takes: neighbours, numbers differing by one at most.

    Example:
        >>> [list(share_of(5, rank, 3)) for rank in range(3)]
        [[0], [1, 2], [3, 4]]
    """
    return range(count * rank // size, count * (rank + 1) // size)


class Group:
    """The ranks that compute together: the world, or a part of it.

    Args:
        group: A process group of torch.distributed; None: the world that is open.

    Attributes:
        rank: Of this process in the group.
        size: Number of ranks; 1 without an open collective world.
        bytes_sent: By this process, counted as a ring sends: 2 (n - 1)/n of the size for a
            reduction, n - 1 times the size of its part for a gathering.

    Raises:
        RuntimeError: There are several processes, and their world is not a collective one.
    """

    def __init__(self, group: Any = None) -> None:
        session = _session.current()
        self._group = group
        self.bytes_sent = 0
        if group is None and session is None and dist.is_initialized():
            self._group = group = dist.group.WORLD
        if group is not None or (session is not None and session.backend == "collective"):
            alone = group is None and session is not None and session.world_size == 1
            self.size = 1 if alone else dist.get_world_size(group)
            self.rank = 0 if alone else dist.get_rank(group)
        elif session is None or session.world_size == 1:
            self.rank, self.size = 0, 1
        else:
            raise RuntimeError(
                "expected a world opened with auto_init_rpc(backend='collective'), or a process "
                f"group of torch.distributed, found a world of the {session.backend!r} backend"
            )
        self.session = session if self.size > 1 else None
        self.name = "all" if group is None else "-".join(map(str, self._ranks()))

    @classmethod
    def alone(cls, rank: int = 0) -> Group:
        """Return a group of this process, whatever the world."""
        group = cls.__new__(cls)
        group._group, group.session, group.name = None, None, "alone"
        group.rank, group.size, group.bytes_sent = rank, 1, 0
        return group

    def _ranks(self) -> list[int]:
        return list(dist.get_process_group_ranks(self._group)) if self.size > 1 else [0]

    @property
    def global_zero(self) -> int:
        """The rank, in the world, of the first of the group."""
        return self._ranks()[0]

    @property
    def device(self) -> torch.device:
        """Where small tensors must lie to be exchanged."""
        if self.size > 1 and dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextlib.contextmanager
    def task(self, name: str, timeout: float) -> Iterator[None]:
        """Hold this process to finish what is inside in `timeout` seconds."""
        watch = None if self.session is None else self.session.watch
        with contextlib.nullcontext() if watch is None else watch.task(name, timeout):
            yield

    def wait(self, work: Any) -> None:
        """Wait for an operation.

        Raises:
            WorkerError: Another process failed meanwhile.
        """
        if isinstance(work, _OnCuda):
            # Waiting with a timeout would make NCCL abort when it is over.
            while not work.work.is_completed():
                if self.session is not None:
                    self.session.check()
                time.sleep(5e-5)
            work.work.wait()
            return
        while True:
            try:
                work.wait(_POLL)
            except RuntimeError as error:
                session = self.session
                if session is None or session.watch is None:
                    raise
                if work.is_completed():  # not late, but broken
                    session.watch.wait_for_failure(_NEWS)
                    session.check()
                    raise RuntimeError(f"a collective operation failed: {error}") from error
                session.check()
            else:
                return

    def start_sum(self, x: Tensor) -> Any:
        """Start to replace `x` by its sum over the ranks; pass the result to `wait`."""
        if self.size == 1:
            return _DONE
        self.bytes_sent += 2 * (self.size - 1) * x.numel() * x.element_size() // self.size
        return _started(x, dist.all_reduce(x, group=self._group, async_op=True))

    def sum_(self, x: Tensor) -> Tensor:
        """Replace `x` by its sum over the ranks and return it."""
        self.wait(self.start_sum(x))
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return `[size, *shape]`, the `x` of every rank; all have the same shape."""
        if self.size == 1:
            return x[None].clone()
        out = x.new_empty((self.size, *x.shape))
        self.bytes_sent += (self.size - 1) * x.numel() * x.element_size()
        parts = list(out.unbind(0))
        work = dist.all_gather(parts, x.contiguous(), group=self._group, async_op=True)
        self.wait(_started(x, work))
        return out

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replace `x` by that of the first rank and return it."""
        if self.size > 1:
            if self.rank == 0:
                self.bytes_sent += (self.size - 1) * x.numel() * x.element_size()
            work = dist.broadcast(x, self.global_zero, group=self._group, async_op=True)
            self.wait(_started(x, work))
        return x

    def gather_objects(self, obj: Any) -> list[Any]:
        """Return the object of every rank; they are pickled."""
        if self.size == 1:
            return [obj]
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8).to(self.device)
        sizes = self.gather(torch.tensor([len(data)], device=self.device)).flatten().tolist()
        padded = data.new_zeros(max(sizes))
        padded[: len(data)] = data
        rows = self.gather(padded)
        return [
            pickle.loads(memoryview(row[:size].cpu().numpy())) for row, size in zip(rows, sizes)
        ]

    def broadcast_object(self, obj: Any) -> Any:
        """Return the object of the first rank."""
        if self.size == 1:
            return obj
        data = pickle.dumps(obj) if self.rank == 0 else b""
        size = int(self.broadcast_(torch.tensor([len(data)], device=self.device)).item())
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return _unpickled(self.broadcast_(buffer))

    def draw(self, counter: str) -> int:
        """Return the next number of a counter that all ranks share, from 0."""
        if self.session is None:
            raise RuntimeError(
                "expected a world opened by auto_init_rpc(backend='collective') for a shared "
                "counter of tasks, found none; use schedule='static'"
            )
        return int(self.session.store.add(f"{self.name}/{counter}", 1)) - 1

    def discard(self, counter: str) -> None:
        """Remove a counter from the shared store."""
        if self.session is not None and self.rank == 0:
            self.session.store.delete_key(f"{self.name}/{counter}")


def _unpickled(data: Tensor) -> Any:
    content: Any = data.cpu().numpy()
    return pickle.loads(content)


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
    """Return tensors of one type as one vector, new."""
    return torch.cat([x.detach().reshape(-1) for x in tensors])
