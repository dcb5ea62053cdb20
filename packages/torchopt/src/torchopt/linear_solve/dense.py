# SPDX-License-Identifier: Apache-2.0
"""Direct solvers, which factor the matrix of all leaves together, and the diagonal solver."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.condition import finite_or_zero
from torchopt.linear_solve.iterate import norm, power_of_two, safe_norm, unit, wide
from torchopt.linear_solve.operator import BoundOperator, LinearOperator, Tag
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["LU", "QR", "Cholesky", "DenseSolver", "Diagonal", "Triangular"]


#: A residual above this part of ‖b‖ means that the factorisation failed.
UNSOLVED = 1e-2


class Factors(NamedTuple):
    """A factorisation, the matrix, and whether A or Aᴴ is solved with it.

    Attributes:
        factors: The tensors of the factorisation of the matrix.
        matrix: The matrix A.
        failed: Whether the factorisation broke down, 0-dim.
        adjoint: Whether to solve with Aᴴ.
    """

    factors: tuple[Tensor, ...]
    matrix: Tensor
    failed: Tensor
    adjoint: bool


@dataclass(frozen=True)
class DenseSolver(Solver):
    """Direct solution by a factorisation of the n x n matrix of all leaves and their couplings.

    It costs n products with A and O(n³) operations, and O(n²) for each further right-hand side.

    Attributes:
        ridge: Solve with A + ridge I; None: no ridge.
        vectorize: Compute the n products under one `torch.func.vmap`; False: one by one, for
            operators that vmap cannot run.
        on_fail: What to do with a singular operator: "raise", "warn" or "ignore".
        estimate_condition: Whether to compute `Stats.condition`, by the singular values.
    """

    ridge: float | Tensor | None = None
    vectorize: bool = True
    on_fail: OnFail = "raise"
    estimate_condition: bool = False

    @abstractmethod
    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the factors, and whether the factorisation broke down."""

    @abstractmethod
    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᴴ b, for b of shape [n, 1]."""

    def init(self, operator: BoundOperator, like: Tensor) -> Factors:
        """Return the factorisation."""
        matrix = wide(operator.matrix(like, vectorize=self.vectorize))
        factors, failed = self.factor(matrix)
        # A matrix with NaN is not singular: its residual is NaN, which the status says.
        return Factors(factors, matrix, failed & matrix.isfinite().all(), adjoint=False)

    def compute(self, state: Factors, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution; `x0` is not used."""
        matrix = state.matrix.mH if state.adjoint else state.matrix
        dtype, b = b.dtype, wide(b)
        scale = unit(b)
        b = b / scale
        x = self.substitute(state.factors, b[:, None], state.adjoint)[:, 0]
        residual, size = norm(b - matrix @ x), norm(b)
        # If rounding of a pivot hides that A is singular, the residual shows it.
        failed = state.failed | (residual > UNSOLVED * size)
        result = direct_result((x * scale).to(dtype), residual * scale, failed)
        if self.estimate_condition and matrix.numel():
            values = torch.linalg.svdvals(finite_or_zero(matrix)[0])
            result = result._replace(condition=values[0] / values[-1])
        return result

    def transpose(self, state: Factors) -> Factors:
        """Return the same factors for solves with Aᴴ."""
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


def _units(matrix: Tensor, dim: int) -> Tensor:
    """Return the power of two below the largest entry of each row (dim 1) or column (dim 0)."""
    if matrix.numel() == 0:
        return matrix.abs().new_ones(len(matrix))
    return power_of_two(torch.linalg.vector_norm(matrix, torch.inf, dim=dim))


