# SPDX-License-Identifier: Apache-2.0
"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import norm, unit, wide, widened
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.preconditioners import (
    FlatPreconditioner,
    Preconditioner,
    prepare_preconditioner,
)
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["Neumann"]


@dataclass(frozen=True)
class Neumann(Solver):
    """The truncated Neumann series α Σ_{k=0}^{maxiter} (I - αMA)ᵏ M b.

    The error is (I - αMA)^(maxiter + 1) A⁻¹ b, so the series tends to the solution if and only if
    the spectral radius of I - αMA is below 1. The status is MAX_ITERATIONS if the residual is above
    `rtol` ‖b‖, and DIVERGED if it is above ‖b‖.

    Attributes:
        maxiter: The highest power, >= 0.
        alpha: The factor α, in the units of A⁻¹; None: 1.
        ridge: Solve with A + ridge I; None: no ridge.
        on_fail: What to do if the series diverges or was truncated too early: "raise", "warn" or
            "ignore".
        rtol: The largest residual relative to ‖b‖, >= 0; use 1 if you want the truncated series.
        M: A preconditioner, as for `CG`; None: the identity.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import Neumann, linear_solve
        >>> A = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
        >>> linear_solve(A, torch.ones(2), Neumann(30)).value.round(decimals=4)
        tensor([2., 1.])
    """

    maxiter: int = 10
    alpha: float | Tensor | None = None
    ridge: float | Tensor | None = None
    on_fail: OnFail = "warn"
    rtol: float = 1e-5
    M: Preconditioner | None = None

    def init(
        self, operator: BoundOperator, like: Tensor
    ) -> tuple[BoundOperator, FlatPreconditioner, float]:
        """Return the operator, its preconditioner, and the rounding of its dtype."""
        wider = widened(operator, like)
        precondition = prepare_preconditioner(self.M, wider, wide(like))
        return wider, precondition, float(torch.finfo(like.dtype).eps)

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the truncated series; `x0` is not used."""
        alpha = 1.0 if self.alpha is None else self.alpha
        operator, precondition, eps = state
        dtype, b = b.dtype, wide(b)
        scale = unit(b)
        b = b / scale
        P = precondition.apply
        term = alpha * P(b)
        total = term
        for _ in range(self.maxiter):
            term = term - alpha * P(operator.mv(term))
            total = total + term
        residual = norm(b - operator.mv(total))
        size = norm(b)
        met = residual <= max(self.rtol, 10 * eps) * size
        status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
        status = torch.where(residual > size, int(Status.DIVERGED), status)
        status = torch.where(residual.isfinite(), status, int(Status.NON_FINITE))
        count = torch.full_like(status, self.maxiter)
        return Computed((total * scale).to(dtype), count, residual * scale, status)

    def transpose(self, state: Any) -> tuple[BoundOperator, FlatPreconditioner, float]:
        """Return Aᴴ."""
        operator, precondition, eps = state
        return operator.T, precondition.T, eps

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with a diverged series."""
        return self.on_fail

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge
