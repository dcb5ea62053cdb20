# SPDX-License-Identifier: Apache-2.0
"""The result of a linear solve, and what happens if it fails."""

from __future__ import annotations

import enum
from typing import Any, Literal, NamedTuple

from torch import Tensor

from torchopt.errors import TorchOptError, warn_caller
from torchopt.shown import described
from torchopt.tree_function import max_over_batch

__all__ = [
    "LinearSolveError",
    "LinearSolveWarning",
    "OnFail",
    "Solution",
    "Stats",
    "Status",
    "report_failure",
]

OnFail = Literal["raise", "warn", "ignore"]


class LinearSolveError(TorchOptError, RuntimeError):
    """A linear system was not solved to the accuracy that was requested."""


class LinearSolveWarning(UserWarning):
    """A linear system was not solved to the accuracy that was requested."""


class Status(enum.IntEnum):
    """How a linear solve ended; a larger number is worse."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    DIVERGED = 2
    SINGULAR = 3
    NON_FINITE = 4

    @property
    def sentence(self) -> str:
        """What happened and what to try."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "The solve converged.",
    Status.MAX_ITERATIONS: (
        "The solver reached `maxiter` before the residual met `rtol` and `atol`. Allow more "
        "iterations, loosen the tolerances, add a preconditioner `M` or a `ridge`, or use a dense "
        "solver such as LU()."
    ),
    Status.DIVERGED: (
        "The residual grew instead of shrinking. The operator does not meet what the solver "
        "requires: the Neumann series needs ‖I - alpha A‖ < 1 (choose a smaller `alpha`), CG a "
        "positive definite operator; for a general operator use NormalCG(), GMRES() or LU()."
    ),
    Status.SINGULAR: (
        "The operator is singular, or for a Cholesky solver not positive definite. Check that the "
        "system has one solution, or add a `ridge`."
    ),
    Status.NON_FINITE: (
        "The solve produced NaN or infinity. Check that the operator and the right-hand side are "
        "finite; in half precision, solve in float32."
    ),
}


class Stats(NamedTuple):
    """Counts and norms of one linear solve, 0-dim tensors (batched under vmap).

    Attributes:
        iterations: The number of iterations; 0 for a direct solver.
        residual_norm: ‖b - A x‖₂ of the returned x, in the precision of the solver.
        rhs_norm: ‖b‖₂.
        condition: The condition number κ₂ of A, or of M A with a preconditioner: exact for direct
            solvers, a lower bound for Krylov solvers. NaN for BiCGSTAB and Neumann, and if the
            solver was not made with `estimate_condition=True`.
    """

    iterations: Tensor
    residual_norm: Tensor
    rhs_norm: Tensor
    condition: Tensor


class Solution(NamedTuple):
    """The solution of a linear system.

    Attributes:
        value: x, a tree like the right-hand side; differentiable.
        status: A `Status` as a 0-dim integer tensor (batched under vmap).
        stats: Iterations and norms.
    """

    value: Any
    status: Tensor
    stats: Stats


def refuse_function(option: Any, solver: object, call: str) -> None:
    """Raise TypeError if an option is a function or a matrix, because the call takes those."""
    name = type(solver).__name__
    if isinstance(option, Tensor) and option.dim():
        raise TypeError(
            f"{name}(...): expected options of the solver, got a tensor of shape "
            f"{tuple(option.shape)}; write torchopt.linear_solve.linear_solve(A, b, {name}())"
        )
    if callable(option) and not isinstance(option, Tensor):
        raise TypeError(
            f"{name}(...): expected options of the solver, got a function; write {name}(){call}"
        )


def report_failure(status: Tensor, on_fail: OnFail, solver: object) -> None:
    """Raise or warn unless every entry of the batch converged; reads one number from the device.

    Raises:
        LinearSolveError: `on_fail` is "raise" and the solve failed.
        ValueError: `on_fail` is none of the three.
    """
    if on_fail == "ignore":
        return
    if on_fail not in ("raise", "warn"):
        raise ValueError(f"on_fail: expected 'raise', 'warn' or 'ignore', got {on_fail!r}")
    worst = Status(int(max_over_batch(status)))
    if worst is Status.CONVERGED:
        return
    message = f"Linear solve by {described(solver)}: {worst.name}. {worst.sentence}"
    if on_fail == "raise":
        raise LinearSolveError(message)
    warn_caller(message, LinearSolveWarning)
