# SPDX-License-Identifier: Apache-2.0
"""The loop of nonlinear least squares, with several attempts at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchopt.linear_solve.cg import CG
from torchopt.linear_solve.iterate import iterate, norm
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.solver import Solver as LinearSolver
from torchopt.solvers.base import FlatMap, Outcome, false_like, gradient_norm
from torchopt.solvers.normal_equations import (
    Model,
    dense_model,
    linearized,
    matrix_free_model,
)
from torchopt.solvers.objective import objective_value

if TYPE_CHECKING:
    from torchopt.solvers.least_squares import LeastSquares

__all__ = ["Loop"]

#: The largest number of unknowns for which the Jacobian is formed by default.
DENSE_LIMIT = 256
#: A step is taken if f decreases by at least this part of the predicted decrease.
ENOUGH = 1e-4
#: If the predicted decrease is below this multiple of the rounding of f, gradients are compared.
FLAT = 1e4
#: A minimum is found up to rounding if the predicted decrease is below this multiple of it.
ROUNDING = 100.0


@dataclass(frozen=True)
class Loop:
    """A problem on vectors, and the loop that solves it.

    Attributes:
        solver: The method.
        residual: The map x -> r.
        scale: C.
        layout: The layout of x.
        blocks: The number of blocks, or None.
        lower: The lower bounds, or None if there are no bounds.
        upper: The upper bounds, likewise.
    """

    solver: LeastSquares
    residual: FlatMap
    scale: Tensor
    layout: Layout
    blocks: int | None
    lower: Tensor | None
    upper: Tensor | None

    def within(self, x: Tensor) -> Tensor:
        """Return the nearest point within the bounds; NaN stays."""
        if self.lower is None or self.upper is None:
            return x
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def gradient_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∇f and f."""

        def value(x: Tensor) -> Tensor:
            z = (self.residual(x) / self.scale) ** 2
            return objective_value((self.solver.rho(z) * self.scale**2).sum() / 2)

        found: tuple[Tensor, Tensor] = torch.func.grad_and_value(value)(x)
        return found

    def free_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return ∇f without the components that active bounds compensate."""
        if self.lower is None or self.upper is None:
            return gradient
        held = ((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0))
        return torch.where(held, 0.0, gradient)

    def model(self, x: Tensor, units: Tensor) -> Model:
        """Return the quadratic model at x."""
        here = linearized(self.residual, self.solver.rho, self.scale, x)

        def pin(units: Tensor) -> Tensor:
            """Return which unknowns would leave the bounds by the diagonal step -D⁻² g."""
            ahead = x - here.gradient / units**2
            return self.within(ahead) != ahead

        solver = self.solver.step_solver
        n = x.shape[0]
        if solver is None:
            solver = "dense" if n <= DENSE_LIMIT else CG(rtol=1e-3, on_fail="ignore")
        if isinstance(solver, LinearSolver):
            return matrix_free_model(here, solver, self.layout, units, pin)
        return dense_model(here, self._order(x), units, pin)

    def _order(self, x: Tensor) -> Tensor:
        """Return the positions of the unknowns of each block, [blocks, k]."""
        places = torch.arange(x.shape[0], device=x.device)
        if self.blocks is None:
            return places[None]
        parts = places.split(self.layout.sizes)
        return torch.cat([part.reshape(self.blocks, -1) for part in parts], dim=1)

    def minimum(self, x: Tensor) -> Outcome:
        """Return the minimum, starting from x."""
        solver = self.solver
        gradient, value = self.gradient_and_value(x)
        # Units of 0 and a control of -1 mean that they are not known yet.
        start = (x, value, gradient, torch.zeros_like(x), -torch.ones_like(value), false_like(x))

        def residual(state: tuple[Tensor, ...]) -> Tensor:
            x, value, gradient, *_ = state
            free = self.free_gradient(x, gradient)
            return torch.where(value.isfinite(), free, torch.nan)

        state, count = solver.repeat(self._step, residual, start, lambda s: s[5])
        x, value, gradient, units, _, stalled = state
        size = gradient_norm(value, self.free_gradient(x, gradient))
        if not x.numel():
            return Outcome(x, count, size, stalled)
        with torch.no_grad():
            solved = stalled & self._is_rounding(x, units)
        return Outcome(x, count, size, stalled, solved)

    def _step(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the state after one step, found in several attempts."""
        x, value, gradient, units, control, _ = state
        solver, eps = self.solver, torch.finfo(x.dtype).eps
        model = self.model(x, units)
        propose = solver.proposals(model)
        control = torch.where(control < 0, solver.first_control(model, x), control)

        steepness = norm(self.free_gradient(x, gradient) / model.units)

        def attempt(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            control, count, *_ = state
            ahead = self.within(x + propose(control))
            p = ahead - x
            promise = model.decrease(p)
            slope, there = self.gradient_and_value(ahead)
            ratio = (value - there) / torch.where(promise > 0, promise, 1.0)
            fell = (promise > 0) & (ratio > ENOUGH)
            noise = FLAT * eps * value
            flat = (promise > 0) & (promise <= noise) & (there <= value + noise)
            flatter = norm(self.free_gradient(ahead, slope) / model.units) < steepness
            better = fell | (flat & flatter)
            following = torch.where(
                better,
                solver.after(control, torch.where(fell, ratio, 1.0), p, model),
                solver.after_failure(control, count, p, model),
            )
            return following, count + 1, ahead, there, slope, better

        first = (control, torch.zeros_like(value), x, value, gradient, false_like(x))
        found, _ = iterate(attempt, lambda s: ~s[5], first, solver.attempts, solver.asks(x))
        control, _, *new, better = found
        kept = (torch.where(better, a, b) for a, b in zip(new, (x, value, gradient)))
        return *kept, model.units, control, ~better

    def _is_rounding(self, x: Tensor, units: Tensor) -> Tensor:
        """Return whether the step without damping is as small as rounding of f or of x."""
        model = self.model(x, units)
        eps = torch.finfo(x.dtype).eps
        p = self.within(x + model.damped(torch.full_like(model.here.value, eps))) - x
        small = model.decrease(p) <= ROUNDING * eps * model.here.value
        return small | (norm(model.units * p) <= ROUNDING * eps * norm(model.units * x))
