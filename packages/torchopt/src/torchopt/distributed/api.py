# SPDX-License-Identifier: Apache-2.0
"""Calls on other processes: one, or one for each part of the arguments."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, Union

import torch.distributed.rpc as rpc
from torch.futures import Future

from torchopt.distributed import session as _session
from torchopt.distributed import wire
from torchopt.distributed.partition import (
    Call,
    Partitioner,
    PartitionFunction,
    TensorDimensionPartitioner,
    batch_partitioner,
    dim_partitioner,
    exclusive_batch_partitioner,
)
from torchopt.distributed.raised import Raised
from torchopt.distributed.reduce import mean_reducer, sum_reducer, weighted_mean_reducer
from torchopt.distributed.replicated import run_replicated
from torchopt.distributed.watch import stack_of
from torchopt.distributed.world import get_worker_id, get_world_rank, get_world_size
from torchopt.errors import WorkerError

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

UNSET_RPC_TIMEOUT = -1.0  # as in torch.distributed.rpc.constants

_STACK_TIMEOUT = 5.0  # seconds a late worker has to say where it stands

# What torch says of a broken connection; its errors have no types of their own.
_LOST = re.compile(r"\beof\b|ECONN|EPIPE|broken pipe|connection|shutting down|tensorpipe", re.I)


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
        ValueError: `partitioner` is none.
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
        return _Batch(func, calls, finish, timeout).send()
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
    if _session._agent_is_set():
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
    args, kwargs = wire.received((tuple(args or ()), dict(kwargs or {})), connected=False)
    return func(*args, **kwargs)


# --- the caller's side ----------------------------------------------------------------------------

_numbers = itertools.count()


class _Batch:
    """The calls of one `remote_async_call` on their way."""

    def __init__(
        self, func: Callable[..., Any], calls: Sequence[Call], finish: Reducer, timeout: Any
    ) -> None:
        self.func = func
        self.calls = calls
        self.finish = finish
        self.timeout = UNSET_RPC_TIMEOUT if timeout is None else timeout
        self.results: list[Any] = [None] * len(calls)
        self.left = len(calls)
        self.settled = False
        self.lock = threading.Lock()
        self.future: Future[Any] = Future()
        self.name = getattr(func, "__name__", repr(func)).removesuffix(_SYNC).removesuffix(_ASYNC)

    def send(self) -> Future[Any]:
        """Send all calls and return the future of the result."""
        packer = wire.Packer([(args, kwargs) for _, args, kwargs in self.calls])
        messages = [self._pack(packer, call) for call in self.calls]
        if not messages:
            self._finish()
        for i, ((rank, _, _), message) in enumerate(zip(self.calls, messages)):
            self._send(i, rank, message)
        return self.future

    def _pack(self, packer: wire.Packer, call: Call) -> wire.Message:
        func = getattr(self.func, "__parallelize_unwrapped__", self.func)
        try:
            return packer.pack((func, tuple(call[1] or ()), dict(call[2] or {})))
        except (pickle.PicklingError, AttributeError) as error:
            raise pickle.PicklingError(
                f"{self.name}: expected a function and arguments that can be pickled, a function "
                f"at the top level of a module that every process imports; got: {error}"
            ) from error

    def _send(self, i: int, rank: int, message: wire.Message) -> None:
        me = get_world_rank()
        new, drop = wire.outbox.missing(rank, message)
        if new or drop:
            rpc.rpc_async(
                rank, wire.receive, args=(me, list(new), list(new.values()), drop), timeout=0
            )
        number = next(_numbers)
        task = f"task {i + 1} of {len(self.calls)} ({self.name})"
        sent = rpc.rpc_async(
            rank,
            _run_task,
            args=((me, number), message.payload, message.natives),
            timeout=self.timeout,
        )

        def arrived(answer: Future[Any]) -> None:
            wire.outbox.done(rank, message)
            try:
                outcome = answer.value()
            except Exception as error:  # torch raises several types here
                self._not_answered(rank, (me, number), task, error)
                return
            if isinstance(outcome, Raised):
                self._fail(outcome.as_error(rank, task))
            else:
                session = _session.current()
                if session is not None:
                    session.suspects.discard(rank)  # late before, and back
                self._add(i, outcome[0])

        sent.add_done_callback(arrived)

    def _add(self, i: int, result: Any) -> None:
        with self.lock:
            self.results[i] = result
            self.left -= 1
            last = self.left == 0 and not self.settled
        if last:
            self._finish()

    def _finish(self) -> None:
        self.settled = True
        wire.count_results(self.results)
        try:
            self.future.set_result(self.finish(self.results))
        except Exception as error:
            self.future.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            if self.settled:
                return
            self.settled = True
        self.future.set_exception(error)

    def _not_answered(self, rank: int, number: Any, task: str, error: Exception) -> None:
        late = "RPC ran for more than set timeout" in str(error)
        session = _session.current()
        if session is not None and (late or _LOST.search(str(error))):
            session.suspects.add(rank)
        wire.outbox.forget(rank)
        if not late:
            lost = _LOST.search(str(error)) is not None
            trace = "" if lost else f"{type(error).__name__}: {error}"
            failure = WorkerError(rank, task, "lost" if lost else "raised", trace)
            failure.__cause__ = error
            self._fail(failure)
            return

        def ask() -> None:  # not in this callback: it holds a thread of the agent
            trace = ""
            with contextlib.suppress(Exception):  # it may be past answering
                trace = rpc.rpc_sync(rank, _where_is, args=(number,), timeout=_STACK_TIMEOUT)
            self._fail(WorkerError(rank, task, "timed out", trace))

        threading.Thread(target=ask, daemon=True).start()


# --- the worker's side ----------------------------------------------------------------------------

_running: dict[tuple[int, int], int] = {}  # call -> thread


def _run_task(number: tuple[int, int], payload: bytes, natives: list[Any]) -> Any:
    """Run a call; called by the process that wants it."""
    with _tracked(number):
        try:
            func, args, kwargs = wire.unpack(payload, natives, number[0])
            return (func(*args, **kwargs),)
        except BaseException as error:  # a SystemExit here would leave the caller waiting
            return Raised(error)


@contextlib.contextmanager
def _tracked(number: tuple[int, int]) -> Iterator[None]:
    _running[number] = threading.get_ident()
    try:
        yield
    finally:
        del _running[number]


def _where_is(number: tuple[int, int]) -> str:
    """Return where a running call stands."""
    thread = _running.get(tuple(number))  # type: ignore[arg-type]
    return "" if thread is None else stack_of(thread)


# --- decorators -----------------------------------------------------------------------------------

_SYNC = "__parallelize_unwrapped__"
_ASYNC = "__parallelize_async_unwrapped__"


def parallelize_async(
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable[T]], U] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> Callable[[Callable[..., T]], Callable[..., Any]]:
    """Return a decorator: calls of the function return a future; see `parallelize`."""

    def decorate(func: Callable[..., T]) -> Callable[..., Any]:
        return _decorated(func, _ASYNC, remote_async_call, partitioner, reducer, timeout)

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
        return _decorated(func, _SYNC, remote_sync_call, partitioner, reducer, timeout)

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
