# SPDX-License-Identifier: Apache-2.0
"""The Neumann series: products with an inverse, and the inverse itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.linalg.utils import normalize_matvec
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.neumann import Neumann
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.result import OnFail, report_failure
from torchopt.tree import tree_map
from torchopt.tree_function import uncompiled

__all__ = ["ns", "ns_inv"]


@uncompiled
def ns(
    A: Any,
    b: Any,
    maxiter: int | None = None,
    *,
    alpha: float | Tensor | None = None,
    on_fail: OnFail = "warn",
) -> Any:
    """Return α Σ_{k=0}^{maxiter} (I - αA)ᵏ b, which tends to A⁻¹ b if ‖I - αA‖ < 1.

    Differentiable with respect to b, α and everything that A depends on, to any order. The
    derivatives are those of the truncated sum, whose graph is kept.

    Args:
        A: A callable on trees like b, a matrix, or a tree of matrices, one for each leaf of b.
        b: A tree of tensors.
        maxiter: The highest power; None: 10.
        alpha: α; None: 1.
        on_fail: What to do if the series diverges: "raise", "warn" or "ignore".

    Returns:
        The sum, a tree like b.

    Raises:
        TypeError: A matrix is not square, or b is not a tree of floating-point or complex tensors.
        LinearSolveError: `on_fail` is "raise" and the series diverges.

    Example:
        >>> import torch
        >>> ns(torch.tensor([[0.5]]), torch.tensor([1.0]), maxiter=30)
        tensor([2.])
    """
    # The truncated series itself is the result, however far it is from the inverse.
    solver = Neumann(10 if maxiter is None else maxiter, alpha, on_fail=on_fail, rtol=1.0)
    matvec, layout = normalize_matvec(A), Layout.of(b, "ns: b")

    def product(v: Tensor) -> Tensor:
        return layout.ravel(matvec(layout.unravel(v)), "ns: A b")

    vector = layout.ravel(b)
    operator = BoundOperator(product, product, layout)  # the series needs no product with Aᴴ
    found = solver.compute(solver.init(operator, vector), vector)
    report_failure(found.status.detach(), on_fail, solver)
    return layout.unravel(found.value)


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
    """Return α Σ_{k=0}^{maxiter-1} (I - αA)ᵏ, which tends to A⁻¹ if ‖I - αA‖ < 1.

    Args:
        A: A square matrix, or a tree of square matrices.
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
