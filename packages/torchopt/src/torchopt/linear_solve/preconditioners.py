# SPDX-License-Identifier: Apache-2.0
"""Preconditioners: approximations of A⁻¹ that make an iterative solver take fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from torchopt.linear_solve.operator import BoundOperator, transpose_linear

__all__ = ["FlatPreconditioner", "Jacobi", "Preconditioner", "prepare_preconditioner"]


@dataclass(frozen=True)
class Jacobi:
    """The inverse of the diagonal of A.

    Attributes:
        diagonal: The diagonal as a tree like b. None: it is computed, by n products with A, which
            pays off when the factor is used for several solves or when A is cheap.
    """

    diagonal: Any = None


#: v -> A⁻¹ v approximately, on trees; a matrix; or a `Jacobi`.
Preconditioner = Union[Callable[[Any], Any], Tensor, Jacobi]


@dataclass(frozen=True)
class FlatPreconditioner:
    """P and Pᴴ on vectors. `trivial`: P is the identity."""

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    trivial: bool = False

    @property
    def T(self) -> FlatPreconditioner:  # noqa: N802 - as in torch
        """Pᴴ."""
        return FlatPreconditioner(self.adjoint, self.apply, self.trivial)


def _identity(v: Tensor) -> Tensor:
    return v


def prepare_preconditioner(
    M: Preconditioner | None, operator: BoundOperator, like: Tensor
) -> FlatPreconditioner:
    """Return M as a map of vectors.

    Raises:
        TypeError: M is of no known kind.
        ValueError: M is a matrix of another size.
    """
    n = operator.size
    if M is None:
        return FlatPreconditioner(_identity, _identity, trivial=True)
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
            f"preconditioner M: expected a callable, a matrix or a Jacobi, got {type(M).__name__}"
        )
    layout = operator.layout

    def apply(v: Tensor) -> Tensor:
        return layout.ravel(M(layout.unravel(v)), "preconditioner M: output")

    return FlatPreconditioner(apply, lambda v: transpose_linear(apply, like)(v))
