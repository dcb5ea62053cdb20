# SPDX-License-Identifier: Apache-2.0
"""Gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, norm, quotient
from torchopt.solvers.base import Outcome, false_like, gradient_norm
from torchopt.solvers.kinds import Minimizer, ValueAndGrad
from torchopt.solvers.line_search import Point, line_search

__all__ = ["GradientDescent"]


@dataclass(frozen=True)
class GradientDescent(Minimizer):
    """Gradient descent with a line search or a fixed step.

    The line search starts at the Barzilai-Borwein step (Two-point step size gradient methods, 1988,
    equation 5). `LBFGS` usually needs fewer evaluations.

    The common options are those of `Solver`.

    Attributes:
        lr: The fixed step; None: a line search, which needs no constant of the problem.

    Example:
        >>> import torch
        >>> from torchopt.solvers import GradientDescent
        >>> def loss(x, a):
        ...     return ((x - a) ** 2).sum() + (x**2).sum()
        >>> a = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> GradientDescent()(loss, torch.zeros(2), a).sum().backward()
        >>> a.grad
        tensor([0.5000, 0.5000])
    """

    lr: float | Tensor | None = None

    def minimize(self, value_and_grad: ValueAndGrad, x: Tensor) -> Outcome:
        """Return the minimum of a function of one vector."""
        start = Point(x, *value_and_grad(x))

        def fixed(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, _, gradient, t, stalled = state
            assert self.lr is not None
            x = x - self.lr * gradient
            return x, *value_and_grad(x), t, stalled

        def search(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            *point, t, _ = state
            here = Point(*point)
            found, taken, stalled = line_search(
                value_and_grad, here, -here.gradient, t, check_every=self.asks(x)
            )
            s, y = found.x - here.x, found.gradient - here.gradient
            sy = dot(s, y)
            following = torch.where(sy > 0, quotient(dot(s, s), sy), 2 * taken)
            return *found, torch.where(stalled, t, following), stalled

        first = 1 / torch.clamp(norm(start.gradient), min=1.0)
        state, count = self.repeat(
            search if self.lr is None else fixed,
            lambda s: s[2],
            (*start, first, false_like(x)),
            lambda s: s[4],
        )
        return Outcome(state[0], count, gradient_norm(state[1], state[2]), state[4])
