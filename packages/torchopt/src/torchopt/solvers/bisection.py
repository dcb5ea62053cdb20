# SPDX-License-Identifier: Apache-2.0
"""Bisection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import iterate
from torchopt.linear_solve.layout import Layout
from torchopt.solvers.base import FlatMap, Outcome, SolveStatus
from torchopt.solvers.kinds import RootSolver

__all__ = ["Bisection"]


@dataclass(frozen=True)
class Bisection(RootSolver):
    """Bisection of each element separately, for an F that acts element by element, like x³ - a.

    The bracket is halved in each step, so log₂((upper - lower) / tol) steps are enough. The start
    only gives shape and dtype. Here `tol` is the distance to the root, not ‖F‖; the default is as
    small as rounding allows.

    The common options are those of `Solver`.

    Attributes:
        lower: A lower bound of the root, a number or a tensor that broadcasts to the start.
        upper: An upper bound of the root, likewise. In each element, F must have different signs
            at `lower` and `upper`.

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
        at_low, at_high = residual(low), residual(high)
        sign = torch.sign(at_low)
        bracketed = (sign * torch.sign(at_high) <= 0).all()

        def step(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            low, high, known = state
            middle = low + (high - low) / 2
            value = residual(middle)
            left = torch.sign(value) == sign
            known = known & ~value.isnan().any()
            return torch.where(left, middle, low), torch.where(left, high, middle), known

        def width(state: tuple[Tensor, ...]) -> Tensor:
            """Return the width of the widest bracket; 0 if rounding cannot halve it."""
            low, high, _ = state
            size = (high - low).abs()
            least = 4 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
            size = torch.where(size <= least, torch.zeros_like(size), size)
            return torch.cat([size, size.new_zeros(1)]).amax()

        def active(state: tuple[Tensor, ...]) -> Tensor:
            return (width(state) > self.tolerance(x)) & state[2]

        start = (low, high, ~(at_low.isnan() | at_high.isnan()).any())
        state, count = iterate(step, active, start, self.maxiter, self.asks(x))
        low, high, known = state
        root = low + (high - low) / 2
        size = residual(root).abs()
        known = known & size.isfinite().all()
        # At a pole or a jump the sign changes but F does not become small.
        smaller = (size < torch.maximum(at_low.abs(), at_high.abs())) | (size == 0)
        remaining = torch.where(known, width(state), torch.nan)
        bracketed = bracketed & smaller.all()
        return Outcome(root, count, remaining, ~bracketed)

    def tolerance(self, x: Tensor) -> float:
        """Return `tol`; by default the smallest normal number, for roots at zero."""
        return float(torch.finfo(x.dtype).tiny) if self.tol is None else self.tol

    def _bound(self, bound: float | Tensor, layout: Layout, x: Tensor) -> Tensor:
        if isinstance(bound, Tensor):
            for shape in layout.shapes:
                if not _broadcasts(bound.shape, shape):
                    raise ValueError(
                        f"Bisection: lower, upper: expected numbers, or tensors that broadcast to "
                        f"the shape {tuple(shape)} of the start, got {tuple(bound.shape)}"
                    )
        leaves = [
            torch.as_tensor(bound, dtype=dtype, device=x.device).expand(shape)
            for shape, dtype in zip(layout.shapes, layout.dtypes)
        ]
        return layout.join(leaves) + torch.zeros_like(x)

    def _status(self, found: Outcome) -> Tensor:
        status = super()._status(found)
        told = found.stalled & (status != int(SolveStatus.NON_FINITE))
        return torch.where(told, int(SolveStatus.NO_BRACKET), status)


def _broadcasts(given: torch.Size, shape: torch.Size) -> bool:
    pairs = zip(reversed(given), reversed(shape))
    return len(given) <= len(shape) and all(a in (1, b) for a, b in pairs)
