# SPDX-License-Identifier: Apache-2.0
"""Accelerated proximal and projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.implicit.equation import displacement
from torchopt.linear_solve.iterate import dot, iterate, norm
from torchopt.linear_solve.layout import Layout
from torchopt.precision import present_autocast
from torchopt.shown import shown
from torchopt.solvers.base import (
    Function,
    Outcome,
    Solver,
    SolveResult,
    false_like,
    gradient_norm,
)
from torchopt.solvers.objective import objective_value, tree_grad
from torchopt.tree import tree_map

__all__ = ["ProjectedGradient", "ProximalGradient"]


@dataclass(frozen=True)
class _CompositeSolver(Solver):
    """A solver of min f(x, *args) + penalty(x, *args) by the prox of the penalty.

    The solution is the fixed point of T(x) = prox(x - s ∇f(x), s) for any step s > 0; this equation
    is differentiated.
    """

    lr: float | Tensor | None = None

    def proximal(self, x: Any, step: Any, args: tuple[Any, ...]) -> Any:
        """Return the prox of step times the penalty."""
        raise NotImplementedError

    def optimality(self, function: Function) -> Function:
        """Return T(x) - x."""
        step = 1.0 if self.lr is None else self.lr
        if isinstance(step, Tensor):
            step = step.detach()  # the fixed point does not depend on it

        def residual(x: Any, *args: Any) -> Any:
            gradient = tree_grad(function)(x, *args)
            moved = tree_map(lambda x, g: x - step * g, x, gradient)
            return displacement(self.proximal(moved, step, args), x)

        return residual

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Unused; the loop is that of `_Bound`."""
        raise NotImplementedError

    def _run(
        self, function: Function, start: Any, args: tuple[Any, ...], keep_graph: bool
    ) -> SolveResult:
        """Return the solution from the loop of `_Bound`, which passes the arguments to the prox."""
        bound = _Bound(
            **{name: getattr(self, name) for name in ("tol", "maxiter", "check_every", "on_fail")},
            solver=self,
            prox=present_autocast()(lambda x, step: self.proximal(x, step, args)),
        )
        return bound._run(lambda x: function(x, *args), start, (), keep_graph)


