# SPDX-License-Identifier: Apache-2.0
"""Solves that start from the last solution."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import BoundOperator, LinearOperator
from torchopt.linear_solve.result import OnFail
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.torch_internals import is_wrapped

__all__ = ["WarmStart"]


@dataclass(frozen=True)
class WarmStart(Solver):
    """A solver that remembers its last solution and starts the next solve from it.

    In a loop over outer steps, as `solve=` of `custom_root`, the adjoint systems of two steps
    differ little, and so do their solutions: an iterative solver saves the first digits. It changes
    the path, not the answer. Solutions of A and of Aᴴ are kept apart, by the number of unknowns.
    Nothing is remembered, and every solve starts cold, under `torch.func.vmap`.

    Attributes:
        solver: The iterative solver.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, WarmStart, linear_solve
        >>> solver = WarmStart(CG(1e-6))
        >>> A = torch.diag(torch.arange(1.0, 9.0))
        >>> [int(linear_solve(A, torch.ones(8), solver).stats.iterations) for _ in range(2)]
        [8, 0]
    """

    solver: Solver
    _last: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def init(self, operator: BoundOperator, like: Tensor) -> tuple[Any, bool]:
        """Return the state of the solver, and whether it is that of Aᴴ."""
        return self.solver.init(operator, like), operator.adjoint

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b, from the last one unless x0 is given."""
        inner, adjoint = state
        key = (adjoint, b.shape, b.dtype, b.device)
        remember = not is_wrapped(b)
        if x0 is None and remember:
            x0 = self._last.get(key)
        found = self.solver.compute(inner, b, x0)
        value = found.value.detach()
        if remember and not is_wrapped(value):
            if bool(value.isfinite().all()):
                self._last[key] = value.clone()
            else:
                self._last.pop(key, None)
        return found

    def transpose(self, state: Any) -> Any:
        """Return the state of Aᴴ."""
        inner, adjoint = state
        return self.solver.transpose(inner), not adjoint

    def forget(self) -> None:
        """Start the next solve cold."""
        self._last.clear()

    @property
    def failure(self) -> OnFail:
        """That of the solver."""
        return self.solver.failure

    @property
    def is_stochastic(self) -> bool:
        """That of the solver."""
        return self.solver.is_stochastic

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return the result of the solver, and keep the memory."""
        solver, operator, b = self.solver.reformulate(operator, b)
        return WarmStart(solver, self._last), operator, b

    def start(self, layout: Layout) -> Tensor | None:
        """Return the default x0 of the solver before anything is remembered."""
        return None if self._last else self.solver.start(layout)
