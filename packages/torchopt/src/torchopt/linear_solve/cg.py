# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients, and conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.condition import condition_of_tridiagonal
from torchopt.linear_solve.iterate import (
    IterativeSolver,
    Problem,
    Recorder,
    Run,
    State,
    norm,
    quotient,
    safe_norm,
    unit,
    wide,
    widened,
)
from torchopt.linear_solve.operator import BoundOperator, LinearOperator
from torchopt.linear_solve.preconditioners import Preconditioner
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.tree_function import max_over_batch

__all__ = ["CG", "NormalCG", "solve_cg"]


@dataclass(frozen=True)
class CG(IterativeSolver):
    """Preconditioned conjugate gradients, for Hermitian positive definite A.

    After k steps the error in the A-norm is at most 2 ((√κ - 1) / (√κ + 1))ᵏ times the initial one,
    where κ is the condition number of M A. k steps take k + 1 products with A; the last one is for
    the reported residual.

    The common options are those of `IterativeSolver`.

    References:
        M. R. Hestenes, E. Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, J.
        Res. Natl. Bur. Stand. 49, 1952, https://doi.org/10.6028/jres.049.044

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> found = linear_solve(A, torch.tensor([1.0, 2.0]), CG(rtol=1e-5))
        >>> found.value, int(found.stats.iterations)
        (tensor([0.0909, 0.6364]), 2)
    """

    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of iterations and the condition number or None."""
        A, P = problem.operator.mv, problem.precondition.apply
        inner = problem.inner_product(b)
        x0, r = problem.residual(b, x0)
        z = P(r)

        def step(state: State) -> State:
            x, r, p, gamma, _, _ = state
            Ap = A(p)
            alpha = _ratio(gamma, inner(p, Ap))
            r = r - alpha * Ap
            z = P(r)
            new_gamma = inner(r, z)
            beta = _ratio(new_gamma, gamma)
            return x + alpha * p, r, z + beta * p, new_gamma, alpha, beta

        gamma = inner(r, z)
        recorder = problem.recorder(lambda s: s[4:])
        start = (x0, r, z, gamma, 0 * gamma, 0 * gamma)
        state, count = problem.iterate(step, lambda s: norm(s[1]), start, recorder)
        return state[0], count, _condition(recorder)


def _ratio(a: Any, b: Any) -> Any:
    """Return a / b, or 0 where b is 0, for two tensors or two numbers."""
    if isinstance(b, Tensor):
        return quotient(a, b)
    return a / b if b else 0.0


def _condition(recorder: Recorder | None) -> Tensor | None:
    """Return κ of the tridiagonal matrix given by the coefficients of conjugate gradients.

    With α and β of each step, the Lanczos matrix has 1/αₖ + βₖ₋₁/αₖ₋₁ on the diagonal and √βₖ/αₖ
    beside it (Saad, Iterative methods for sparse linear systems, 2003, section 6.7.3).
    """
    if recorder is None or not recorder.rows:
        return None
    live, alpha, beta = recorder.columns()
    live = live & (alpha != 0)
    before = torch.cat([torch.zeros_like(beta[:1]), quotient(beta, alpha)[:-1]])
    return condition_of_tridiagonal(
        live,
        quotient(torch.ones_like(alpha), alpha) + before,
        quotient(torch.sqrt(torch.clamp(beta, min=0)), alpha),
    )


@dataclass(frozen=True)
class NormalCG(CG):
    """Conjugate gradients on AᴴA x = Aᴴ b, for any non-singular A.

    A step takes one product with A and one with Aᴴ, and the condition number is squared. Prefer
    MINRES for symmetric A, and GMRES for other A if it converges. The iteration stops by ‖Aᴴ r‖
    relative to ‖Aᴴ b‖, and is repeated if ‖r‖ is not small then. With a ridge the system is
    (AᴴA + ridge I) x = Aᴴ b. M approximates (AᴴA)⁻¹.

    The common options are those of `IterativeSolver`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import NormalCG, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), NormalCG()).value
        tensor([0.1000, 0.6000])
    """

    @property
    def shift(self) -> float | Tensor | None:
        """None, because the ridge is added to AᴴA, not to A."""
        return None

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return the normal equations if there is a ridge, because A x = b is not solved then."""
        if self.ridge is None:
            return self, operator, b
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = CG(**{**options, "ridge": None})
        rhs = operator.bound().rmv(b)
        return plain, operator.normal().shifted(self.ridge), rhs

    def init(self, operator: BoundOperator, like: Tensor) -> Any:
        """Return A together with the normal operator.

        That is AᴴA, for which M is made. With a preconditioner, an adjoint system A x = b with
        A = Bᴴ is solved as x = B y, BᴴB y = b.
        """
        plain = widened(operator, like)
        swap = operator.adjoint and self.M is not None
        normal = _normal(plain.T if swap else plain).shifted(self.ridge)
        precondition = super().init(_normal(operator.T if swap else operator), like).precondition
        problem = replace(super().init(normal, wide(like)), precondition=precondition)
        return plain, replace(problem, eps=float(torch.finfo(like.dtype).eps)), swap

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        operator, problem, swap = state
        dtype, b = b.dtype, wide(b)
        scale = unit(b)
        b = b / scale
        rhs = operator.rmv(b)
        if swap:
            found = self.solved(problem, b, per=scale)
            found = found._replace(value=operator.rmv(found.value))
        else:
            start = None if x0 is None else x0.to(b.dtype) / scale
            found = self.solved(problem, rhs, start, scale)
        if self.ridge is None:
            found = self._judged(operator, problem, b, rhs, scale, found)
        value = (found.value * scale).to(dtype)
        return found._replace(value=value, residual_norm=found.residual_norm * scale)

    def _judged(
        self,
        operator: BoundOperator,
        problem: Problem,
        b: Tensor,
        rhs: Tensor,
        scale: Tensor,
        found: Computed,
    ) -> Computed:
        """Return the result, refined if Aᴴ r is small but r is not; b is of order one."""
        limit = torch.maximum(self.rtol * norm(b), self.atol / scale)
        limit = 2 * limit + 10 * problem.eps * norm(b)
        x, count, status = found.value, found.iterations, found.status
        rest = b - operator.mv(x)
        for _ in range(2):
            again = (status == int(Status.CONVERGED)) & (norm(rest) > limit)
            if problem.check_every and not int(max_over_batch(again.long())):
                break
            gradient = operator.rmv(rest)
            more = self.solved(
                problem, torch.where(again, gradient, torch.zeros_like(b)), per=scale
            )
            x, count = x + more.value, count + more.iterations
            status = torch.where(again, more.status, status)
            rest = b - operator.mv(x)
        size = norm(rest)
        unmet = (status == int(Status.CONVERGED)) & ~(size <= limit)
        if not problem.check_every or int(max_over_batch(unmet.long())):
            least = safe_norm(operator.rmv(rest)) <= 1e3 * problem.eps * safe_norm(rhs)
            failed = torch.where(least, int(Status.SINGULAR), int(Status.MAX_ITERATIONS))
            status = torch.where(unmet, failed, status)
        condition = None if found.condition is None else torch.sqrt(found.condition)
        return Computed(x, count, size, status, condition)

    def transpose(self, state: Any) -> Any:
        """Return the state of Aᴴ."""
        operator, problem, swap = state
        if not problem.precondition.trivial:
            return operator.T, problem, not swap
        normal = _normal(operator.T).shifted(self.ridge)
        return operator.T, replace(problem, operator=normal), False


