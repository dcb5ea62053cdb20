# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients for a matrix, a tree of matrices or a callable."""

from __future__ import annotations

from typing import Any

from torchopt.linalg.utils import check_like, normalize_matvec
from torchopt.linear_solve.cg import CG
from torchopt.linear_solve.result import OnFail

__all__ = ["cg"]


def cg(
    A: Any,
    b: Any,
    x0: Any = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    on_fail: OnFail = "warn",
) -> Any:
    """Solve A x = b by conjugate gradients, for Hermitian positive definite A.

    Differentiable with respect to b and everything that A depends on, to any order; the derivatives
    are those of the exact solution.

    Args:
        A: A callable on trees like b, a matrix, or a tree of matrices, one for each leaf of b.
        b: A tree of tensors, treated as one long vector.
        x0: The start, a tree like b; None: zero.
        rtol: The iteration stops when ‖b - A x‖ ≤ max(rtol ‖b‖, atol); >= 0, dimensionless.
        atol: See `rtol`; >= 0, in the units of b.
        maxiter: The largest number of iterations; None: ten times the number of unknowns.
        M: A preconditioner, an approximation of A⁻¹ in one of the forms of A; None: the identity.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".

    Returns:
        x, a tree like b.

    Raises:
        ValueError: x0 and b have different shapes, or A and b different numbers of leaves.
        TypeError: A matrix is not square.
        LinearSolveError: `on_fail` is "raise" and the iteration did not converge.

    Example:
        >>> import torch
        >>> cg(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([2.0, 2.0]))
        tensor([1.0000, 0.5000])
    """
    if x0 is not None:
        check_like(x0, b)
    solver = CG(
        rtol=rtol,
        atol=atol,
        maxiter=maxiter,
        M=None if M is None else normalize_matvec(M),
        x0=x0,
        on_fail=on_fail,
    )
    return solver(normalize_matvec(A), b)
