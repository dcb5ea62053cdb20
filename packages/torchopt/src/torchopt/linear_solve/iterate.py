# SPDX-License-Identifier: Apache-2.0
"""The loop of the iterative solvers, and their common arithmetic."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import BoundOperator, FlatMap
from torchopt.linear_solve.preconditioners import (
    FlatPreconditioner,
    Nystrom,
    Preconditioner,
    prepare_preconditioner,
)
from torchopt.linear_solve.result import OnFail, Status, refuse_function
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.tree import tree_map
from torchopt.tree_function import (
    derivatives_wanted,
    is_batched,
    is_traced,
    is_transforming,
    max_over_batch,
)

__all__ = [
    "IterativeSolver",
    "Problem",
    "Run",
    "State",
    "dot",
    "finish",
    "iterate",
    "norm",
    "power_of_two",
    "quotient",
    "safe_norm",
    "unit",
    "wide",
    "widened",
]

State = tuple[Tensor, ...]
#: The last iterate, the number of iterations, and the condition number if it was requested.
Run = tuple[Tensor, Tensor, Union[Tensor, None]]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return xᴴ y."""
    return (x.conj() * y).sum() if x.is_complex() else (x * y).sum()


def norm(x: Tensor) -> Tensor:
    """Return ‖x‖₂ for numbers of order one; for others the squares may over- or underflow."""
    size: Tensor = torch.linalg.vector_norm(x)
    return size


def unit(x: Tensor) -> Tensor:
    """Return the power of two below the largest element; 1 if it is zero or not finite.

    The solution of A x = b is linear in b, so solvers work on b / unit(b). Then their convergence
    does not depend on the scale of b.
    """
    if x.numel() == 0:
        return x.real.sum() + 1 if x.is_complex() else x.sum() + 1
    return power_of_two(torch.linalg.vector_norm(x.detach(), torch.inf))


def power_of_two(size: Tensor) -> Tensor:
    """Return the largest power of two up to `size` ≥ 0; 1 if `size` is zero or not finite."""
    mantissa, _ = torch.frexp(size)
    power: Tensor = torch.nan_to_num(size / (2 * mantissa), nan=1.0, posinf=1.0)
    return power


def safe_norm(x: Tensor) -> Tensor:
    """Return ‖x‖₂ without overflow or underflow."""
    scale = unit(x)
    return norm(x / scale) * scale


