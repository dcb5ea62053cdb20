# SPDX-License-Identifier: Apache-2.0
"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import norm
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver

__all__ = ["Neumann"]


@dataclass(frozen=True)
class Neumann(Solver):
    """The truncated series α Σ_{k=0}^{maxiter} (I - αA)ᵏ b.

    Its error is (I - αA)^(maxiter + 1) A⁻¹ b: it tends to the solution if and only if the spectral
    radius of I - αA is below 1. The truncation is what was asked for, so it is no failure; a
    residual that grew beyond ‖b‖ is.

    Attributes:
        maxiter: The highest power, >= 0.
        alpha: α; None is 1.
        ridge: Solve with A + ridge I.
        on_fail: What to do when the series diverges: "raise", "warn" or "ignore".
    """

    maxiter: int = 10
    alpha: float | Tensor | None = None
    ridge: float | Tensor | None = None
    on_fail: OnFail = "warn"

    def init(self, operator: BoundOperator, like: Tensor) -> BoundOperator:
        """Return the operator."""
        return operator

    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the truncated series; `x0` is not used."""
        alpha = 1.0 if self.alpha is None else self.alpha
        term = alpha * b
        total = term
        for _ in range(self.maxiter):
            term = term - alpha * state.mv(term)
            total = total + term
        residual = norm(b - state.mv(total))
        grew = torch.where(residual > norm(b), int(Status.DIVERGED), int(Status.CONVERGED))
        status = torch.where(residual.isfinite(), grew, int(Status.NON_FINITE))
        return Computed(total, torch.full_like(status, self.maxiter), residual, status)

    def transpose(self, state: Any) -> BoundOperator:
        """Return Aᴴ."""
        transposed: BoundOperator = state.T
        return transposed

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with a diverged series."""
        return self.on_fail

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge
