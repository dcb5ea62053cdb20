# SPDX-License-Identifier: Apache-2.0
"""Use any function of (matvec, b) as a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.dense import direct_result
from torchopt.linear_solve.iterate import safe_norm
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.shown import shown

__all__ = ["CallableSolver", "as_solver"]


@dataclass(frozen=True)
class CallableSolver(Solver):
    """A function `solve(matvec, b) -> x` on trees, whose result is accepted as the solution.

    Attributes:
        function: The function. It decides itself which accuracy is sufficient; only NaN and
            infinity are reported.
    """

    function: Callable[[Callable[[Any], Any], Any], Any]

    def init(self, operator: BoundOperator, like: Tensor) -> BoundOperator:
        """Return the operator."""
        return operator

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the result of the function."""
        layout = state.layout

        def matvec(tree: Any) -> Any:
            return layout.unravel(state.mv(layout.ravel(tree, "matvec: argument")))

        x = layout.ravel(self.function(matvec, layout.unravel(b)), "solve(matvec, b): result")
        residual = safe_norm(b - state.mv(x))
        return direct_result(x, residual, torch.zeros_like(residual, dtype=torch.bool))

    def transpose(self, state: Any) -> BoundOperator:
        """Return Aᴴ."""
        transposed: BoundOperator = state.T
        return transposed


def as_solver(solve: Callable[[Callable[[Any], Any], Any], Any]) -> Solver:
    """Return `solve` if it is a `Solver`, else a solver that calls it.

    Raises:
        TypeError: `solve` is not callable, or is a class.
    """
    if isinstance(solve, Solver):
        return solve
    if isinstance(solve, type):
        name = solve.__name__
        raise TypeError(f"solve: expected a solver, got the class {name}; call it: {name}()")
    if not callable(solve):
        raise TypeError(
            f"solve: expected a solver or a function of (matvec, b), got {shown(solve)}; pass one "
            "of torchopt.linear_solve, such as CG()"
        )
    return CallableSolver(solve)
