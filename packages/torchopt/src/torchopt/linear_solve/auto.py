# SPDX-License-Identifier: Apache-2.0
"""Choose a solver by the known properties of the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.linear_solve.cg import CG
from torchopt.linear_solve.dense import LU, Cholesky, DenseSolver, Diagonal, Triangular
from torchopt.linear_solve.iterate import IterativeSolver
from torchopt.linear_solve.lsmr import LSMR
from torchopt.linear_solve.minres import MINRES
from torchopt.linear_solve.operator import BoundOperator, LinearOperator, Tag
from torchopt.linear_solve.result import OnFail
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto(Solver):
    """A solver that is chosen by the tags and the size of the operator.

    | operator | n ≤ `dense_limit` | larger |
    |---|---|---|
    | diagonal | `Diagonal` | `Diagonal` |
    | triangular | `Triangular` | `LSMR` |
    | positive definite | `Cholesky` | `CG` |
    | symmetric | `LU` | `MINRES` |
    | any other | `LU` | `LSMR` |

    Attributes:
        rtol: Relative tolerance of the iterative solvers, >= 0.
        maxiter: The largest number of iterations of the iterative solvers; None: ten times the
            number of unknowns.
        dense_limit: The largest number of unknowns for which the matrix is formed, by one product
            for each unknown.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".
        estimate_condition: Whether to compute `Stats.condition`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import Auto, linear_solve
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
        >>> linear_solve(A, torch.tensor([3.0, 4.0]), Auto()).value
        tensor([1., 1.])
    """

    rtol: float = 1e-5
    maxiter: int | None = None
    dense_limit: int = 64
    on_fail: OnFail = "raise"
    estimate_condition: bool = False

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return the system of one triangle if the chosen solver reads only that triangle."""
        if isinstance(self.choose(operator), Triangular):
            operator = operator.triangle()
        return self, operator, b

    def choose(self, operator: BoundOperator | LinearOperator) -> Solver:
        """Return the solver for this operator."""
        tags = operator.tags
        report = self.estimate_condition
        if Tag.DIAGONAL in tags:
            return Diagonal(estimate_condition=report)
        if operator.layout.size <= self.dense_limit:
            dense: type[DenseSolver] = LU
            if Tag.POSITIVE_DEFINITE in tags:
                dense = Cholesky
            elif tags & {Tag.LOWER_TRIANGULAR, Tag.UPPER_TRIANGULAR}:
                dense = Triangular
            return dense(vectorize=False, estimate_condition=report)
        iterative: type[IterativeSolver] = LSMR
        if Tag.POSITIVE_DEFINITE in tags:
            iterative = CG
        elif Tag.SYMMETRIC in tags:
            iterative = MINRES
        return iterative(self.rtol, maxiter=self.maxiter, estimate_condition=report)

    def init(self, operator: BoundOperator, like: Tensor) -> tuple[Solver, Any]:
        """Return the chosen solver and its state."""
        solver = self.choose(operator)
        return solver, solver.init(operator, like)

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        solver, inner = state
        computed: Computed = solver.compute(inner, b, x0)
        return computed

    def transpose(self, state: Any) -> Any:
        """Return the state of Aᴴ."""
        solver, inner = state
        return solver, solver.transpose(inner)

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with an unconverged answer."""
        return self.on_fail
