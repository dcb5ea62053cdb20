# SPDX-License-Identifier: Apache-2.0
"""solve_normal_cg: the published name of conjugate gradients on the normal equations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.linear_solve.cg import NormalCG
from torchopt.linear_solve.preconditioners import Preconditioner
from torchopt.linear_solve.result import OnFail

__all__ = ["solve_normal_cg"]


def solve_normal_cg(
    *,
    ridge: float | Tensor | None = None,
    init: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Preconditioner | None = None,
    on_fail: OnFail = "warn",
) -> NormalCG:
    """Return a solver by conjugate gradients on AᴴA x = Aᴴb, for any non-singular system.

    Args:
        ridge: Solve (AᴴA + ridge I) x = Aᴴ b; None: no ridge.
        init: The start, a tree like b; None: zero.
        rtol: The iteration stops when ‖Aᴴ (b - A x)‖ ≤ max(rtol ‖Aᴴ b‖, atol); >= 0.
        atol: See `rtol`; >= 0, in the units of Aᴴ b.
        maxiter: The largest number of iterations; None: ten times the number of unknowns.
        M: A preconditioner of AᴴA, see `CG`.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".

    Returns:
        A solver; `solver(matvec, b)` is the solution, differentiable.

    Example:
        >>> import torch
        >>> A = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> solve_normal_cg()(lambda v: A @ v, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([3., 1.])
    """
    return NormalCG(
        rtol=rtol, atol=atol, maxiter=maxiter, M=M, ridge=ridge, x0=init, on_fail=on_fail
    )
