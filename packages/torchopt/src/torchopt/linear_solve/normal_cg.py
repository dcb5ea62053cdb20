# SPDX-License-Identifier: Apache-2.0
"""solve_normal_cg: conjugate gradients on the normal equations, under the published name."""

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
        ridge: Solve (AᴴA + ridge I) x = Aᴴ b.
        init: The start, a tree like b; by default zero.
        rtol: Stop when ‖Aᴴ r‖ ≤ max(rtol ‖Aᴴ b‖, atol).
        atol: See `rtol`.
        maxiter: The most iterations; None: ten times the number of unknowns.
        M: A preconditioner of AᴴA, see `CG`.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".

    Returns:
        A solver: `solver(matvec, b)` is the solution, differentiable.
    """
    return NormalCG(
        rtol=rtol, atol=atol, maxiter=maxiter, M=M, ridge=ridge, x0=init, on_fail=on_fail
    )
