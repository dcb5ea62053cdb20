# SPDX-License-Identifier: Apache-2.0
"""Remote calls in flight, and how a worker runs them."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.futures import Future

from torchopt.distributed import packed, remote, stats, wire
from torchopt.distributed import session as _session
from torchopt.distributed.deadlines import Deadlines
from torchopt.distributed.partition import Call
from torchopt.distributed.raised import Raised, stack_of
from torchopt.distributed.world import get_world_rank
from torchopt.errors import NotDifferentiableError, WorkerError
from torchopt.tree import tree_flatten, tree_unflatten
from torchopt.tree_function import apply_rule

__all__ = ["ASYNC", "SYNC", "UNSET_RPC_TIMEOUT", "Batch"]

Reducer = Callable[[Iterable[Any]], Any]

UNSET_RPC_TIMEOUT = -1.0  # as in torch.distributed.rpc.constants
SYNC = "__parallelize_unwrapped__"
ASYNC = "__parallelize_async_unwrapped__"

_STACK_TIMEOUT = 1.0  # seconds a late worker has to say where it stands

# Texts of torch's errors for a broken connection; the errors have no types of their own.
_LOST = re.compile(r"\beof\b|ECONN|EPIPE|broken pipe|connection|shutting down|tensorpipe", re.I)

_numbers = itertools.count()


class Batch:
    """The calls of one `remote_async_call`, in flight."""

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
        self.name = getattr(func, "__name__", repr(func)).removesuffix(SYNC).removesuffix(ASYNC)

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
        new, drop = wire.outbox.missing(rank, message.contents)
        if new or drop:
            remote.rpc().rpc_async(
                rank, wire.receive, args=(me, list(new), list(new.values()), drop), timeout=0
            )
        number = next(_numbers)
        task = f"task {i + 1} of {len(self.calls)} ({self.name})"
        sent = remote.rpc().rpc_async(
            rank,
            _run_task,
            args=((me, number), message.payload, message.natives),
            timeout=self.timeout,
        )
        deadline = self._limit(rank, (me, number), task)

        def arrived(answer: Future[Any]) -> None:
            _deadlines.call_off(deadline)
            wire.outbox.done(rank, message.contents)
            try:
                outcome: Any = answer.value()
            except Exception as error:  # torch raises several types here
                self._not_answered(rank, (me, number), task, error)
                return
            if isinstance(outcome, Raised):
                self._fail(outcome.as_error(rank, task))
            else:
                session = _session.current()
                if session is not None:
                    session.suspects.discard(rank)  # it was late and answers again
                result, unused = outcome
                for k in unused:
                    message.sent[k].is_used = False
                try:
                    self._add(i, _unpacked(result))
                except Exception as error:  # only the worker has the module of a class
                    self._fail(_unreadable(rank, task, error))

        sent.add_done_callback(arrived)

    def _add(self, i: int, result: Any) -> None:
        with self.lock:
            self.results[i] = result
            self.left -= 1
            if self.left or self.settled:
                return
            self.settled = True  # from here on no deadline fails the future, too
        self._finish()

    def _finish(self) -> None:
        try:
            stats.count_results(self.results)
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
        if not late:
            wire.outbox.forget(rank)
            lost = _LOST.search(str(error)) is not None
            trace = "" if lost else f"{type(error).__name__}: {error}"
            failure = WorkerError(rank, task, "lost" if lost else "raised", trace)
            failure.__cause__ = error
            self._fail(failure)
            return
        self._late(rank, number, task)

    def _limit(self, rank: int, number: Any, task: str) -> int:
        """Fail at the deadline of a call, even if torch's agent has no free thread to report it."""
        unset = self.timeout == UNSET_RPC_TIMEOUT
        seconds = float(remote.rpc().get_rpc_timeout() if unset else self.timeout)
        this = weakref.ref(self)  # so that no result is kept until the deadline

        def over() -> None:
            batch = this()
            if batch is not None:
                batch._late(rank, number, task)

        return _deadlines.add(seconds, over)

    def _late(self, rank: int, number: Any, task: str) -> None:
        """Fail, with the stack of the late worker if it can still send it."""
        if self.settled:
            return

        late = WorkerError(rank, task, "timed out", "")

        def ask() -> None:  # not in this callback: it holds a thread of the agent
            trace = ""
            with contextlib.suppress(Exception):  # the worker may be unable to answer
                trace = remote.rpc().rpc_sync(
                    rank, _where_is, args=(number,), timeout=_STACK_TIMEOUT
                )
            self._fail(WorkerError(rank, task, "timed out", trace))

        # The agent may have no free thread to answer: do not wait for it.
        _deadlines.add(_STACK_TIMEOUT + 0.5, lambda: self._fail(late))
        threading.Thread(target=ask, daemon=True).start()


_deadlines = Deadlines()


def _unreadable(rank: int, task: str, error: Exception) -> WorkerError:
    words = (
        f"expected a result that rank {get_world_rank()} can read, got {type(error).__name__}: "
        f"{error}; return tensors, numbers, or objects of modules that both processes import"
    )
    failure = WorkerError(rank, task, "raised", words)
    failure.__cause__ = error
    return failure


class _Outside:
    """The derivative rule of a result obtained outside a context: it raises."""

    needs_its_closure = False
    num_differentiable_inputs = num_differentiable_outputs = 1
    num_kept_inputs = 0

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs[0].clone(),)

    def pull_back(self, inputs: Any, outputs: Any, cotangents: Any) -> Any:
        del inputs, outputs, cotangents
        raise NotDifferentiableError(
            "the result of a remote call has no graph outside of a context; expected `with "
            "torchopt.distributed.autograd.context() as context_id` around the call, and "
            "torchopt.distributed.autograd.backward(context_id, loss) instead of loss.backward()"
        )

    push_forward = pull_back


def _packed(result: Any) -> tuple[bytes, list[Tensor]]:
    """Return a result as bytes, and the tensors in it that have a graph."""
    leaves, spec = tree_flatten(result, none_is_leaf=True)
    graphs = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    rest = [None if k in graphs else x for k, x in enumerate(leaves)]
    return packed.pack((spec, rest, list(graphs))), list(graphs.values())


def _unpacked(answer: tuple[bytes, list[Tensor]]) -> Any:
    data, tensors = answer
    spec, leaves, places = packed.unpack(data)
    for k, x in zip(places, tensors):
        leaves[k] = apply_rule(_Outside(), x)[0] if x.is_leaf and x.requires_grad else x
    return tree_unflatten(spec, leaves)


# --- the worker's side ----------------------------------------------------------------------------

_running: dict[tuple[int, int], int] = {}  # call -> thread


def _run_task(number: tuple[int, int], payload: bytes, natives: list[Any]) -> Any:
    """Run a call for another process."""
    with _tracked(number):
        try:
            func, args, kwargs = wire.unpack(payload, natives, number[0])
            result = func(*args, **kwargs)
            return _packed(result), wire.unused(result, natives)
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
    """Return the stack of a running call."""
    thread = _running.get(tuple(number))  # type: ignore[arg-type]
    return "" if thread is None else stack_of(thread)
