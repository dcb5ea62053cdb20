# SPDX-License-Identifier: Apache-2.0
"""Preconditioners: approximations of A⁻¹, with which iterative solvers need fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.operator import BoundOperator, transpose_linear

__all__ = ["FlatPreconditioner", "Jacobi", "Nystrom", "Preconditioner", "prepare_preconditioner"]


@dataclass(frozen=True)
class FlatPreconditioner:
    """P and Pᴴ on vectors; `trivial` says that P is the identity."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    trivial: bool = False

    @property
    def T(self) -> FlatPreconditioner:  # noqa: N802 - as in torch
        """Pᴴ."""
        return FlatPreconditioner(self.adjoint, self.apply, self.trivial)


@dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal of A.

    Attributes:
        diagonal: The diagonal as a tree like b. None: it is computed by n products with A, which
            pays off if the preconditioner is used for several solves or products are cheap.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, Jacobi, linear_solve
        >>> A = torch.diag(torch.tensor([1.0, 10.0, 100.0]))
        >>> solvers = CG(), CG(M=Jacobi())
        >>> [int(linear_solve(A, torch.ones(3), solver).stats.iterations) for solver in solvers]
        [3, 1]
    """

    diagonal: Any = None


@dataclass(frozen=True)
class Nystrom:
    """The inverse of a randomised low-rank approximation of a positive semi-definite A.

    With A ≈ U Λ Uᵀ from `rank` products with A, and the smallest entry λ of Λ,

        P⁻¹ = U (Λ + ridge) Uᵀ / (λ + ridge) + I - U Uᵀ,

    so directions in which A is large get the same scale. It pays off if the spectrum of A decays
    fast and several systems with one operator are solved. The expected condition number of the
    preconditioned system is below 28 if the rank is about twice the number of eigenvalues above the
    ridge.

    Attributes:
        rank: The number of products and of kept directions, >= 1.
        ridge: The `ridge` of the solver; the preconditioner is made for A + ridge I.
        seed: The seed of the random directions.

    References:
        Z. Frangella, J. A. Tropp, M. Udell, Randomized Nyström Preconditioning, SIAM J. Matrix
        Anal. Appl. 44, 2023, https://arxiv.org/abs/2110.02820, algorithms 2.1 and 5.1

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, Nystrom, linear_solve
        >>> A = torch.diag(1 + 1000 * torch.arange(1, 101).double() ** -2)
        >>> solvers = CG(), CG(M=Nystrom(rank=20))
        >>> a, b = (linear_solve(A, torch.ones(100).double(), x).stats.iterations for x in solvers)
        >>> bool(b < 0.6 * a)
        True
    """

    rank: int
    ridge: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Nystrom: rank: expected at least 1, got {self.rank}")

    def prepare(self, operator: BoundOperator, like: Tensor) -> FlatPreconditioner:
        """Return the preconditioner of an operator that already includes the ridge."""
        rank = min(self.rank, operator.size)
        test = torch.linalg.qr(_directions(operator.size, rank, self.seed, like))[0]
        columns = [operator.mv(direction) for direction in test.unbind(1)]
        sketch = torch.stack(columns, dim=1) - self.ridge * test
        # The shift of the reference, so that rounding does not make the sketch indefinite.
        eps = torch.finfo(sketch.dtype).eps
        shift = eps * operator.size**0.5 * torch.linalg.vector_norm(sketch)
        sketch = sketch + shift * test
        # LAPACK would raise an error of its own for NaN; the solve reports it with a message.
        sketch = torch.where(sketch.isfinite().all(), sketch, torch.zeros_like(sketch))
        gram = test.mH @ sketch
        values, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
        # With B = sketch gram^(-1/2) the approximation is B Bᵀ; directions of weight 0 are dropped.
        kept = values > eps * values[-1] * rank
        roots = torch.where(kept, torch.where(kept, values, 1).rsqrt(), torch.zeros_like(values))
        U, S, _ = torch.linalg.svd((sketch @ vectors) * roots, full_matrices=False)
        spectrum = torch.clamp(S * S - shift, min=0) + self.ridge
        positive = spectrum > eps * spectrum[0]
        smallest = torch.where(positive, spectrum, spectrum[0]).amin()
        scale = torch.where(positive, smallest / torch.where(positive, spectrum, 1), 1) - 1

        def apply(v: Tensor) -> Tensor:
            part: Tensor = U @ (scale * (U.mH @ v))
            return v + part

        return FlatPreconditioner(apply, apply)


def _directions(n: int, rank: int, seed: int, like: Tensor) -> Tensor:
    """Return an [n, rank] matrix of approximately normal numbers, the same in every transform.

    `torch.func.vmap` refuses torch's generators, so the numbers are computed from integers.
    """
    count = torch.arange(2 * n * rank, device=like.device)
    bits = count * 6364136223846793005 + (2 * seed + 1) * 1442695040888963407
    for shift in (30, 27, 31):
        bits = (bits ^ (bits >> shift)) * 7046029254386353131
    uniform = ((bits >> 24) & 0xFFFFFFFF).to(like.real.dtype if like.is_complex() else like.dtype)
    first, second = ((uniform + 0.5) / 2**32).view(2, n, rank).unbind()
    normal = torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * torch.pi * second)
    return normal.to(like.dtype)


#: v -> A⁻¹ v approximately, on trees; a matrix; a `Jacobi`; or a `Nystrom`.
Preconditioner = Union[Callable[[Any], Any], Tensor, Jacobi, Nystrom]


def _identity(v: Tensor) -> Tensor:
    return v


def prepare_preconditioner(
    M: Preconditioner | None, operator: BoundOperator, like: Tensor
) -> FlatPreconditioner:
    """Return M as a map of vectors.

    Raises:
        TypeError: M is none of the possible kinds.
        ValueError: M is a matrix of a wrong size.
    """
    n = operator.size
    if M is None or n == 0:
        return FlatPreconditioner(_identity, _identity, trivial=True)
    if isinstance(M, Nystrom):
        return M.prepare(operator, like)
    if operator.adjoint and not (isinstance(M, Jacobi) and M.diagonal is None):
        # M approximates the inverse of the original operator, not of its adjoint.
        return prepare_preconditioner(M, operator.T, like).T
    if isinstance(M, Jacobi):
        if M.diagonal is None:
            diagonal = operator.matrix(like, vectorize=False).diagonal()
        else:
            diagonal = operator.layout.ravel(M.diagonal, "Jacobi: diagonal").detach()
        inverse = torch.where(diagonal == 0, torch.ones_like(diagonal), 1 / diagonal)
        return FlatPreconditioner(lambda v: inverse * v, lambda v: inverse.conj() * v)
    if isinstance(M, Tensor):
        if M.shape != (n, n):
            raise ValueError(
                f"preconditioner M: expected a matrix of shape {(n, n)}, got {tuple(M.shape)}"
            )
        matrix = M.detach()
        return FlatPreconditioner(lambda v: matrix @ v, lambda v: matrix.mH @ v)
    if not callable(M):
        raise TypeError(
            "preconditioner M: expected a callable, a matrix, a Jacobi or a Nystrom, "
            f"got {type(M).__name__}"
        )
    layout = operator.layout

    def apply(v: Tensor) -> Tensor:
        return layout.ravel(M(layout.unravel(v)), "preconditioner M: output")

    return FlatPreconditioner(apply, lambda v: transpose_linear(apply, like)(v))
