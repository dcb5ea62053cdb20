# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients, and conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchopt.linear_solve.iterate import (
    IterativeSolver,
    Problem,
    State,
    dot,
    norm,
    quotient,
)
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.solver import Computed

__all__ = ["CG", "NormalCG"]


@dataclass(frozen=True)
class CG(IterativeSolver):
    """Preconditioned conjugate gradients, for Hermitian positive definite A.

    After k steps the error in the A-norm is at most 2 ((√κ - 1) / (√κ + 1))ᵏ times the first one,
    κ the condition number of M A. One product with A in a step.

    References:
        Hestenes, Stiefel, Methods of conjugate gradients for solving linear systems, 1952.
    """

    def run(self, problem: Problem, b: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last iterate and the number of iterations."""
        A, P = problem.operator.mv, problem.precondition.apply
        r = b - A(x0)
        z = P(r)

        def step(state: State) -> State:
            x, r, p, gamma = state
            Ap = A(p)
            alpha = quotient(gamma, dot(p, Ap))
            r = r - alpha * Ap
            z = P(r)
            new_gamma = dot(r, z)
            return x + alpha * p, r, z + quotient(new_gamma, gamma) * p, new_gamma

        state, count = problem.iterate(step, lambda s: norm(s[1]), (x0, r, z, dot(r, z)))
        return state[0], count


@dataclass(frozen=True)
class NormalCG(CG):
    """Conjugate gradients on AᴴA x = Aᴴ b, for any non-singular A.

    Two products in a step, one of them with Aᴴ, and the condition number is squared: prefer MINRES
    for symmetric A and GMRES for others where they converge. The stop is that of ‖Aᴴ r‖ against
    ‖Aᴴ b‖. With a ridge the system is (AᴴA + ridge I) x = Aᴴ b. M approximates (AᴴA)⁻¹.
    """

    @property
    def shift(self) -> float | Tensor | None:
        """None: the ridge belongs to AᴴA, not to A."""
        return None

    def init(self, operator: BoundOperator, like: Tensor) -> Any:
        """Return A together with the normal operator."""
        return operator, super().init(_normal(operator).shifted(self.ridge), like)

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        operator, problem = state
        found = super().compute(problem, operator.rmv(b), x0)
        if self.ridge is not None:
            return found
        residual = norm(b - operator.mv(found.value))
        return found._replace(residual_norm=residual)

    def transpose(self, state: Any) -> Any:
        """Return the state of Aᴴ.

        Raises:
            ValueError: There is a preconditioner: it belongs to AᴴA and not to A Aᴴ.
        """
        operator, problem = state
        if not problem.precondition.trivial:
            raise ValueError("NormalCG.transpose: the preconditioner M is that of AᴴA, not of AAᴴ")
        normal = _normal(operator.T).shifted(self.ridge)
        return operator.T, replace(problem, operator=normal)


def _normal(operator: BoundOperator) -> BoundOperator:
    def mv(v: Tensor) -> Tensor:
        return operator.rmv(operator.mv(v))

    return replace(operator, mv=mv, rmv=mv)
