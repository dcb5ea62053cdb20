# SPDX-License-Identifier: Apache-2.0
"""Newton's method for minima, with conjugate gradients, and for roots, with a linear solver."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import ClassVar

import torch
from torch import Tensor

from torchopt.linear_solve.auto import Auto
from torchopt.linear_solve.iterate import dot, iterate, norm, quotient
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import BoundOperator, transpose_linear
from torchopt.linear_solve.solver import Solver as LinearSolver
from torchopt.linear_solve.solver import solve_once
from torchopt.solvers.base import FlatMap, Outcome, false_like, gradient_norm
from torchopt.solvers.kinds import Minimizer, RootSolver, ValueAndGrad
from torchopt.solvers.line_search import Point, line_search

__all__ = ["Newton", "NewtonCG"]


@dataclass(frozen=True)
class NewtonCG(Minimizer):
    """Newton's method with a line search, and directions by conjugate gradients.

    The conjugate gradients use Hessian-vector products. They stop at
    ‖H d + g‖ ≤ min(1/2, √‖g‖) ‖g‖, which makes the convergence superlinear, or when they find that
    the Hessian is not positive definite.

    The common options are those of `Solver`.

    Attributes:
        max_products: The largest number of Hessian-vector products for a direction; None: the
            number of unknowns, but at least 10.

    References:
        J. Nocedal, S. J. Wright, Numerical Optimization, 2nd edition, 2006, algorithm 7.1

    Example:
        >>> import torch
        >>> from torchopt.solvers import NewtonCG
        >>> a = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> NewtonCG()(lambda x, a: ((x - a) ** 4).sum() + (x**2).sum(), torch.zeros_like(a), a)
        tensor([0.4102, 1.1649], dtype=torch.float64)
    """

    differentiates: ClassVar[bool] = True
    max_products: int | None = None

    def minimize(self, value_and_grad: ValueAndGrad, x: Tensor) -> Outcome:
        """Return the minimum of a function of one vector."""
        start = Point(x, *value_and_grad(x))
        most = max(10, x.numel()) if self.max_products is None else self.max_products
        one = torch.ones_like(start.value)

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            here = Point(*state[:3])
            _, pull, *_ = torch.func.vjp(lambda x: value_and_grad(x)[1], here.x)
            direction = self._direction(lambda v: pull(v)[0], here.gradient, most)
            found, _, stalled = line_search(
                value_and_grad, here, direction, one, check_every=self.asks(x)
            )
            return *found, stalled

        state, count = self.repeat(step, lambda s: s[2], (*start, false_like(x)), lambda s: s[3])
        return Outcome(state[0], count, gradient_norm(state[1], state[2]), state[3])

    def _direction(self, product: FlatMap, g: Tensor, most: int) -> Tensor:
        """Return d with H d ≈ -g and gᵀ d < 0."""
        size = norm(g)
        target = torch.clamp(torch.sqrt(size), max=0.5) * size

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            d, r, p, gamma, _ = state
            Hp = product(p)
            curvature = dot(p, Hp)
            concave = curvature <= 0
            alpha = torch.where(concave, torch.zeros_like(gamma), quotient(gamma, curvature))
            d, r = d + alpha * p, r - alpha * Hp
            new_gamma = dot(r, r)
            return d, r, r + quotient(new_gamma, gamma) * p, new_gamma, concave

        start = (torch.zeros_like(g), -g, -g, dot(g, g), false_like(g))
        state, _ = iterate(step, lambda s: (norm(s[1]) > target) & ~s[4], start, most, self.asks(g))
        d = state[0]
        # d is zero if the very first curvature is negative; then use the gradient.
        return torch.where(dot(d, g) < 0, d, -g)


@dataclass(frozen=True)
class Newton(RootSolver):
    """Newton's method for roots, x ← x - (∂F/∂x)⁻¹ F(x).

    It converges quadratically close to a regular root. There is no line search, so from a distant
    start it may diverge, which is reported.

    The common options are those of `Solver`.

    Attributes:
        step_solver: The solver of the linear systems of the steps.

    Example:
        >>> import torch
        >>> from torchopt.solvers import Newton
        >>> a = torch.tensor([8.0, 27.0], dtype=torch.float64)
        >>> cube_root = lambda a: Newton(tol=1e-12)(lambda x, a: x**3 - a, torch.ones_like(a), a)
        >>> torch.func.jacrev(lambda a: cube_root(a).sum())(a)  # 1 / (3 x^2)
        tensor([0.0833, 0.0370], dtype=torch.float64)
    """

    differentiates: ClassVar[bool] = True
    step_solver: LinearSolver = dataclass_field(default_factory=lambda: Auto(1e-10))

    def find(self, residual: FlatMap, layout: Layout, x: Tensor) -> Outcome:
        """Return the root of a function of one vector."""

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, value = state
            _, pull, *_ = torch.func.vjp(residual, x)

            def rmv(v: Tensor) -> Tensor:
                return pull(v)[0]  # type: ignore[no-any-return]

            operator = BoundOperator(transpose_linear(rmv, x), rmv, layout.pairs)
            change = solve_once(self.step_solver, operator, value)
            return x - change, residual(x - change)

        state, count = self.repeat(step, lambda s: s[1], (x, residual(x)))
        return Outcome(state[0], count, norm(state[1]), false_like(x))
