# SPDX-License-Identifier: Apache-2.0
"""The kinds of problems that solvers solve: a minimum, a fixed point, a root."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.diff.implicit.equation import displacement
from torchopt.linear_solve.layout import Layout
from torchopt.solvers.base import FlatMap, Function, Outcome, Solver
from torchopt.solvers.objective import objective_value, tree_grad

__all__ = ["FixedPointSolver", "Minimizer", "RootSolver"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Minimizer(Solver):
    """A solver of min f(x, *args) for a smooth f with a 0-dim value.

    Its optimality function is F = ∇f, whose Jacobian is symmetric.
    """

    structure: ClassVar[dict[str, Any]] = {"symmetric": True}

    def optimality(self, function: Function) -> Function:
        """Return ∇f."""
        return tree_grad(function)

    @abstractmethod
    def minimize(self, value_and_grad: ValueAndGrad, x: Tensor) -> Outcome:
        """Return the minimum of a function of one vector."""

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the minimum for one vector."""
        differentiate = torch.func.grad_and_value(
            lambda x: objective_value(function(layout.unravel(x)))
        )

        def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = differentiate(x)
            return value, gradient

        return self.minimize(value_and_grad, x)


@dataclass(frozen=True)
class FixedPointSolver(Solver):
    """A solver of x = T(x, *args), where T(x) is a tree like x; F = T(x) - x."""

    def optimality(self, function: Function) -> Function:
        """Return T - x."""
        return lambda x, *args: displacement(function(x, *args), x)

    @abstractmethod
    def iterate(self, step: FlatMap, x: Tensor) -> Outcome:
        """Return the fixed point of a function of one vector."""

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the fixed point for one vector."""
        what = f"{type(self).__name__}: value of the function"
        return self.iterate(
            lambda x: layout.ravel(function(layout.unravel(x)), what).to(x.dtype), x
        )


@dataclass(frozen=True)
class RootSolver(Solver):
    """A solver of F(x, *args) = 0, where F(x) is a tree like x."""

    def optimality(self, function: Function) -> Function:
        """Return F."""
        return function

    @abstractmethod
    def find(self, residual: FlatMap, layout: Layout, x: Tensor) -> Outcome:
        """Return the root of a function of one vector."""

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the root for one vector."""
        what = f"{type(self).__name__}: value of the function"
        return self.find(
            lambda x: layout.ravel(function(layout.unravel(x)), what).to(x.dtype), layout, x
        )
