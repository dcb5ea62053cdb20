# SPDX-License-Identifier: Apache-2.0
"""Bisection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import iterate
from torchopt.linear_solve.operator import Layout
from torchopt.solvers.base import FlatMap, Outcome, RootSolver, SolveStatus

__all__ = ["Bisection"]


@dataclass(frozen=True)
class Bisection(RootSolver):
    """Bisection for every element by itself: F acts element by element, as x³ - a does.

    The bracket is halved in each step, so log₂((upper - lower) / tol) steps are enough. The start
    gives shape and dtype alone. Here `tol` is the distance to the root, not ‖F‖; by default it is
    that of rounding.

    Attributes:
        lower: Below the root, a number or a tensor that broadcasts.
        upper: Above the root. F has another sign there than at `lower`, in every element.

    Example:
        >>> import torch
        >>> from torchopt.solvers import Bisection
        >>> a = torch.tensor([8.0, 27.0], dtype=torch.float64)
        >>> root = lambda a: Bisection(tol=1e-12, upper=10.0)(lambda x, a: x**3 - a, a, a)
        >>> torch.func.jacrev(lambda a: root(a).sum())(a)  # 1 / (3 x^2)
        tensor([0.0833, 0.0370], dtype=torch.float64)
    """

    maxiter: int = 2000
    lower: float | Tensor = 0.0
    upper: float | Tensor = 1.0

    structure: ClassVar[dict[str, Any]] = {"diagonal": True}

    def find(self, residual: FlatMap, layout: Layout, x: Tensor) -> Outcome:
        """Return the roots of a function of one vector."""
        low, high = (self._bound(bound, layout, x) for bound in (self.lower, self.upper))
        sign = torch.sign(residual(low))
        bracketed = (sign * torch.sign(residual(high)) <= 0).all()

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            low, high = state
            middle = low + (high - low) / 2
            value = torch.sign(residual(middle))
            left = value == sign
            return torch.where(left, middle, low), torch.where(left, high, middle)

        def width(state: tuple[Tensor, ...]) -> Tensor:
            """Return the widest bracket; one that rounding cannot halve has none."""
            low, high = state
            size = (high - low).abs()
            least = 4 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
            size = torch.where(size <= least, torch.zeros_like(size), size)
            return torch.cat([size, size.new_zeros(1)]).amax()

        def active(state: tuple[Tensor, ...]) -> Tensor:
            return width(state) > self.tolerance(x)

        state, count = iterate(step, active, (low, high), self.maxiter, self.asks(x))
        low, high = state
        return Outcome(low + (high - low) / 2, count, width(state), ~bracketed)

    def tolerance(self, x: Tensor) -> float:
        """Return `tol`; by default the smallest normal number, for roots at zero."""
        return float(torch.finfo(x.dtype).tiny) if self.tol is None else self.tol

    def _bound(self, bound: float | Tensor, layout: Layout, x: Tensor) -> Tensor:
        leaves = [
            torch.as_tensor(bound, dtype=dtype, device=x.device).expand(shape)
            for shape, dtype in zip(layout.shapes, layout.dtypes)
        ]
        return layout.join(leaves) + torch.zeros_like(x)

    def _status(self, found: Outcome) -> Tensor:
        return torch.where(found.stalled, int(SolveStatus.NO_BRACKET), super()._status(found))