@dataclass(frozen=True)
class _Bound(Solver):
    """A composite solver with its arguments filled in: FISTA with backtracking and restarts."""

    solver: _CompositeSolver | None = None
    prox: Callable[[Any, Any], Any] | None = None

    def optimality(self, function: Function) -> Function:
        """Unused; the composite solver computes derivatives."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.solver)

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the solution for one vector."""
        solver, proximal = self.solver, self.prox
        assert solver is not None
        assert proximal is not None
        differentiate = torch.func.grad_and_value(
            lambda x: objective_value(function(layout.unravel(x)))
        )
        eps = torch.finfo(x.dtype).eps

        def prox(v: Tensor, s: Tensor) -> Tensor:
            return layout.ravel(
                proximal(layout.unravel(v), s),
                f"{type(solver).__name__}: value of the prox",
            )

        def shorter(y: Tensor, value: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            """Return z = prox(y - s g, s) with f(z) below its quadratic model, and s."""
            if solver.lr is not None:
                return prox(y - s * g, s), s

            def attempt(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                _, s, _ = state
                z = prox(y - s * g, s)
                d = z - y
                slope, found = differentiate(z)
                model = value + dot(g, d) + dot(d, d) / (2 * s)
                # If rounding of the values hides the quadratic term, slopes are compared instead.
                close = dot(d, d) / s <= 1e4 * eps * value.abs()
                noise = 10 * eps * norm(g) * norm(d)
                flat = dot(slope - g, d) <= dot(d, d) / s + noise
                # A value that is not finite admits no step.
                done = (found <= model) | (close & flat) | ~value.isfinite()
                return z, torch.where(done, s, s / 2), done

            state = (y, s, false_like(y))
            (z, s, _), _ = iterate(attempt, lambda s: ~s[2], state, 60, self.asks(y))
            return z, s

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, _, y, t, s = state
            g, value = differentiate(y)
            z, s = shorter(y, value, g, s)
            mapping = (y - z) / s
            t_new = (1 + torch.sqrt(1 + 4 * t * t)) / 2
            # Momentum that points uphill is restarted (O'Donoghue, Candès, Adaptive restart for
            # accelerated gradient schemes, 2015, section 3.2).
            uphill = dot(y - z, z - x) > 0
            momentum = torch.where(uphill, torch.zeros_like(t), (t - 1) / t_new)
            t_new = torch.where(uphill, torch.ones_like(t), t_new)
            return z, mapping, z + momentum * (z - x), t_new, s

        one = torch.ones_like(x.sum())
        first = one if solver.lr is None else solver.lr * one
        start = (x, torch.full_like(x, torch.finfo(x.dtype).max ** 0.25), x, one, first)
        state, count = self.repeat(step, lambda s: s[1], start)
        size = gradient_norm(function(layout.unravel(state[0])), state[1])
        return Outcome(state[0], count, size, false_like(x))


@dataclass(frozen=True)
class ProximalGradient(_CompositeSolver):
    """Accelerated proximal gradient descent for f(x, *args) + penalty(x, *args) with smooth f.

    Call it with f, as in `ProximalGradient(prox=prox)(f, start, *args)`. It iterates
    x ← prox(y - s ∇f(y), s), where y extrapolates the last two points.

    The common options are those of `Solver`.

    Attributes:
        lr: A fixed step s, below 2 / L for the Lipschitz constant L of ∇f; None: backtracking.
        prox: A function of (v, step, *args) that returns the prox of step times the penalty, a tree
            like v. It gets all arguments of the problem, so that each can be differentiated.

    References:
        Beck, Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009.

    Example:
        >>> import torch
        >>> from torchopt.solvers import ProximalGradient, prox_l1
        >>> lasso = ProximalGradient(prox=lambda v, step, lam: prox_l1(v, step * lam))
        >>> def fit(w, lam):
        ...     return 0.5 * ((w - torch.tensor([3.0, 0.5])) ** 2).sum()
        >>> lam = torch.tensor(1.0)
        >>> torch.func.jacrev(lambda lam: lasso(fit, torch.zeros(2), lam))(lam)
        tensor([-1.,  0.])
    """

    prox: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.prox):
            raise TypeError(
                f"prox: expected a function of (v, step, *args), got {shown(self.prox)}"
            )

    def proximal(self, x: Any, step: Any, args: tuple[Any, ...]) -> Any:
        """Return the prox of step times the penalty."""
        assert self.prox is not None
        return self.prox(x, step, *args)


@dataclass(frozen=True)
class ProjectedGradient(_CompositeSolver):
    """Accelerated projected gradient descent for f(x, *args) on a convex set.

    The common options are those of `Solver`.

    Attributes:
        lr: A fixed step, below 2 / L for the Lipschitz constant L of ∇f; None: backtracking.
        projection: A function of (v, *args) that returns the nearest point of the set, a tree like
            v. It gets all arguments of the problem, so that each can be differentiated.

    Example:
        >>> import torch
        >>> from torchopt.solvers import ProjectedGradient, project_simplex
        >>> solver = ProjectedGradient(projection=lambda v, a: project_simplex(v))
        >>> a = torch.tensor([0.5, 1.0, -1.0])
        >>> solver(lambda x, a: ((x - a) ** 2).sum(), torch.zeros(3), a)
        tensor([0.2500, 0.7500, 0.0000])
    """

    projection: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.projection):
            raise TypeError(
                f"projection: expected a function of (v, *args), got {shown(self.projection)}"
            )

    def proximal(self, x: Any, step: Any, args: tuple[Any, ...]) -> Any:
        """Return the projection, which does not depend on the step."""
        assert self.projection is not None
        return self.projection(x, *args)
