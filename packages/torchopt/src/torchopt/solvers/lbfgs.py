# SPDX-License-Identifier: Apache-2.0
"""Limited-memory BFGS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, norm, quotient
from torchopt.solvers.base import Outcome, false_like, gradient_norm
from torchopt.solvers.kinds import Minimizer, ValueAndGrad
from torchopt.solvers.line_search import Point, line_search

__all__ = ["LBFGS"]


@dataclass(frozen=True)
class LBFGS(Minimizer):
    """Limited-memory BFGS with a line search that satisfies the Wolfe conditions.

    It keeps 2 `history` vectors. An update whose curvature is not positive is skipped.

    The common options are those of `Solver`.

    Attributes:
        history: How many pairs of steps and gradient differences are kept, >= 1.

    References:
        D. C. Liu, J. Nocedal, On the Limited Memory BFGS Method for Large Scale Optimization, Math.
        Programming 45, 1989, https://doi.org/10.1007/BF01589116, algorithm 2.1

    Example:
        >>> import torch
        >>> from torchopt.solvers import LBFGS
        >>> def rosenbrock(x, a):
        ...     return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> solve = lambda a: LBFGS()(rosenbrock, torch.zeros(2, dtype=torch.float64), a)
        >>> torch.func.jacrev(solve)(a)  # the minimum is at (a, a^2)
        tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    history: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history: expected at least 1, got {self.history}")

    def minimize(self, value_and_grad: ValueAndGrad, x: Tensor) -> Outcome:
        """Return the minimum of a function of one vector."""
        start = Point(x, *value_and_grad(x))
        none = torch.zeros_like(x).expand(self.history, -1).clone()
        eps = torch.finfo(x.dtype).eps

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            here = Point(*state[:3])
            S, Y, rho, scale = state[3:7]
            direction = -two_loops(here.gradient, S, Y, rho, scale)
            downhill = dot(direction, here.gradient) < 0
            direction = torch.where(downhill, direction, -here.gradient)
            found, _, stalled = line_search(
                value_and_grad, here, direction, torch.ones_like(scale), check_every=self.asks(x)
            )
            s, y = found.x - here.x, found.gradient - here.gradient
            sy = dot(s, y)
            useful = sy > eps * norm(s) * norm(y)

            def push(rows: Tensor, row: Tensor) -> Tensor:
                return torch.where(useful, torch.cat([row[None], rows[:-1]]), rows)

            scale = torch.where(useful, quotient(sy, dot(y, y)), scale)
            inverse = quotient(torch.ones_like(sy), sy)
            return *found, push(S, s), push(Y, y), push(rho, inverse), scale, stalled

        first = 1 / torch.clamp(norm(start.gradient), min=1.0)
        rho = none.sum(1)
        state, count = self.repeat(
            step,
            lambda s: s[2],
            (*start, none, none, rho, first, false_like(x)),
            lambda s: s[7],
        )
        return Outcome(state[0], count, gradient_norm(state[1], state[2]), state[7])


def two_loops(g: Tensor, S: Tensor, Y: Tensor, rho: Tensor, scale: Tensor) -> Tensor:
    """Return H g. The newest pair comes first; rho = 1 / sᵀy, 0 for missing pairs."""
    alphas = []
    q = g
    for s, y, r in zip(S.unbind(), Y.unbind(), rho.unbind()):
        alpha = r * dot(s, q)
        q = q - alpha * y
        alphas.append(alpha)
    q = scale * q
    for s, y, r, alpha in zip(*(x.flip(0).unbind() for x in (S, Y, rho)), reversed(alphas)):
        q = q + (alpha - r * dot(y, q)) * s
    return q
