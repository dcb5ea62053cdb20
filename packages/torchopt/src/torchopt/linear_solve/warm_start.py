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

    As `solve=` of `custom_root` in a loop over outer steps, the adjoint systems of two steps differ
    little, and so do their solutions, so an iterative solver need not compute the first digits
    again. The start changes the iterates, not the solution. Solutions with A and with Aᴴ are kept
    separately, for each number of unknowns. Under `torch.func.vmap` nothing is remembered, and
    every solve starts cold.

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
        """Return the solution for one vector b, starting from the last one unless x0 is given."""
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
        """Forget all solutions, so that the next solve starts cold."""
        self._last.clear()

    @property
    def failure(self) -> OnFail:
        """The `failure` of the inner solver."""
        return self.solver.failure

    @property
    def is_stochastic(self) -> bool:
        """The `is_stochastic` of the inner solver."""
        return self.solver.is_stochastic

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return the system of the inner solver, with a solver that shares the memory."""
        solver, operator, b = self.solver.reformulate(operator, b)
        return WarmStart(solver, self._last), operator, b

    def start(self, layout: Layout) -> Tensor | None:
        """Return the default x0 of the inner solver until a solution is remembered."""
        return None if self._last else self.solver.start(layout)
