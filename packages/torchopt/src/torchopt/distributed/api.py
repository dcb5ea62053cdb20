# SPDX-License-Identifier: Apache-2.0
"""Calls on other processes: one, or one for each part of the arguments."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, Union

from torch.futures import Future

from torchopt.distributed import remote
from torchopt.distributed import session as _session
from torchopt.distributed.calls import ASYNC, SYNC, UNSET_RPC_TIMEOUT, Batch
from torchopt.distributed.partition import (
    Call,
    Partitioner,
    PartitionFunction,
    TensorDimensionPartitioner,
    batch_partitioner,
    dim_partitioner,
    exclusive_batch_partitioner,
)
from torchopt.distributed.reduce import mean_reducer, sum_reducer, weighted_mean_reducer
from torchopt.distributed.replicated import run_replicated
from torchopt.distributed.share import received
from torchopt.distributed.world import get_worker_id, get_world_size

__all__ = [
    "UNSET_RPC_TIMEOUT",
    "PartitionFunction",
    "Partitioner",
    "TensorDimensionPartitioner",
    "batch_partitioner",
    "dim_partitioner",
    "exclusive_batch_partitioner",
    "mean_reducer",
    "parallelize",
    "parallelize_async",
    "parallelize_sync",
    "remote_async_call",
    "remote_sync_call",
    "sum_reducer",
    "weighted_mean_reducer",
]

T = TypeVar("T")
U = TypeVar("U")
Reducer = Callable[[Iterable[Any]], Any]


def remote_async_call(
    func: Callable[..., T],
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> Union[Future[list[T]], Future[U]]:  # noqa: UP007 - Future has no runtime `|`
    """Return a future of the results of `func` on the parts of its arguments.

    With the RPC backend this process sends the calls; the function must be importable by name on
    the workers. With the collective backend every rank makes the same call, runs its own parts,
    and all get all results; the future is complete. In a world of one process the parts run one
    after the other, here.

    Args:
        func: The function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        partitioner: From the arguments to the calls; a rank or name: one call there; None:
            `batch_partitioner`.
        reducer: From the results, in the order of the calls, to the result; None: the list.
        timeout: Seconds for each call; unset: the default of torch's RPC, 60; 0: no limit.

    Raises:
        ValueError: `partitioner` is not a partitioner.
        RuntimeError: There are several processes and no open world.
        WorkerError: From the future: a worker raised, is late or lost. Names rank and task and has
            the remote traceback.

    Example:
        >>> import torch, torchopt.distributed as todist
        >>> todist.remote_async_call(torch.sum, args=(torch.arange(4),), reducer=todist.sum_reducer
        ... ).wait()
        tensor(6)
    """
    calls = _calls(partitioner, args or (), kwargs or {})
    if reducer is not None and hasattr(reducer, "bind"):
        reducer = reducer.bind(calls)
    finish: Reducer = list if reducer is None else reducer
    backend = _backend()
    if backend == "rpc":
        return Batch(func, calls, finish, timeout).send()
    result: Future[Any] = Future()
    try:
        if backend == "collective":
            result.set_result(
                finish(run_replicated(func, calls, -1.0 if timeout is None else timeout))
            )
        else:
            result.set_result(finish([_run_here(func, call) for call in calls]))
    except Exception as error:
        result.set_exception(error)
    return result


def remote_sync_call(
    func: Callable[..., T],
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> list[T] | U:
    """Return the results of `func` on the parts of its arguments; see `remote_async_call`."""
    future = remote_async_call(
        func, args=args, kwargs=kwargs, partitioner=partitioner, reducer=reducer, timeout=timeout
    )
    return future.wait()


def _calls(
    partitioner: Partitioner | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Call]:
    if partitioner is None:
        partitioner = batch_partitioner
    if isinstance(partitioner, (int, str)):
        return [(get_worker_id(partitioner), args, kwargs)]
    if not callable(partitioner):
        raise ValueError(
            f"Invalid partitioner: {partitioner!r}. Expected a function from the arguments to "
            "(rank, args, kwargs) triples, a rank, a worker's name, or None."
        )
    return list(partitioner(*args, **kwargs))


def _backend() -> str:
    session = _session.current()
    if session is not None:
        return "local" if session.world_size == 1 else session.backend
    if remote.agent_is_set():
        return "rpc"
    if get_world_size() == 1:
        return "local"
    raise RuntimeError(
        f"expected an open world of {get_world_size()} processes, found none; call this inside the "
        "function decorated with torchopt.distributed.auto_init_rpc"
    )


def _run_here(func: Callable[..., Any], call: Call) -> Any:
    _, args, kwargs = call
    func = getattr(func, "__parallelize_unwrapped__", func)
    args, kwargs = received((tuple(args or ()), dict(kwargs or {})), connected=False)
    return func(*args, **kwargs)


# --- decorators -----------------------------------------------------------------------------------


def parallelize_async(
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> Callable[[Callable[..., T]], Callable[..., Any]]:
    """Return a decorator: calls of the function return a future; see `parallelize`."""

    def decorate(func: Callable[..., T]) -> Callable[..., Any]:
        return _decorated(func, ASYNC, remote_async_call, partitioner, reducer, timeout)

    return decorate


def parallelize(
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> Callable[[Callable[..., T]], Callable[..., Any]]:
    """Return a decorator: calls of the function are split over the workers and put together.

    The function must be at the top level of a module that every process imports; the script itself
    will do.

    Args:
        partitioner: From the arguments to the calls; None: `batch_partitioner`, and `mean_reducer`
            if there is no reducer.
        reducer: From the results to the result; None: the list of them.
        timeout: Seconds for each call; unset: the default of torch's RPC, 60; 0: no limit.

    Raises:
        WorkerError: From the call: a worker raised, is late or lost.

    Example:
        >>> import torch
        >>> @parallelize(batch_partitioner, weighted_mean_reducer)
        ... def mean_square(x):
        ...     return (x ** 2).mean()
        >>> mean_square(torch.arange(5.0))
        tensor(6.)
    """

    def decorate(func: Callable[..., T]) -> Callable[..., Any]:
        return _decorated(func, SYNC, remote_sync_call, partitioner, reducer, timeout)

    return decorate


parallelize_sync = parallelize


def _decorated(
    func: Callable[..., Any],
    suffix: str,
    call: Callable[..., Any],
    partitioner: Any,
    reducer: Any,
    timeout: Any,
) -> Callable[..., Any]:
    if partitioner is None:
        partitioner = batch_partitioner
        if reducer is None:
            reducer = mean_reducer

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(
            func,
            args=args,
            kwargs=kwargs,
            partitioner=partitioner,
            reducer=reducer,
            timeout=timeout,
        )

    # The name of the function now stands for the wrapper: the function itself gets another one
    # under which the workers find it.
    func.__name__ = f"{func.__name__}{suffix}"
    func.__qualname__ = f"{func.__qualname__}{suffix}"
    module = sys.modules.get(func.__module__)
    if module is not None:
        setattr(module, func.__qualname__, func)
    wrapped.__parallelize_unwrapped__ = func  # type: ignore[attr-defined]
    return wrapped
