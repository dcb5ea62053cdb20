# SPDX-License-Identifier: Apache-2.0
"""The loop of the iterative solvers, and the arithmetic that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.operator import BoundOperator, Layout
from torchopt.linear_solve.preconditioners import (
    FlatPreconditioner,
    Preconditioner,
    prepare_preconditioner,
)
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.tree import tree_map
from torchopt.tree_function import max_over_batch

__all__ = ["IterativeSolver", "Problem", "dot", "finish", "iterate", "norm", "quotient"]

State = tuple[Tensor, ...]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return xᴴ y."""
    return (x.conj() * y).sum() if x.is_complex() else (x * y).sum()


def norm(x: Tensor) -> Tensor:
    """Return ‖x‖₂."""
    size: Tensor = torch.linalg.vector_norm(x)
    return size


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, or 0 where b is 0: a breakdown stops the update instead of spreading NaN."""
    zero = b == 0
    return torch.where(zero, torch.zeros_like(a), a / torch.where(zero, torch.ones_like(b), b))


def iterate(
    step: Callable[[State], State],
    active: Callable[[State], Tensor],
    state: State,
    maxiter: int,
    check_every: int,
) -> tuple[State, Tensor]:
    """Repeat `step` while `active`, at most `maxiter` times; return the state and the count.

    Under vmap each entry of the batch stops by itself: what is done keeps its state, by a mask.
    The host asks only every `check_every` iterations whether all is done, never for 0. The result
    does not depend on `check_every`.
    """
    live = active(state)
    count = torch.zeros_like(live, dtype=torch.int64)
    for k in range(maxiter):
        if check_every and k % check_every == 0 and not int(max_over_batch(live.long())):
            break
        count = count + live
        state = tuple(torch.where(live, new, old) for new, old in zip(step(state), state))
        live = live & active(state)
    return state, count


def finish(
    operator: BoundOperator, x: Tensor, b: Tensor, target: Tensor, count: Tensor
) -> Computed:
    """Return the result with the true residual, and the status that follows from it."""
    residual = norm(b - operator.mv(x))
    # Recurrences lose a few digits against the true residual: a factor of two is no failure.
    met = residual <= 2 * target + 10 * torch.finfo(residual.dtype).eps * norm(b)
    status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
    status = torch.where(~met & (residual > 10 * norm(b)), int(Status.DIVERGED), status)
    status = torch.where(residual.isfinite(), status, int(Status.NON_FINITE))
    return Computed(x, count, residual, status)


@dataclass(frozen=True)
class Problem:
    """What the loop of an iterative solver works on.

    Attributes:
        operator: A.
        precondition: P ≈ A⁻¹.
        target: The residual norm to reach.
        maxiter: The most iterations.
        check_every: See `IterativeSolver`.
    """

    operator: BoundOperator
    precondition: FlatPreconditioner
    target: Tensor
    maxiter: int
    check_every: int

    def iterate(
        self, step: Callable[[State], State], residual: Callable[[State], Tensor], state: State
    ) -> tuple[State, Tensor]:
        """Repeat `step` until ‖residual‖ reaches the target; return the state and the count."""

        def active(current: State) -> Tensor:
            size = residual(current)
            return (size > self.target) & size.isfinite()

        return iterate(step, active, state, self.maxiter, self.check_every)


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """Options of the iterative solvers. The stop is ‖r‖ ≤ max(rtol ‖b‖, atol).

    Attributes:
        rtol: Relative tolerance, dimensionless.
        atol: Absolute tolerance, in the unit of ‖b‖.
        maxiter: The most iterations; None: ten times the number of unknowns.
        M: A preconditioner, an approximation of A⁻¹: a callable on trees, a matrix
            (for one vector), or a `Jacobi`. It changes the path, not the answer, and is not
            differentiated.
        ridge: Solve with A + ridge I instead of A.
        x0: The start, a tree like b; by default zero.
        check_every: After how many iterations the host asks whether to stop. None: after each one
            on the CPU, after 16 elsewhere, where the question costs a synchronisation. 0: never,
            all `maxiter` iterations run (entries that are done no longer change).
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore". `linear_solve`
            has its own.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    M: Preconditioner | None = None
    ridge: float | Tensor | None = None
    x0: Any = None
    check_every: int | None = None
    on_fail: OnFail = "warn"

    def __post_init__(self) -> None:
        if self.maxiter is not None and self.maxiter < 0:
            raise ValueError(f"maxiter: expected a count >= 0 or None, got {self.maxiter}")
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"expected tolerances >= 0, got rtol={self.rtol}, atol={self.atol}")

    @abstractmethod
    def run(self, problem: Problem, b: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last iterate and the number of iterations."""

    def init(self, operator: BoundOperator, like: Tensor) -> Problem:
        """Return the operator with the preconditioner made ready for it."""
        n = operator.size
        return Problem(
            operator,
            prepare_preconditioner(self.M, operator, like),
            target=torch.zeros((), dtype=like.dtype, device=like.device),
            maxiter=10 * n if self.maxiter is None else self.maxiter,
            check_every=(1 if like.device.type == "cpu" else 16)
            if self.check_every is None
            else self.check_every,
        )

    def compute(self, state: Problem, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        size = norm(b)
        target = torch.clamp(self.rtol * size, min=self.atol)
        problem = replace(state, target=target)
        x, count = self.run(problem, b, torch.zeros_like(b) if x0 is None else x0.to(b.dtype))
        return finish(state.operator, x, b, target, count)

    def transpose(self, state: Problem) -> Problem:
        """Return the state of Aᴴ."""
        precondition = state.precondition
        return replace(state, operator=state.operator.T, precondition=precondition.T)

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with an unconverged answer."""
        return self.on_fail

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge

    def start(self, layout: Layout) -> Tensor | None:
        """Return x0 as a vector."""
        if self.x0 is None:
            return None
        return layout.ravel(tree_map(torch.detach, self.x0), "linear solver: x0")
