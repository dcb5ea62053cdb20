# SPDX-License-Identifier: Apache-2.0
"""Exceptions that are raised in one process and raised again in another."""

from __future__ import annotations

import contextlib
import functools
import pickle
import sys
import traceback
from typing import Any

from torchopt.errors import WorkerError

__all__ = ["Raised", "stack_of"]


def stack_of(thread_id: int) -> str:
    """Return the stack of a thread of this process, as a traceback prints it."""
    frame = sys._current_frames().get(thread_id)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


class Raised:
    """An exception to be sent to another process: its traceback as text, and its class.

    Args:
        error: The exception.
        rank: The rank that raised it; None: the receiver knows.
        task: The task that raised it; None: the receiver knows.
    """

    def __init__(
        self, error: BaseException, rank: int | None = None, task: str | None = None
    ) -> None:
        self.rank = rank
        self.task = task
        self.trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.passed_on: tuple[Any, ...] | None = None
        if isinstance(error, WorkerError):  # the failure of a third process
            self.passed_on = (error.rank, error.task, error.kind, error.remote_traceback)
        self.kind: bytes | None = None
        with contextlib.suppress(pickle.PicklingError, AttributeError):  # a class without a name
            self.kind = pickle.dumps(type(error))

    def as_error(self, rank: int | None = None, task: str | None = None) -> WorkerError:
        """Return a `WorkerError` that is also an instance of the original exception's class."""
        if self.passed_on is not None:
            return WorkerError(*self.passed_on)
        arguments = (
            self.rank if rank is None else rank,
            self.task if task is None else task,
            "raised",
            self.trace,
        )
        kind: Any = None
        if self.kind is not None:
            with contextlib.suppress(Exception):  # only the other process has the class
                kind = pickle.loads(self.kind)
        if kind is not None and issubclass(kind, Exception) and not issubclass(WorkerError, kind):
            with contextlib.suppress(TypeError):  # classes that cannot be combined
                return _combined(kind)(*arguments)
        return WorkerError(*arguments)


@functools.cache
def _combined(kind: type[Exception]) -> type[WorkerError]:
    def text(self: WorkerError) -> str:
        return str(self.args[0])

    def new(cls: type[Any], *args: Any) -> Any:
        del args
        return Exception.__new__(cls)

    names: dict[str, Any] = {
        "__str__": text,
        "__init__": WorkerError.__init__,
        "__new__": new,
        "__module__": kind.__module__,
        "__doc__": f"A `{kind.__name__}` that was raised on a worker.",
    }
    return type(kind.__name__, (WorkerError, kind), names)