def wide(x: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, any other tensor unchanged."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x


def widened(operator: BoundOperator, like: Tensor) -> BoundOperator:
    """Return a half-precision operator as one on float32 vectors.

    Each product gets a vector with elements of order one, and runs in half precision.
    """
    if wide(like) is like:
        return operator

    def scaled(product: FlatMap, _: bool) -> FlatMap:
        def widened_product(v: Tensor) -> Tensor:
            scale = unit(v)
            return product((v / scale).to(like.dtype)).to(v.dtype) * scale

        return widened_product

    return operator.through(scaled)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, or 0 where b is 0, so that a breakdown stops updates instead of spreading NaN.

    Only for loops that are not differentiated, because the derivative where b is 0 is NaN.
    """
    if b.is_cpu and b.ndim == 0 and not (is_transforming() or is_traced()):
        return a / b if b else torch.zeros_like(a / b)  # faster than `where` for one number
    return torch.where(b == 0, 0.0, a / b)


def iterate(
    step: Callable[[State], State],
    active: Callable[[State], Any],
    state: State,
    maxiter: int,
    check_every: int,
    observe: Callable[[Tensor, State], None] | None = None,
) -> tuple[State, Tensor]:
    """Repeat `step` while `active`, at most `maxiter` times; return the state and the count.

    `observe` is called after each step with the mask of the entries that took the step, and the
    state. Under vmap each entry of the batch stops independently; a mask keeps the state of
    finished entries. The host checks only every `check_every` iterations whether all are finished,
    never if it is 0. The result does not depend on `check_every`.
    """
    if check_every == 1 and not is_transforming():
        return _iterate_one(step, active, state, maxiter, observe)
    live = active(state)
    count = torch.zeros_like(live, dtype=torch.int64)
    for k in range(maxiter):
        asked = bool(check_every) and k % check_every == 0
        if asked and not int(max_over_batch(live.long())):
            break
        count = count + live
        following = step(state)
        # A single problem that was just found to be active needs no mask.
        if not asked or is_batched(live):
            following = tuple(torch.where(live, new, old) for new, old in zip(following, state))
        state = following
        if observe is not None:
            observe(live, state)
        live = live & active(state)
    return state, count


def _iterate_one(
    step: Callable[[State], State],
    active: Callable[[State], Any],
    state: State,
    maxiter: int,
    observe: Callable[[Tensor, State], None] | None,
) -> tuple[State, Tensor]:
    # For one problem that the host stops, without masks; `active` may return a bool.
    count = 0
    live = torch.ones((), dtype=torch.bool, device=state[0].device)
    while count < maxiter and active(state):
        state = step(state)
        count += 1
        if observe is not None:
            observe(live, state)
    return state, torch.full_like(live, count, dtype=torch.int64)


@dataclass
class Recorder:
    """Collects the coefficients of a Krylov process, for `condition_of_bidiagonal` and others.

    Attributes:
        pick: Returns the coefficients of the last step, 0-dim tensors, given the state.
    """

    pick: Callable[[State], State]
    masks: list[Tensor] = field(default_factory=list)
    rows: list[State] = field(default_factory=list)

    def __call__(self, live: Tensor, state: State) -> None:
        """Record one step."""
        self.masks.append(live)
        self.rows.append(tuple(x.real if x.is_complex() else x for x in self.pick(state)))

    def columns(self) -> State:
        """Return the mask and each coefficient, [steps], after at least one step."""
        return (torch.stack(self.masks), *(torch.stack(column) for column in zip(*self.rows)))


def finish(
    operator: BoundOperator,
    x: Tensor,
    b: Tensor,
    target: Tensor,
    count: Tensor,
    condition: Tensor | None,
    eps: float | None = None,
) -> Computed:
    """Return the result with its true residual and the status that follows from it."""
    residual = norm(b - operator.mv(x))
    eps = torch.finfo(residual.dtype).eps if eps is None else eps
    # Recurrences lose a few digits of the true residual, so a factor of two is not a failure.
    met = residual <= 2 * target + 10 * eps * norm(b)
    status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
    status = torch.where(~met & (residual > 10 * norm(b)), int(Status.DIVERGED), status)
    finite = residual.isfinite()
    status = torch.where(finite, status, int(Status.NON_FINITE))
    # Without an iteration x is the start, which must not hide a right-hand side of NaN.
    return Computed(torch.where(finite, x, torch.nan), count, residual, status, condition)


@dataclass(frozen=True)
class Problem:
    """The problem of the loop of an iterative solver.

    Attributes:
        operator: A.
        precondition: P ≈ A⁻¹.
        target: The residual norm to reach.
        maxiter: The largest number of iterations.
        check_every: See `IterativeSolver`.
        estimate_condition: See `IterativeSolver`.
        eps: The eps of the caller's dtype.
    """

    operator: BoundOperator
    precondition: FlatPreconditioner
    target: Tensor
    maxiter: int
    check_every: int
    estimate_condition: bool
    eps: float

    def residual(self, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the start and its residual b - A x; starting at zero needs no product.

        A start with a larger residual than zero is not used, because its digits would be lost.
        """
        none = torch.zeros_like(b)
        if x0 is None:
            return none, b
        rest = b - self.operator.mv(x0)
        better = norm(rest) <= norm(b)
        return torch.where(better, x0, none), torch.where(better, rest, b)

    def recorder(self, pick: Callable[[State], State]) -> Recorder | None:
        """Return a recorder if the condition number was requested."""
        return Recorder(pick) if self.estimate_condition else None

    def iterate(
        self,
        step: Callable[[State], State],
        residual: Callable[[State], Tensor],
        state: State,
        observe: Recorder | None = None,
    ) -> tuple[State, Tensor]:
        """Repeat `step` until ‖residual‖ reaches the target; return the state and the count."""
        on_host = self.check_every == 1 and not is_transforming()
        target: Any = self.target.item() if on_host else self.target

        def active(current: State) -> Any:
            size = residual(current)
            if on_host:
                return target < size.item() < math.inf
            return (size > target) & (size < torch.inf)

        return iterate(step, active, state, self.maxiter, self.check_every, observe)

    def inner_product(self, like: Tensor) -> Callable[[Tensor, Tensor], Any]:
        """Return `dot`, or the same with a number of Python as its result, where that is faster.

        The arithmetic of the numbers is rounded in the same way. Nothing may follow it.
        """
        plain = like.is_cpu and not like.is_complex() and self.check_every == 1
        if not plain or self.estimate_condition or derivatives_wanted() or is_traced():
            return dot
        return lambda x, y: dot(x, y).item()


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """Options of the iterative solvers, which stop when ‖b - A x‖ ≤ max(rtol ‖b‖, atol).

    Attributes:
        rtol: Relative tolerance, >= 0, dimensionless.
        atol: Absolute tolerance, >= 0, in the units of b.
        maxiter: The largest number of iterations, >= 0; None: ten times the number of unknowns.
        M: A preconditioner, an approximation of A⁻¹: a callable on trees, a matrix (for a single
            vector), a `Jacobi` or a `Nystrom`. It changes the iterates, not the solution, and is
            not differentiated.
        ridge: Solve with A + ridge I; None: no ridge.
        x0: The start, a tree like b; None: zero.
        check_every: After how many iterations the host checks whether to stop. None: after each one
            on the CPU, after 16 elsewhere, where a check costs a synchronisation. 0: not at all;
            then all `maxiter` iterations run (finished entries no longer change).
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore". `linear_solve`
            has an option of its own, whose default follows "ignore" here.
        estimate_condition: Whether to compute `Stats.condition` from the coefficients of the
            iteration, with O(k³) operations for k iterations and no further product.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    M: Preconditioner | None = None
    ridge: float | Tensor | None = None
    x0: Any = None
    check_every: int | None = None
    on_fail: OnFail = "warn"
    estimate_condition: bool = False

    def __post_init__(self) -> None:
        refuse_function(self.rtol, self, "(matvec, b)")
        if self.maxiter is not None and self.maxiter < 0:
            raise ValueError(f"maxiter: expected a count >= 0 or None, got {self.maxiter}")
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"expected tolerances >= 0, got rtol={self.rtol}, atol={self.atol}")

    @abstractmethod
    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of iterations and the condition number or None."""

    def init(self, operator: BoundOperator, like: Tensor) -> Problem:
        """Return the operator with its prepared preconditioner."""
        n = operator.size
        narrow = wide(like) is not like
        if narrow and isinstance(self.M, Nystrom):  # LAPACK has no half precision
            precondition = prepare_preconditioner(self.M, widened(operator, like), wide(like))
        else:
            precondition = prepare_preconditioner(self.M, operator, like)
        if narrow and not isinstance(self.M, Nystrom):
            both = (precondition.apply, precondition.adjoint)
            through = widened(replace(operator, mv=both[0], rmv=both[1]), like)
            precondition = replace(precondition, apply=through.mv, adjoint=through.rmv)
        return Problem(
            widened(operator, like),
            precondition,
            target=torch.zeros((), dtype=wide(like).dtype, device=like.device),
            maxiter=10 * n if self.maxiter is None else self.maxiter,
            check_every=(1 if like.device.type == "cpu" else 16)
            if self.check_every is None
            else self.check_every,
            estimate_condition=self.estimate_condition,
            eps=float(torch.finfo(like.dtype).eps),
        )

    def compute(self, state: Problem, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        return self.solved(state, b, x0)

    def solved(
        self, state: Problem, b: Tensor, x0: Tensor | None = None, per: Tensor | float = 1.0
    ) -> Computed:
        """Return the same as `compute` for a vector that is already divided by `per`."""
        dtype, b = b.dtype, wide(b)
        scale = unit(b)
        b = b / scale
        target = torch.maximum(self.rtol * norm(b), self.atol / scale / per)
        problem = replace(state, target=target)
        x, count, condition = self.run(problem, b, None if x0 is None else x0.to(b.dtype) / scale)
        found = finish(state.operator, x, b, target, count, condition, state.eps)
        return found._replace(
            value=(found.value * scale).to(dtype), residual_norm=found.residual_norm * scale
        )

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
