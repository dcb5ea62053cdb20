# SPDX-License-Identifier: Apache-2.0
"""The exceptions and warnings of torchopt beyond Python's own."""

from __future__ import annotations

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
    """A program could not be compiled: there is no C++ compiler, or it fails."""


class GradientMismatchError(TorchOptError, RuntimeError):
    """Two engines of differentiation give gradients that differ by more than was allowed."""


class KernelUnavailableError(TorchOptError, RuntimeError):
    """A fused kernel was requested explicitly and cannot run on these tensors."""


class MissingExtensionWarning(UserWarning):
    """This installation of torchopt has no compiled kernels; everything works, more slowly."""


class NotDifferentiableError(TorchOptError, RuntimeError):
    """A gradient was requested with respect to something the loss does not depend on."""


class NotTraceableError(TorchOptError, RuntimeError):
    """A program cannot be traced: it does not do the same operations in each run."""


class SecondDerivativeWarning(UserWarning):
    """A step that will be differentiated uses an operation without a second derivative."""


class MismatchError(TorchOptError, ValueError):
    """Tensors that should belong together differ in shape or device, or do not hold fractions.

    Attributes:
        leaf: Which leaf of the tree it is about, from 0.
        reason: What was expected there, and what came.
        where: The path of the leaf, such as `$['fc1'].bias`; None where it is not known.
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
    """A process of a distributed run raised, did not answer in time, or is gone.

    Where the worker raised, the error is also an instance of the exception it raised, so that
    `except ValueError` catches a `ValueError` of a remote call.

    Attributes:
        rank: Rank of the worker; None if it is unknown.
        task: What it was doing, such as `"task 3 of 8"` or `"after step 2"`; None before the first.
        kind: `"raised"`, `"timed out"`, `"lost"`, `"left"` (came to its end while others still
            needed it) or `"differs"` (computes something else than the others).
        remote_traceback: Where it was; empty if there is none.
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
    "left": "came to its end while others still need it",
    "differs": "differs from the others",
}
