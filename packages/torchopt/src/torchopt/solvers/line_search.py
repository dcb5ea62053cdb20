# SPDX-License-Identifier: Apache-2.0
"""A line search by bisection for a step that satisfies the Wolfe conditions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, iterate
from torchopt.solvers.kinds import ValueAndGrad

__all__ = ["Point", "line_search"]


class Point(NamedTuple):
    """A point of a minimization.

    Attributes:
        x: The vector.
        value: f(x).
        gradient: ∇f(x).
    """

    x: Tensor
    value: Tensor
    gradient: Tensor


def line_search(
    value_and_grad: ValueAndGrad,
    start: Point,
    direction: Tensor,
    first: Tensor,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_steps: int = 40,
    check_every: int = 1,
) -> tuple[Point, Tensor, Tensor]:
    """Return a point x + t d with f(x + t d) ≤ f(x) + c1 t m and f'(x + t d) ≥ c2 m, m = ∇f(x)ᵀ d.

    t is doubled until it is bracketed, then the bracket is halved (Lewis, Overton, Nonsmooth
    optimization via quasi-Newton methods, 2013, algorithm 2.6). Close to the minimum, where values
    differ only by rounding, the first condition is replaced by one for the slopes,
    (2 c1 - 1) m ≥ f'(x + t d) (Hager, Zhang, A new conjugate gradient method, 2005, equation 4.1).

    Returns:
        The point, t, and whether no better point was found; then the point is the start.
    """
    slope = dot(start.gradient, direction)
    eps = torch.finfo(start.x.dtype).eps
    floor = start.value + 10 * eps * start.value.abs()
    zero = torch.zeros_like(first)

    def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        t, low, high, *_ = state
        x = start.x + t * direction
        value, gradient = value_and_grad(x)
        along = dot(gradient, direction)
        decreased = value <= start.value + c1 * t * slope
        flat = (value <= floor) & (along <= (2 * c1 - 1) * slope)
        enough = decreased | flat
        done = enough & (along >= c2 * slope)
        high = torch.where(enough, high, t)
        low = torch.where(enough & ~done, t, low)
        following = torch.where(high.isfinite(), (low + high) / 2, 2 * t)
        return torch.where(done, t, following), low, high, x, value, gradient, done, t

    state: tuple[Tensor, ...] = (first, zero, zero + torch.inf, *start, slope != slope, zero)
    state, _ = iterate(step, lambda s: ~s[6], state, max_steps, check_every)
    *_, x, value, gradient, done, t = state[3:]
    better = done | (value < start.value)
    point = Point(*(torch.where(better, new, old) for new, old in zip((x, value, gradient), start)))
    return point, torch.where(better, t, zero), ~better
