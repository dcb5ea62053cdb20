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

    With the RPC backend this process sends the calls; the workers must be able to import the
    function by name. With the collective backend every rank makes the same call and runs its own
    parts; every rank gets all results, and the future is already complete. In a world of one
    process the parts run one after the other in this process.

    Args:
        func: The function to call.
        args: Its positional arguments, before they are split.
        kwargs: Its keyword arguments, before they are split.
        partitioner: A function that maps the arguments to a list of calls; or the rank or name of
            one worker, which gets a single call; None: `batch_partitioner`.
        reducer: A function of the results, in the order of the calls; None: the list of results.
        timeout: Seconds for each call; unset: torch's default for RPC, 60; 0: no limit.

    Raises:
        ValueError: `partitioner` is none of the above.
        RuntimeError: There are several processes and no open world.
        WorkerError: Raised by `wait` on the future: a worker raised an exception, did not answer in
            time, or is gone. It names the rank and the task and contains the remote traceback.

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
    """Return the results of `func` on the parts of its arguments; see `remote_async_call`.

    Example:
        >>> import torch
        >>> remote_sync_call(torch.sum, args=(torch.arange(4),))
        [tensor(6)]
    """
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
    """Return a decorator like `parallelize` whose functions return a future of the result.

    Example:
        >>> import torch, torchopt.distributed as todist
        >>> @parallelize_async(reducer=todist.sum_reducer)
        ... def sum_of_squares(x):
        ...     return (x ** 2).sum()
        >>> sum_of_squares(torch.arange(4.0)).wait()
        tensor(14.)
    """

    def decorate(func: Callable[..., T]) -> Callable[..., Any]:
        return _decorated(func, ASYNC, remote_async_call, partitioner, reducer, timeout)

    return decorate


def parallelize(
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> Callable[[Callable[..., T]], Callable[..., Any]]:
    """Return a decorator that splits each call over the workers and combines the results.

    The function must be at the top level of a module that all processes import; the script that
    is run counts as one.

    Args:
        partitioner: A function that maps the arguments to a list of calls; None:
            `batch_partitioner`, with `mean_reducer` if there is no reducer.
        reducer: A function of the results, in the order of the calls; None: the list of results.
        timeout: Seconds for each call; unset: torch's default for RPC, 60; 0: no limit.

    Raises:
        WorkerError: A worker raised an exception, did not answer in time, or is gone.

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
    if not callable(func):
        raise TypeError(
            f"parallelize(...): expected a function to decorate, got {type(func).__name__}; write "
            "@parallelize() with its brackets"
        )
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

    # The function's name now refers to the wrapper, so the function itself gets another name,
    # under which the workers find it.
    func.__name__ = f"{func.__name__}{suffix}"
    func.__qualname__ = f"{func.__qualname__}{suffix}"
    module = sys.modules.get(func.__module__)
    if module is not None:
        setattr(module, func.__qualname__, func)
    wrapped.__parallelize_unwrapped__ = func  # type: ignore[attr-defined]
    return wrapped
