# SPDX-License-Identifier: Apache-2.0
"""solve_inv: the published name of the dense and the Neumann solver."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchopt.linear_solve.dense import LU
from torchopt.linear_solve.neumann import Neumann
from torchopt.linear_solve.result import OnFail
from torchopt.linear_solve.solver import Solver

__all__ = ["solve_inv"]


def solve_inv(
    *,
    ridge: float | Tensor | None = None,
    ns: bool = False,
    on_fail: OnFail | None = None,
    **kwargs: Any,
) -> Solver:
    """Return a dense solver, or one by the Neumann series.

    The dense solver forms the matrix of all leaves together, so leaves may be coupled.

    Args:
        ridge: Solve with A + ridge I; None: no ridge.
        ns: Whether to use the Neumann series.
        on_fail: What to do with a singular matrix (default "raise") or a diverging series (default
            "warn"): "raise", "warn" or "ignore".
        **kwargs: With `ns`: `maxiter` (default 10) and `alpha`, see `Neumann`. Without `ns` they
            are ignored, as in the published package.

    Returns:
        A solver; `solver(matvec, b)` is the solution, differentiable.

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
