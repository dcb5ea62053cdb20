# SPDX-License-Identifier: Apache-2.0
"""Three methods of nonlinear least squares, which differ in how they limit Gauss-Newton steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, norm
from torchopt.solvers.base import FlatMap
from torchopt.solvers.least_squares import LeastSquares
from torchopt.solvers.normal_equations import Model

__all__ = ["Dogleg", "GaussNewton", "LevenbergMarquardt"]


def _undamped(model: Model) -> Tensor:
    """Return the Gauss-Newton step; unknowns that J does not depend on hardly move."""
    value = model.here.value
    return model.damped(torch.full_like(value, torch.finfo(value.dtype).eps))


@dataclass(frozen=True)
class GaussNewton(LeastSquares):
    """The Gauss-Newton method: p = -(JᵀWJ)⁻¹ g, halved until f decreases enough.

    It converges quadratically if the residuals vanish at the solution, linearly otherwise. It takes
    the fewest steps close to a solution. Far from one, or where J loses rank, `LevenbergMarquardt`
    is safer.

    The common options are those of `LeastSquares`.

    References:
        Nocedal, Wright, Numerical optimization, 2006, section 10.3, equation 10.23.

        Triggs, McLauchlan, Hartley, Fitzgibbon, Bundle adjustment, a modern synthesis, 2000,
        section 4.3: the weights of robust losses.

    Example:
        >>> import torch
        >>> from torchopt.solvers import GaussNewton
        >>> t = torch.arange(5.0, dtype=torch.float64)
        >>> def misfit(x, y):
        ...     return x["a"] * torch.exp(-x["b"] * t) - y
        >>> start = {"a": torch.ones(()).double(), "b": torch.ones(()).double()}
        >>> found = GaussNewton()(misfit, start, 3 * torch.exp(-0.5 * t))
        >>> print(f"{found['a']:.6f} {found['b']:.6f}")
        3.000000 0.500000
    """

    def first_control(self, model: Model, x: Tensor) -> Tensor:
        """Return 1, the whole step."""
        return torch.ones_like(model.here.value)

    def proposals(self, model: Model) -> FlatMap:
        """Return t -> t p."""
        whole = _undamped(model)
        return lambda t: t * whole

    def after(self, control: Tensor, ratio: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return 1."""
        return torch.ones_like(control)

    def after_failure(self, control: Tensor, count: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return half of the control."""
        return control / 2


@dataclass(frozen=True)
class LevenbergMarquardt(LeastSquares):
    """The Levenberg-Marquardt method: (JᵀWJ + λ D²) p = -g.

    D consists of the largest norms so far of the columns of √W J, so the units of the unknowns do
    not matter. λ is multiplied by max(1/3, 1 - (2 ϱ - 1)³) after a step whose decrease is ϱ times
    the predicted one, and by 2, 4, 8, ... after failed attempts.

    The common options are those of `LeastSquares`.

    Attributes:
        damping: The first λ, relative to D², > 0.

    References:
        Marquardt, An algorithm for least-squares estimation of nonlinear parameters, 1963.

        Moré, The Levenberg-Marquardt algorithm: implementation and theory, 1978, section 6: D.

        Nielsen, Damping parameter in Marquardt's method, 1999, equation 2.4: λ.

        Kanzow, Yamashita, Fukushima, Levenberg-Marquardt methods with strong local convergence
        properties for solving nonlinear equations with convex constraints, 2004: projected steps.

    Example:
        >>> import torch
        >>> from torchopt.solvers import LevenbergMarquardt
        >>> fit = LevenbergMarquardt(loss="huber", scale=0.2, lower=0.0)
        >>> y = torch.tensor([1.0, 1.1, 0.9, 50.0], dtype=torch.float64)
        >>> mean = lambda y: fit(lambda x, y: x - y, torch.zeros(()).double(), y)
        >>> mean(y)  # the outlier pulls as if it were only 0.2 away
        tensor(1.0667, dtype=torch.float64)
        >>> torch.func.jacrev(mean)(y).round(decimals=4)
        tensor([0.3333, 0.3333, 0.3333, 0.0000], dtype=torch.float64)
    """

    damping: float = 1e-3

    attempts: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(f"damping: expected a number > 0, got {self.damping}")

    def first_control(self, model: Model, x: Tensor) -> Tensor:
        """Return the first λ."""
        return torch.full_like(model.here.value, self.damping)

    def proposals(self, model: Model) -> FlatMap:
        """Return λ -> p."""
        return model.damped

    def after(self, control: Tensor, ratio: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return λ after a success."""
        factor = torch.clamp(1 - (2 * ratio - 1) ** 3, min=1 / 3)
        return torch.clamp(control * factor, min=torch.finfo(control.dtype).eps)

    def after_failure(self, control: Tensor, count: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return λ multiplied by 2, 4, 8, ..."""
        return control * 2.0 ** (count + 1)


@dataclass(frozen=True)
class Dogleg(LeastSquares):
    """Powell's dogleg method, with a trust region ‖D p‖ ≤ Δ.

    The step ends where a path leaves the region. The path goes along -D⁻² g to the minimum of the
    model in that direction, and from there to the Gauss-Newton step. A step takes one
    factorisation, however many radii are tried.

    The common options are those of `LeastSquares`.

    References:
        Powell, A hybrid method for nonlinear equations, 1970.

        Nocedal, Wright, Numerical optimization, 2006, equation 4.16; algorithm 4.1: Δ.

    Example:
        >>> import torch
        >>> from torchopt.solvers import Dogleg
        >>> def rosenbrock(x, a):
        ...     return {"valley": 10 * (x[1] - x[0] ** 2), "slope": a - x[0]}
        >>> start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> torch.func.jacrev(lambda a: Dogleg()(rosenbrock, start, a))(a).round(decimals=4)
        tensor([1., 2.], dtype=torch.float64)
    """

    def first_control(self, model: Model, x: Tensor) -> Tensor:
        """Return ‖D x‖ plus the length of the first step along the gradient."""
        return norm(model.units * x) + norm(model.units * model.steepest())

    def proposals(self, model: Model) -> FlatMap:
        """Return Δ -> p."""
        whole, down = _undamped(model), model.steepest()
        along, ahead = model.units * down, model.units * (whole - down)
        length = norm(along)

        def step(radius: Tensor) -> Tensor:
            # ‖along + t ahead‖ = Δ has one root t ≥ 0, computed without cancellation.
            a, b, c = dot(ahead, ahead), dot(along, ahead), dot(along, along) - radius**2
            root = torch.sqrt(torch.clamp(b * b - a * c, min=0))
            low = -c / torch.where(b + root > 0, b + root, 1.0)
            high = (root - b) / torch.where(a > 0, a, 1.0)
            t = torch.clamp(torch.where(b > 0, low, high), 0.0, 1.0)
            beyond = length >= radius
            short = down * (radius / torch.where(beyond, length, 1.0))
            bent = torch.where(beyond, short, down + t * (whole - down))
            return torch.where(norm(model.units * whole) <= radius, whole, bent)

        return step

    def after(self, control: Tensor, ratio: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return Δ after a success, larger if the model was accurate and Δ limited the step."""
        length = norm(model.units * p)
        wider = torch.where(length > 0.9 * control, 2 * control, control)
        return torch.where(ratio > 0.75, wider, torch.where(ratio < 0.25, length / 4, control))

    def after_failure(self, control: Tensor, count: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return a quarter of the length of the step."""
        length = norm(model.units * p)
        return torch.where(length > 0, torch.minimum(length, control), control) / 4
