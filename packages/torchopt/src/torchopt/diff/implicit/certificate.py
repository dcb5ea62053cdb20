# SPDX-License-Identifier: Apache-2.0
"""How wrong an implicit gradient may be, found from the gradient itself.

A solver returns x̂ and not the root x, and the linear system is solved up to a residual. With
A = ∂F/∂x and B = ∂F/∂θ at x̂, the gradient that is returned is

    ĝ = direct + Bᴴ û   where   Aᴴ û = -x̄ - r .

To first order x̂ - x = e = A⁻¹ F(x̂), and so

    ĝ - g  ≈  D ĝ(x̂)[e]  -  Bᴴ A⁻ᴴ r :

the derivative of the gradient along the error of the solution, and what the residual r left out.
Both are found by `Refined`, because a solver that left r out would leave most of the error out too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.auto import Auto
from torchopt.linear_solve.iterate import safe_norm
from torchopt.linear_solve.operator import BoundOperator, LinearOperator
from torchopt.linear_solve.result import Stats, Status
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["Adjoint", "GradientReport", "Refined"]


class GradientReport(NamedTuple):
    """An estimate of the error of an implicit gradient; 0-dim tensors (batched under vmap).

    Attributes:
        optimality_residual: ‖F(x̂)‖₂ at the solution that the solver returned.
        solution_error: An estimate of ‖x̂ - x‖₂, ‖A⁻¹ F(x̂)‖₂.
        linear_residual: ‖Aᴴ û + x̄‖₂ / ‖x̄‖₂ of the linear system of the gradient.
        iterations: Iterations of its solver; 0 for a direct one.
        status: Its `torchopt.linear_solve.Status`.
        condition: The condition number of A, from the coefficients of the solver; NaN for solvers
            that have none.
        gradient_norm: ‖ĝ‖₂, over all arguments together.
        gradient_error: An estimate of ‖ĝ - g‖₂, g the gradient of the exact root; infinite where
            its linear systems could not be solved.
        error: The estimate of ĝ - g itself, a tuple of trees like the gradients: ĝ - error is
            accurate to second order in ‖x̂ - x‖.
    """

    optimality_residual: Tensor
    solution_error: Tensor
    linear_residual: Tensor
    iterations: Tensor
    status: Tensor
    condition: Tensor
    gradient_norm: Tensor
    gradient_error: Tensor
    error: Any

    @property
    def relative_error(self) -> Tensor:
        """The estimated error divided by the norm of the gradient."""
        return self.gradient_error / self.gradient_norm


@dataclass(frozen=True)
class Refined(Solver):
    """A solver whose result a second one corrects: it is accurate if either of them is.

    Attributes:
        first: A solver that may stop early, or solve another system (a ridge).
        second: Solves for what is left.
    """

    first: Solver
    second: Solver = field(default_factory=lambda: Auto(1e-6, on_fail="ignore"))

    def init(self, operator: BoundOperator, like: Tensor) -> Any:
        """Return A and the states of both."""
        return operator, self.first.init(operator, like), self.second.init(operator, like)

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the corrected solution for one vector b."""
        operator, first, second = state
        start = self.first.compute(first, b, x0).value
        left = b - operator.mv(start)
        # A diverged result is useless.
        useful = safe_norm(left) <= safe_norm(b)
        start = torch.where(useful, start, torch.zeros_like(b))
        found = self.second.compute(second, torch.where(useful, left, b))
        x = start + found.value
        residual = safe_norm(b - operator.mv(x))
        eps = torch.finfo(residual.dtype).eps
        met = residual <= max(1e-5, 1e3 * eps) * safe_norm(b)
        return found._replace(
            value=x,
            residual_norm=residual,
            status=torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITERATIONS)),
        )

    def transpose(self, state: Any) -> Any:
        """Return the state of Aᴴ."""
        operator, first, second = state
        return operator.T, self.first.transpose(first), self.second.transpose(second)


@dataclass(frozen=True)
class Adjoint:
    """The gradient through a root as a function of the root, on vectors.

    Attributes:
        residual: x -> F(x).
        jacobian: x -> ∂F/∂x.
        mixed: (x, u) -> Bᴴ u, the arguments one after the other.
        cotangent: x -> x̄, the gradient of the outer loss with respect to x.
        direct: x -> the gradient of the outer loss with respect to the arguments at a fixed x.
        solve: (A, b) -> (A⁻¹ b, statistics, status); differentiable.
        accurate: The same, by `Refined`.
    """

    residual: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], LinearOperator]
    mixed: Callable[[Tensor, Tensor], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    direct: Callable[[Tensor], Tensor]
    solve: Callable[[LinearOperator, Tensor], tuple[Tensor, Stats, Tensor]]
    accurate: Callable[[LinearOperator, Tensor], tuple[Tensor, Stats, Tensor]]

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient at x, its linear system solved."""
        u = self.accurate(self.jacobian(x).T, -self.cotangent(x))[0]
        return self.direct(x) + self.mixed(x, u)

    def certified(
        self, x: Tensor, unravel: Callable[[Tensor], Any]
    ) -> tuple[Tensor, GradientReport]:
        """Return ĝ and its report.

        Args:
            x: What the solver returned.
            unravel: Turns a vector like ĝ into the trees that the report shows.
        """
        operator = self.jacobian(x)
        adjoint = operator.T
        cotangent = self.cotangent(x)
        u, stats, status = self.solve(adjoint, -cotangent)
        gradient = self.direct(x) + self.mixed(x, u)
        residual = self.residual(x)
        e, _, first = self.accurate(operator, residual)
        left = -cotangent - adjoint.bound().mv(u)
        _, error, *_ = torch.func.jvp(self.gradient, (x,), (e,))
        correction, _, second = self.accurate(adjoint, left)
        error = error - self.mixed(x, correction)
        known = (first == int(Status.CONVERGED)) & (second == int(Status.CONVERGED))
        known = known & error.isfinite().all()
        norm = safe_norm
        size = norm(cotangent)
        linear = torch.where(size > 0, norm(left) / torch.where(size > 0, size, 1), norm(left))
        report = GradientReport(
            optimality_residual=norm(residual),
            solution_error=torch.where(first == int(Status.CONVERGED), norm(e), torch.inf),
            linear_residual=linear,
            iterations=stats.iterations,
            status=status,
            condition=stats.condition,
            gradient_norm=norm(gradient),
            gradient_error=torch.where(known, norm(error), torch.inf),
            error=unravel(torch.where(known, error, torch.inf)),
        )
        return gradient, report
