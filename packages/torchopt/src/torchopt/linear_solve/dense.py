# SPDX-License-Identifier: Apache-2.0
"""Direct solvers: the full matrix of all leaves together, factored; and the diagonal solver."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import norm
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["LU", "QR", "Cholesky", "DenseSolver", "Diagonal"]


class Factors(NamedTuple):
    """A factorisation, the matrix, and which of A and Aᴴ it is used for.

    Attributes:
        factors: The tensors of the factorisation of the matrix.
        matrix: A.
        failed: Whether the factorisation broke down, 0-dim.
        adjoint: Solve with Aᴴ.
    """

    factors: tuple[Tensor, ...]
    matrix: Tensor
    failed: Tensor
    adjoint: bool


@dataclass(frozen=True)
class DenseSolver(Solver):
    """Direct solution by a factorisation of the n x n matrix of all leaves, couplings included.

    Costs n products with A and O(n³) operations; O(n²) for each further right-hand side.

    Attributes:
        ridge: Solve with A + ridge I.
        vectorize: Take the n products under one `torch.func.vmap`; False: one by one, for
            operators that vmap cannot run.
        on_fail: What to do with a singular operator: "raise", "warn" or "ignore".
    """

    ridge: float | Tensor | None = None
    vectorize: bool = True
    on_fail: OnFail = "raise"

    @abstractmethod
    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the factors, and whether the factorisation broke down."""

    @abstractmethod
    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᴴ b, for b of shape [n, 1]."""

    def init(self, operator: BoundOperator, like: Tensor) -> Factors:
        """Return the factorisation."""
        matrix = operator.matrix(like, vectorize=self.vectorize)
        factors, failed = self.factor(matrix)
        return Factors(factors, matrix, failed, adjoint=False)

    def compute(self, state: Factors, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution; `x0` is not used."""
        x = self.substitute(state.factors, b[:, None], state.adjoint)[:, 0]
        matrix = state.matrix.mH if state.adjoint else state.matrix
        residual = norm(b - matrix @ x)
        return direct_result(x, residual, state.failed)

    def transpose(self, state: Factors) -> Factors:
        """Return the same factors, for Aᴴ."""
        return state._replace(adjoint=not state.adjoint)

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with a singular operator."""
        return self.on_fail

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge


def direct_result(x: Tensor, residual: Tensor, failed: Tensor) -> Computed:
    """Return the result of a direct solver."""
    status = torch.where(residual.isfinite(), int(Status.CONVERGED), int(Status.NON_FINITE))
    status = torch.where(failed, int(Status.SINGULAR), status)
    return Computed(x, torch.zeros_like(status), residual, status)


class LU(DenseSolver):
    """Gaussian elimination with partial pivoting, for any non-singular A."""

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return LU and pivots, and whether a pivot is zero."""
        lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
        return (lu, pivots), info != 0

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᴴ b."""
        x: Tensor = torch.linalg.lu_solve(*factors, b, adjoint=adjoint)
        return x


class Cholesky(DenseSolver):
    """The factorisation A = L Lᴴ, for Hermitian positive definite A: half the work of LU."""

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return L, and whether the matrix is not positive definite."""
        lower, info = torch.linalg.cholesky_ex(matrix)
        return (lower,), info != 0

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b."""
        return torch.cholesky_solve(b, factors[0])


class QR(DenseSolver):
    """The factorisation A = Q R: twice the work of LU, and stable without pivoting."""

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return Q and R, and whether the diagonal of R has a zero up to rounding."""
        q, r = torch.linalg.qr(matrix)
        diagonal = r.diagonal().abs()
        if diagonal.numel() == 0:
            return (q, r), torch.zeros((), dtype=torch.bool, device=matrix.device)
        eps = torch.finfo(matrix.dtype).eps * len(diagonal)
        return (q, r), diagonal.amin() <= eps * diagonal.amax()

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return R⁻¹ Qᴴ b, or Q R⁻ᴴ b."""
        q, r = factors
        x: Tensor
        if adjoint:
            x = q @ torch.linalg.solve_triangular(r.mH, b, upper=False)
        else:
            x = torch.linalg.solve_triangular(r, q.mH @ b, upper=True)
        return x


@dataclass(frozen=True)
class Diagonal(Solver):
    """Division by the diagonal, for diagonal A: one product with a vector of ones.

    Attributes:
        ridge: Solve with A + ridge I.
        on_fail: What to do with a zero on the diagonal: "raise", "warn" or "ignore".
    """

    ridge: float | Tensor | None = None
    on_fail: OnFail = "raise"

    def init(self, operator: BoundOperator, like: Tensor) -> Tensor:
        """Return the diagonal."""
        return operator.mv(torch.ones_like(like))

    def compute(self, state: Tensor, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the quotient; `x0` is not used."""
        x = b / state
        return direct_result(x, norm(b - state * x), (state == 0).any())

    def transpose(self, state: Tensor) -> Tensor:
        """Return the conjugate diagonal."""
        return state.conj()

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with a singular operator."""
        return self.on_fail

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge
