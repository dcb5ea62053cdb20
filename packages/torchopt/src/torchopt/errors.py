# SPDX-License-Identifier: Apache-2.0
"""The exceptions and warnings that torchopt defines."""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "CheckpointError",
    "CompilerError",
    "GradientMismatchError",
    "KernelUnavailableError",
    "LeafTypeError",
    "MismatchError",
    "MissingExtensionWarning",
    "NotDifferentiableError",
    "NotTraceableError",
    "SecondDerivativeWarning",
    "TorchOptError",
    "WorkerError",
]


class TorchOptError(Exception):
    """Base of the exceptions defined by torchopt."""


class CheckpointError(TorchOptError, RuntimeError):
    """A checkpoint is truncated or corrupted, and no earlier one is intact."""


class CompilerError(TorchOptError, RuntimeError):
    """A program could not be compiled: there is no C++ compiler, or the compiler failed."""


class GradientMismatchError(TorchOptError, RuntimeError):
    """Two engines of differentiation give gradients that differ by more than the limit."""


class KernelUnavailableError(TorchOptError, RuntimeError):
    """A fused kernel was requested explicitly and cannot run on these tensors."""


class MissingExtensionWarning(UserWarning):
    """This installation of torchopt has no compiled kernels; everything works, more slowly."""


class NotDifferentiableError(TorchOptError, RuntimeError):
    """A derivative was requested that does not exist, or that cannot be computed."""


class NotTraceableError(TorchOptError, RuntimeError):
    """A program cannot be traced, because it may do other operations in another run."""


class SecondDerivativeWarning(UserWarning):
    """A step that will be differentiated uses an operation without a second derivative."""


class MismatchError(TorchOptError, ValueError):
    """Tensors that belong together differ in shape or device, or have a dtype without fractions.

    Attributes:
        leaf: The number of the leaf in the tree, counted from 0.
        reason: What was expected there, and what was found.
        where: The path of the leaf, such as `$['fc1'].bias`; None if it is not known.
    """

    def __init__(self, leaf: int, reason: str, where: str | None = None) -> None:
        super().__init__(f"at {where or f'leaf {leaf}'}: {reason}")
        self.leaf = leaf
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.leaf, self.reason, self.where)


class LeafTypeError(MismatchError, TypeError):
    """A leaf of a tree of tensors is not a tensor."""


class WorkerError(TorchOptError, RuntimeError):
    """A process of a distributed run raised, did not answer in time, or is lost.

    If the worker raised, the error is also an instance of the class that it raised, so that
    `except ValueError` catches a `ValueError` of a remote call.

    Attributes:
        rank: Rank of the worker; None if it is unknown.
        task: What it was doing, such as `"task 3 of 8"` or `"after step 2"`; None before the first.
        kind: `"raised"`, `"timed out"`, `"lost"`, `"left"` (exited while others still needed it) or
            `"differs"` (does not compute the same as the others).
        remote_traceback: The traceback on the worker; empty if there is none.
    """

    def __init__(
        self, rank: int | None, task: str | None, kind: str, remote_traceback: str
    ) -> None:
        self.rank = rank
        self.task = task
        self.kind = kind
        self.remote_traceback = remote_traceback
        where = "a worker" if rank is None else f"rank {rank}"
        after = task is not None and task.startswith("after ")
        doing = "" if task is None else f" {task}" if after else f" in {task}"
        trace = f"\n\nOn {where}:\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(f"{where} {_WORKER_FAILURES[kind]}{doing}.{trace}")

    def __reduce__(self) -> tuple[object, ...]:
        return WorkerError, (self.rank, self.task, self.kind, self.remote_traceback)


_WORKER_FAILURES = {
    "raised": "raised",
    "timed out": "did not finish in time",
    "lost": "is lost: its process was killed or its machine cannot be reached;"
    " the connection ended",
    "left": "exited while others still needed it",
    "differs": "differs from the others",
}


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, with the place of the innermost caller outside of torchopt and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("torchopt", "torch", "optree")
