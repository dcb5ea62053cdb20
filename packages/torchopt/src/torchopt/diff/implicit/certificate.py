# SPDX-License-Identifier: Apache-2.0
"""An estimate of the error of an implicit gradient.

A solver returns x̂, which is not exactly the root x, and the linear system is solved up to a
residual r. With A = ∂F/∂x and B = ∂F/∂θ at x̂, and the cotangent x̄ of x, the returned gradient is

    ĝ = direct + Bᴴ û   where   Aᴴ û = -x̄ - r .

To first order x̂ - x = e = A⁻¹ F(x̂), so

    ĝ - g  ≈  D ĝ(x̂)[e]  -  Bᴴ A⁻ᴴ r :

the derivative of the gradient along the error of the solution, and the contribution of the residual
r. Both are computed by `Refined`, because the solver that left r would miss most of this error too.
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
        solution_error: ‖A⁻¹ F(x̂)‖₂, an estimate of ‖x̂ - x‖₂.
        linear_residual: ‖Aᴴ û + x̄‖₂ / ‖x̄‖₂ of the linear system of the gradient.
        iterations: The iterations of the solver of that system; 0 for a direct solver.
        status: The `torchopt.linear_solve.Status` of that solver.
        condition: An estimate of the condition number of A, from the coefficients of the solver;
            NaN for solvers that have none.
        gradient_norm: ‖ĝ‖₂, over all arguments together.
        gradient_error: An estimate of ‖ĝ - g‖₂, where g is the gradient at the exact root; infinite
            if the linear systems of the estimate could not be solved.
        error: The estimate of ĝ - g itself, a tuple of trees like the gradients: ĝ - error is
            accurate to second order in ‖x̂ - x‖.

    Example:
        >>> import torch
        >>> from torchopt.diff.implicit import custom_root
        >>> reports = []
        >>> @custom_root(lambda x, a: x**2 - a, argnums=1, report=reports.append)
        ... def square_root(x, a):
        ...     return 0.5 * (x + a / x)  # one step of Newton
        >>> a = torch.tensor(2.0, requires_grad=True)
        >>> square_root(torch.tensor(1.5), a).backward()
        >>> reports[0].optimality_residual, reports[0].solution_error
        (tensor(0.0069), tensor(0.0025))
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
    """A solver whose result is corrected by a second one; it is accurate if either of them is.

    Attributes:
        first: A solver that may stop early, or solve a modified system (such as one with a ridge).
        second: The solver for the residual of the first.
    """

    first: Solver
    second: Solver = field(default_factory=lambda: Auto(1e-6, on_fail="ignore"))

    def init(self, operator: BoundOperator, like: Tensor) -> Any:
        """Return A and the states of both solvers."""
        return operator, self.first.init(operator, like), self.second.init(operator, like)

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the corrected solution for one vector b."""
        operator, first, second = state
        start = self.first.compute(first, b, x0).value
        left = b - operator.mv(start)
        # A diverged result is dropped.
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
        mixed: (x, u) -> Bᴴ u, for all arguments as one vector.
        cotangent: x -> x̄, the gradient of the outer loss with respect to x.
        direct: x -> the gradient of the outer loss with respect to the arguments at a fixed x.
        solve: (A, b) -> (A⁻¹ b, statistics, status); differentiable.
        accurate: The same with the solver `Refined`.
    """

    residual: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], LinearOperator]
    mixed: Callable[[Tensor, Tensor], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    direct: Callable[[Tensor], Tensor]
    solve: Callable[[LinearOperator, Tensor], tuple[Tensor, Stats, Tensor]]
    accurate: Callable[[LinearOperator, Tensor], tuple[Tensor, Stats, Tensor]]

    def gradient(self, x: Tensor) -> Tensor:
        """Return the gradient at x, with an accurate solution of its linear system."""
        u = self.accurate(self.jacobian(x).T, -self.cotangent(x))[0]
        return self.direct(x) + self.mixed(x, u)

    def certified(
        self, x: Tensor, unravel: Callable[[Tensor], Any]
    ) -> tuple[Tensor, GradientReport]:
        """Return ĝ and its report.

        Args:
            x: The result x̂ of the solver.
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
