# SPDX-License-Identifier: Apache-2.0
"""Condition numbers from the coefficients of an iteration."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "condition_of_bidiagonal",
    "condition_of_singular_values",
    "condition_of_tridiagonal",
    "finite_or_zero",
]


def finite_or_zero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix, or zeros if it is not finite, which LAPACK refuses; and the flag."""
    finite = matrix.isfinite().all()
    return torch.where(finite, matrix, torch.zeros_like(matrix)), finite


def condition_of_singular_values(matrix: Tensor) -> Tensor:
    """Return the largest singular value divided by the smallest one above rounding.

    NaN if all are zero or the matrix is not finite.
    """
    clean, _ = finite_or_zero(matrix)
    values = torch.linalg.svdvals(clean)
    negligible = values <= values[0] * len(values) * torch.finfo(values.dtype).eps
    condition: Tensor = values[0] / torch.where(negligible, values[0], values).amin()
    return condition


def condition_of_tridiagonal(live: Tensor, diagonal: Tensor, below: Tensor) -> Tensor:
    """Return κ of a Lanczos process A V = V̲ T̲, where the tridiagonal T̲ has one more row.

    Args:
        live: Whether each step was taken, [k]; other steps are ignored.
        diagonal: The diagonal, [k].
        below: The entries below it, and by symmetry those above, [k].
    """
    zero = torch.zeros_like(diagonal)
    diagonal, below = torch.where(live, diagonal, zero), torch.where(live, below, zero)
    square = torch.diag(diagonal) + torch.diag(below[:-1], -1) + torch.diag(below[:-1], 1)
    # Entries above a step that was not taken are unused.
    square = torch.where(live[None, :] & live[:, None], square, torch.zeros_like(square))
    last = torch.where(live & ~torch.cat([live[1:], ~live[:1]]), below, zero)
    return condition_of_singular_values(torch.cat([square, torch.diag(last)]))


def condition_of_bidiagonal(live: Tensor, diagonal: Tensor, below: Tensor) -> Tensor:
    """Return κ of a Golub-Kahan process A V = U̲ B̲, where the lower bidiagonal B̲ has one more row.

    Args:
        live: Whether each step was taken, [k]; other steps are ignored.
        diagonal: The diagonal, [k].
        below: The entries below it, [k].
    """
    zero = torch.zeros_like(diagonal)
    diagonal, below = torch.where(live, diagonal, zero), torch.where(live, below, zero)
    padded = torch.cat([torch.diag(diagonal), zero[None]])
    return condition_of_singular_values(padded + torch.cat([zero[None], torch.diag(below)]))