def _normal(operator: BoundOperator) -> BoundOperator:
    def mv(v: Tensor) -> Tensor:
        return operator.rmv(operator.mv(v))

    return replace(operator, mv=mv, rmv=mv, again=None)


def solve_cg(
    *,
    ridge: float | Tensor | None = None,
    init: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Preconditioner | None = None,
    on_fail: OnFail = "warn",
) -> CG:
    """Return a conjugate gradient solver, for Hermitian positive definite systems.

    Args:
        ridge: Solve with A + ridge I; None: no ridge.
        init: The start, a tree like b; None: zero.
        rtol: The iteration stops when ‖b - A x‖ ≤ max(rtol ‖b‖, atol); >= 0, dimensionless.
        atol: See `rtol`; >= 0, in the units of b.
        maxiter: The largest number of iterations; None: ten times the number of unknowns.
        M: A preconditioner, see `CG`.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".

    Returns:
        A solver; `solver(matvec, b)` is the solution, differentiable.

    Example:
        >>> import torch
        >>> solve_cg(rtol=1e-6)(lambda v: 4.0 * v, torch.tensor([2.0, 6.0]))
        tensor([0.5000, 1.5000])
    """
    return CG(rtol=rtol, atol=atol, maxiter=maxiter, M=M, ridge=ridge, x0=init, on_fail=on_fail)
