# SPDX-License-Identifier: Apache-2.0
"""The Neumann series: products with an inverse, and the inverse itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.linalg.utils import normalize_matvec
from torchopt.linear_solve.neumann import Neumann
from torchopt.linear_solve.result import OnFail
from torchopt.tree import tree_map

__all__ = ["ns", "ns_inv"]


def ns(
    A: Any,
    b: Any,
    maxiter: int | None = None,
    *,
    alpha: float | None = None,
    on_fail: OnFail = "warn",
) -> Any:
    """Return α Σ_{k=0}^{maxiter} (I - αA)ᵏ b, which tends to A⁻¹ b when ‖I - αA‖ < 1.

    Args:
        A: A callable on trees like b, a matrix, or a tree of matrices, one for each leaf of b.
        b: A tree of tensors.
        maxiter: The highest power; None: 10.
        alpha: α; None: 1.
        on_fail: What to do when the series diverges: "raise", "warn" or "ignore".

    Example:
        >>> import torch
        >>> ns(torch.tensor([[0.5]]), torch.tensor([1.0]), maxiter=30)
        tensor([2.])
    """
    # The series is what is asked for, however far it is from the inverse.
    solver = Neumann(10 if maxiter is None else maxiter, alpha, on_fail=on_fail, rtol=1.0)
    return solver(normalize_matvec(A), b)


def _series(A: Tensor, terms: int, alpha: float) -> Tensor:
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise TypeError(f"Linear operator must be a square matrix, but has shape: {tuple(A.shape)}")
    step = torch.eye(A.shape[0], dtype=A.dtype, device=A.device) - alpha * A
    term = total = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    for _ in range(terms - 1):
        term = term @ step
        total = total + term
    return alpha * total if terms else torch.zeros_like(A)


def ns_inv(A: Any, maxiter: int | None = None, *, alpha: float | None = None) -> Any:
    """Return α Σ_{k=0}^{maxiter-1} (I - αA)ᵏ, which tends to A⁻¹ when ‖I - αA‖ < 1.

    Args:
        A: A square matrix, or a tree of them.
        maxiter: The number of terms; None: 10.
        alpha: α; None: 1.

    Raises:
        TypeError: A matrix is not square.

    Example:
        >>> import torch
        >>> ns_inv(torch.tensor([[0.5]]), maxiter=30)
        tensor([[2.]])
    """
    terms = 10 if maxiter is None else maxiter
    return tree_map(lambda matrix: _series(matrix, terms, 1.0 if alpha is None else alpha), A)