def _equilibrated(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrix divided by the units of its rows and columns, and these units.

    The units are powers of two, so no digits are lost. Then the scales of rows and columns do not
    decide which pivots count as zero.
    """
    rows = _units(matrix, 1)
    matrix = matrix / rows[:, None]
    columns = _units(matrix, 0)
    return matrix / columns, rows, columns


def _negligible_pivot(diagonal: Tensor) -> Tensor:
    """Return whether a diagonal entry of a triangular factor is zero up to rounding."""
    if diagonal.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=diagonal.device)
    size = diagonal.abs()
    eps = torch.finfo(size.dtype).eps * len(size)
    return (size <= eps * size.amax()).any()


class LU(DenseSolver):
    """Gaussian elimination with partial pivoting, for any non-singular A.

    The common options are those of `DenseSolver`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LU, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), LU()).value
        tensor([0.1000, 0.6000])
    """

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return P, L, U and the units of rows and columns, and whether a pivot is negligible."""
        scaled, rows, columns = _equilibrated(matrix)
        lu, pivots, info = torch.linalg.lu_factor_ex(scaled)
        factors: tuple[Tensor, ...] = torch.lu_unpack(lu, pivots)
        return (*factors, rows, columns), (info != 0) | _negligible_pivot(lu.diagonal())

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᴴ b."""
        # torch.linalg.lu_solve is wrong in torch 2.13 under two vmaps, an outer one over matrices
        # and an inner one over right-hand sides.
        p, lower, upper, rows, columns = factors
        solve = torch.linalg.solve_triangular
        x: Tensor
        if adjoint:
            b = b / columns[:, None]
            y = solve(lower.mH, solve(upper.mH, b, upper=False), upper=True, unitriangular=True)
            x = (p @ y) / rows[:, None]
            return x
        b = p.mH @ (b / rows[:, None])
        x = solve(upper, solve(lower, b, upper=False, unitriangular=True), upper=True)
        return x / columns[:, None]


class Cholesky(DenseSolver):
    """The factorisation A = L Lᴴ for Hermitian positive definite A, half the work of LU.

    The common options are those of `DenseSolver`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import Cholesky, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), Cholesky()).value
        tensor([0.0909, 0.6364])
    """

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return L, and whether the matrix is not positive definite, up to rounding."""
        lower, info = torch.linalg.cholesky_ex(matrix)
        # Each pivot relative to its diagonal entry, so that units do not matter.
        left, whole = lower.diagonal().abs(), matrix.diagonal().abs().sqrt()
        least = (torch.finfo(left.dtype).eps * len(matrix)) ** 0.5
        return (lower,), (info != 0) | (left <= least * whole).any()

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b."""
        return torch.cholesky_solve(b, factors[0])


class QR(DenseSolver):
    """The factorisation A = Q R, twice the work of LU, and stable without pivoting.

    The common options are those of `DenseSolver`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import QR, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), QR()).value
        tensor([0.1000, 0.6000])
    """

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return Q, R and the units of rows and columns, and whether R is singular."""
        scaled, rows, columns = _equilibrated(matrix)
        q, r = torch.linalg.qr(scaled)
        return (q, r, rows, columns), _negligible_pivot(r.diagonal())

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return R⁻¹ Qᴴ b, or Q R⁻ᴴ b."""
        q, r, rows, columns = factors
        x: Tensor
        if adjoint:
            b = b / columns[:, None]
            x = (q @ torch.linalg.solve_triangular(r.mH, b, upper=False)) / rows[:, None]
        else:
            b = q.mH @ (b / rows[:, None])
            x = torch.linalg.solve_triangular(r, b, upper=True) / columns[:, None]
        return x


@dataclass(frozen=True)
class Triangular(DenseSolver):
    """Substitution, without a factorisation, for A that is triangular in the order of its leaves.

    The operator needs the tag LOWER_TRIANGULAR or UPPER_TRIANGULAR. The other triangle is not read.
    The adjoint of a lower triangular operator gets the tag UPPER_TRIANGULAR, and conversely.

    The common options are those of `DenseSolver`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, Triangular, linear_solve
        >>> matrix = torch.tensor([[4.0, 9.0], [2.0, 5.0]])  # the 9 is not read
        >>> A = LinearOperator.from_matrix(matrix, ["lower_triangular"])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), Triangular()).value
        tensor([0.2500, 0.3000])
    """

    def init(self, operator: BoundOperator, like: Tensor) -> Factors:
        """Return the lower triangle of A, or of Aᴴ.

        Raises:
            ValueError: The operator has neither of the two tags.
        """
        upper = Tag.UPPER_TRIANGULAR in operator.tags
        if not upper and Tag.LOWER_TRIANGULAR not in operator.tags:
            raise ValueError(
                "Triangular: expected an operator with the tag 'lower_triangular' or "
                f"'upper_triangular', got {sorted(tag.value for tag in operator.tags)}"
            )
        matrix = wide(operator.matrix(like, vectorize=self.vectorize))
        lower = matrix.triu().mH if upper else matrix.tril()
        factors, failed = self.factor(lower)
        return Factors(factors, lower, failed, adjoint=upper)

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return the system of one triangle, so that derivatives in the other one are zero."""
        if operator.tags & {Tag.LOWER_TRIANGULAR, Tag.UPPER_TRIANGULAR}:
            operator = operator.triangle()
        return super().reformulate(operator, b)

    def factor(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the lower triangle, and whether its diagonal contains a zero."""
        return (matrix,), (matrix.diagonal() == 0).any()

    def substitute(self, factors: tuple[Tensor, ...], b: Tensor, adjoint: bool) -> Tensor:
        """Return A⁻¹ b, or A⁻ᴴ b."""
        (lower,) = factors
        x: Tensor = torch.linalg.solve_triangular(lower.mH if adjoint else lower, b, upper=adjoint)
        return x


@dataclass(frozen=True)
class Diagonal(Solver):
    """Division by the diagonal, for diagonal A, from one product with a vector of ones.

    Attributes:
        ridge: Solve with A + ridge I; None: no ridge.
        on_fail: What to do with a zero on the diagonal: "raise", "warn" or "ignore".
        estimate_condition: Whether to compute `Stats.condition`.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import Diagonal, linear_solve
        >>> linear_solve(torch.diag(torch.tensor([2.0, 4.0])), torch.ones(2), Diagonal()).value
        tensor([0.5000, 0.2500])
    """

    ridge: float | Tensor | None = None
    on_fail: OnFail = "raise"
    estimate_condition: bool = False

    def init(self, operator: BoundOperator, like: Tensor) -> Tensor:
        """Return the diagonal."""
        return operator.mv(torch.ones_like(like))

    def compute(self, state: Tensor, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the quotient; `x0` is not used."""
        x = b / state
        result = direct_result(x, safe_norm(b - state * x), (state == 0).any())
        if self.estimate_condition and state.numel():
            size = state.abs()
            result = result._replace(condition=size.amax() / size.amin())
        return result

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
