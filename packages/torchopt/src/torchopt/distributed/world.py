# SPDX-License-Identifier: Apache-2.0
"""The rank of this process, the number of processes, and how they start.

A launcher such as torchrun sets `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`,
`MASTER_ADDR` and `MASTER_PORT` in the environment; the variables of slurm's `srun` are understood
too. Without any of them the world is this process alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch.distributed.elastic.multiprocessing.errors import record

from torchopt.distributed import remote, slurm
from torchopt.distributed import session as _session
from torchopt.distributed.inside import require_no_task
from torchopt.errors import WorkerError
from torchopt.torch_internals import rpc_barrier

__all__ = [
    "WorldInfo",
    "auto_init_rpc",
    "barrier",
    "driver",
    "get_backend",
    "get_local_rank",
    "get_local_world_size",
    "get_rank",
    "get_worker_id",
    "get_world_info",
    "get_world_rank",
    "get_world_size",
    "not_on_rank",
    "on_rank",
    "rank_all",
    "rank_non_zero_only",
    "rank_zero_only",
    "shutdown",
]

F = TypeVar("F", bound=Callable[..., Any])


def default_worker_name_format(
    world_rank: int, world_size: int, local_rank: int, local_world_size: int
) -> str:
    """Return `worker` followed by the rank, zero-padded to the width of the world size.

    Example:
        >>> default_worker_name_format(1, 12, local_rank=1, local_world_size=4)
        'worker01'
    """
    del local_rank, local_world_size
    return f"worker{world_rank:0{len(str(world_size))}d}"


_worker_name_format: Callable[..., str] = default_worker_name_format


class WorldInfo(NamedTuple):
    """The place of this process in the world.

    Attributes:
        world_rank: The rank of this process, counted from 0.
        world_size: The number of processes.
        local_rank: The rank of this process among those of its machine.
        local_world_size: The number of processes on this machine.
    """

    world_rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def rank(self) -> int:
        """The same as `world_rank`."""
        return self.world_rank

    @property
    def worker_name(self) -> str:
        """The name of this process in remote calls."""
        return _worker_name_format(**self._asdict())


def get_world_info() -> WorldInfo:
    """Return the ranks of this process and the world sizes, as the environment defines them now.

    Example:
        >>> get_world_info()
        WorldInfo(world_rank=0, world_size=1, local_rank=0, local_world_size=1)
    """
    said = {**os.environ, **slurm.adopt(os.environ)}
    return WorldInfo(
        int(said.get("RANK", "0")),
        int(said.get("WORLD_SIZE", "1")),
        int(said.get("LOCAL_RANK", "0")),
        int(said.get("LOCAL_WORLD_SIZE", "1")),
    )


def get_world_rank() -> int:
    """Return the rank of this process in the world."""
    return get_world_info().world_rank


get_rank = get_world_rank


def get_world_size() -> int:
    """Return the number of processes."""
    return get_world_info().world_size


def get_local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return get_world_info().local_rank


def get_local_world_size() -> int:
    """Return the number of processes on this machine."""
    return get_world_info().local_world_size


def get_backend() -> str | None:
    """Return `"local"`, `"rpc"` or `"collective"`, or None outside a world."""
    session = _session.current()
    if session is not None:
        return session.backend
    return "rpc" if remote.agent_is_set() else None


def get_worker_id(id: str | int | None = None) -> int:  # noqa: A002 - the published name
    """Return the rank of a worker given by name or rank; None: this process.

    Raises:
        RuntimeError: A name is given, but RPC is not initialised or does not know the name.
    """
    if isinstance(id, int):
        return id
    if id is None and _session.current() is not None:
        return get_world_rank()
    return int(remote.rpc().get_worker_info(worker_name=id).id)


def barrier(worker_names: Iterable[str] | None = None) -> None:
    """Wait until all workers, or those named, have reached this call.

    Args:
        worker_names: Names of the workers that take part; None: all of them.

    Raises:
        WorkerError: A worker failed before it reached this call.
        TimeoutError: A worker did not reach this call in time.
        RuntimeError: This is a task of `TaskParallel`, or of `parallelize` with collectives, and
            other workers have tasks of their own.

    Example:
        >>> @auto_init_rpc(backend="collective")
        ... def main():
        ...     barrier()  # every process waits here for the others
        ...     return get_rank()
        >>> main()
        0
        >>> shutdown()
    """
    names = tuple(sorted(set(worker_names))) if worker_names is not None else ()
    session = _session.current()
    if session is not None:
        size = len(names) if worker_names is not None else session.world_size
        require_no_task(range(size) if worker_names is None else _ranks_of(names))
        session.barrier(names, size)
    else:
        rpc_barrier(remote.rpc().api, set(names))


def _ranks_of(names: Iterable[str]) -> list[int]:
    """Return the ranks of workers; those of unknown names are left out."""
    info = get_world_info()
    ranks = {
        info._replace(world_rank=r, local_rank=r % info.local_world_size).worker_name: r
        for r in range(info.world_size)
    }
    return [ranks[name] for name in names if name in ranks]


_RPC_BACKENDS = (None, "rpc")


def auto_init_rpc(
    worker_init_fn: Callable[[], None] | None = None,
    worker_name_format: Callable[..., str] = default_worker_name_format,
    *,
    backend: Any = None,
    rpc_backend_options: Any = None,
    timeout: float = _session.DEFAULT_TIMEOUT,
) -> Callable[[F], F]:
    """Return a decorator for the main function that opens the world before it runs.

    All processes call the main function with the same arguments. Inside, a function decorated with
    `rank_zero_only` runs on rank 0 only; see also `driver`. The processes are started by torchrun,
    `torchopt.distributed.spawn`, multiprocessing or a job scheduler, with the environment of
    torchrun. Without that environment the world is one process in which remote calls are ordinary
    calls, so breakpoints, prints and tracebacks work.

    The world is left at exit, in order if all processes reach their end.

    Args:
        worker_init_fn: Called first on all processes, for example to set seeds or devices.
        worker_name_format: Returns the name of a worker. It is called with the keywords
            `world_rank`, `world_size`, `local_rank` and `local_world_size`.
        backend: None, `"rpc"` or a `torch.distributed.rpc.BackendType`: remote calls.
            `"collective"`: process groups, with nccl for CUDA tensors if CUDA is available and gloo
            for CPU tensors. The name of a backend of torch.distributed, such as `"gloo"`: process
            groups with that backend.
        rpc_backend_options: For `torch.distributed.rpc.init_rpc`.
        timeout: Seconds to wait for other processes, > 0.

    Raises:
        RuntimeError: The environment describes a world of several processes but no address, or an
            open world of several processes has the other kind of backend.

    Example:
        >>> @auto_init_rpc(backend="collective")
        ... def main():
        ...     return get_world_size(), get_backend()
        >>> main()
        (1, 'collective')
        >>> shutdown()
    """
    global _worker_name_format
    _worker_name_format = worker_name_format

    def decorate(main: F | None = None) -> F:
        if main is None:
            raise TypeError(
                "auto_init_rpc(...): expected a function to decorate, got none; write "
                "@auto_init_rpc() with its brackets"
            )

        @record
        @functools.wraps(main)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            opened = _session.current()
            if opened is None:
                opened = _open(backend, rpc_backend_options, timeout)
            _require_backend(opened, backend)
            try:
                if worker_init_fn is not None:
                    barrier()
                    worker_init_fn()
                barrier()
                return main(*args, **kwargs)
            except Exception as error:
                if opened.watch is not None and not isinstance(error, WorkerError):
                    opened.watch.report(error, None)
                raise

        return wrapped  # type: ignore[return-value]

    return decorate


def _is_rpc(backend: Any) -> bool:
    return backend in _RPC_BACKENDS or not isinstance(backend, str)


def _require_backend(opened: _session.Session, backend: Any) -> None:
    """Raise if the main function of an open world expects another kind of backend."""
    wanted = "rpc" if _is_rpc(backend) else "collective"
    if opened.world_size > 1 and opened.backend != wanted:
        raise RuntimeError(
            f"auto_init_rpc(backend={backend!r}): expected no open world, or one of {wanted!r}, "
            f"found one of {opened.backend!r}; leave it first, on every process, with "
            "torchopt.distributed.shutdown()"
        )


def _open(backend: Any, options: Any, timeout: float) -> _session.Session:
    os.environ.update(slurm.adopt(os.environ))  # for torch, too
    world = get_world_info()
    if not _is_rpc(backend):
        return _session.open_collective(backend, world.rank, world.world_size, timeout)
    if world.world_size == 1 and backend in _RPC_BACKENDS and options is None:
        return _session.open_local(world.worker_name)
    rpc_backend = None if backend == "rpc" else backend
    return _session.open_rpc(
        world.worker_name, world.rank, world.world_size, rpc_backend, options, timeout
    )


def shutdown() -> None:
    """Leave the world now instead of at exit. Does nothing outside a world."""
    _session.close()


def _where(condition: Callable[[int], bool]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if condition(get_world_rank()) else None

        return wrapped  # type: ignore[return-value]

    return decorate


def on_rank(*ranks: int) -> Callable[[F], F]:
    """Return a decorator for a function that runs on these ranks and returns None on others.

    Example:
        >>> on_rank(0)(lambda: "here")(), on_rank(1, 2)(lambda: "there")()
        ('here', None)
    """
    return _where(frozenset(ranks).__contains__)


def not_on_rank(*ranks: int) -> Callable[[F], F]:
    """Return a decorator for a function that runs on all ranks but these, where it returns None.

    Example:
        >>> not_on_rank(1)(lambda: "here")(), not_on_rank(0)(lambda: "there")()
        ('here', None)
    """
    excluded = frozenset(ranks)
    return _where(lambda rank: rank not in excluded)


def rank_all(func: F) -> F:
    """Return `func` itself, which runs on all ranks."""
    return func


def rank_zero_only(func: F) -> F:
    """Return a function that runs `func` on rank 0 and returns None on other ranks.

    Example:
        >>> @rank_zero_only
        ... def report(loss):
        ...     return f"loss {loss}"
        >>> report(0.5)
        'loss 0.5'
    """
    return on_rank(0)(func)


def rank_non_zero_only(func: F) -> F:
    """Return a function that runs `func` on all ranks but 0, where it returns None.

    Example:
        >>> rank_non_zero_only(lambda: "elsewhere")() is None
        True
    """
    return not_on_rank(0)(func)


def driver(func: F) -> F:
    """Return a function that runs `func` on the ranks that drive the computation.

    With remote calls that is rank 0, which calls the others; with the collective backend it is
    every rank. So one script works with every backend. On the other ranks the function returns
    None.

    Example:
        >>> driver(lambda: "drives")()
        'drives'
    """

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        drives = get_backend() == "collective" or get_world_rank() == 0
        return func(*args, **kwargs) if drives else None

    return wrapped  # type: ignore[return-value]
