# SPDX-License-Identifier: Apache-2.0
"""solve_cg, solve_normal_cg, solve_inv: solvers under the names that `custom_root` users know."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.linear_solve.cg import CG, NormalCG
from torchopt.linear_solve.dense import LU
from torchopt.linear_solve.neumann import Neumann
from torchopt.linear_solve.preconditioners import Preconditioner
from torchopt.linear_solve.result import OnFail
from torchopt.linear_solve.solver import Solver

__all__ = ["solve_cg", "solve_inv", "solve_normal_cg"]


def solve_cg(
    *,
    ridge: float | Tensor | None = None,
    init: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Preconditioner | None = None,
    on_fail: OnFail = "warn",
) -> CG:
    """Return a conjugate gradient solver, for Hermitian positive definite systems.

    Args:
        ridge: Solve with A + ridge I.
        init: The start, a tree like b; by default zero.
        rtol: Stop when ‖r‖ ≤ max(rtol ‖b‖, atol).
        atol: See `rtol`.
        maxiter: The most iterations; None: ten times the number of unknowns.
        M: A preconditioner, see `CG`.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".

    Returns:
        A solver: `solver(matvec, b)` is the solution, differentiable.

    Example:
        >>> import torch
        >>> solve_cg(rtol=1e-6)(lambda v: 4.0 * v, torch.tensor([2.0, 6.0]))
        tensor([0.5000, 1.5000])
    """
    return CG(rtol=rtol, atol=atol, maxiter=maxiter, M=M, ridge=ridge, x0=init, on_fail=on_fail)


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


def solve_inv(
    *,
    ridge: float | Tensor | None = None,
    ns: bool = False,
    on_fail: OnFail | None = None,
    **kwargs: Any,
) -> Solver:
    """Return a solver by the inverse: dense, or by the Neumann series.

    The dense solver forms the matrix of all leaves together, so leaves may be coupled.

    Args:
        ridge: Solve with A + ridge I.
        ns: Use the Neumann series.
        on_fail: What to do with a singular matrix (default "raise") or a diverging series (default
            "warn"): "raise", "warn" or "ignore".
        **kwargs: With `ns`: `maxiter` (default 10) and `alpha`, see `Neumann`. Without: ignored, as
            they always were.

    Returns:
        A solver: `solver(matvec, b)` is the solution, differentiable.

    Raises:
        TypeError: With `ns`, an option that the Neumann series does not have.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> coupled = lambda v: (2 * v[0] + v[1], v[0] + 3 * v[1])
        >>> solve_inv()(coupled, (torch.tensor(1.0), torch.tensor(1.0)))
        (tensor(0.4000), tensor(0.2000))
    """
    if not ns:
        return LU(ridge=ridge, on_fail=on_fail or "raise")
    unknown = kwargs.keys() - {"maxiter", "alpha"}
    if unknown:
        raise TypeError(f"solve_inv(ns=True): expected maxiter and alpha, got {sorted(unknown)}")
    maxiter = kwargs.get("maxiter")
    return Neumann(
        maxiter=10 if maxiter is None else maxiter,
        alpha=kwargs.get("alpha"),
        ridge=ridge,
        on_fail=on_fail or "warn",
    )
