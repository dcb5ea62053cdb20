# SPDX-License-Identifier: Apache-2.0
"""Robust losses of least squares: functions rho of the squared residual, of slower growth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOSSES", "RobustLoss", "slopes"]

#: z ≥ 0, element by element, -> rho(z), with rho(0) = 0 and rho'(0) = 1.
RobustLoss = Callable[[Tensor], Tensor]


def _huber(z: Tensor) -> Tensor:
    outside = torch.where(z > 1, z, 1.0)  # the root has no derivative at zero
    return torch.where(z > 1, 2 * torch.sqrt(outside) - 1, z)


#: The losses of `scipy.optimize.least_squares`, by the same names.
LOSSES: dict[str, RobustLoss] = {
    "linear": lambda z: z,
    "soft_l1": lambda z: 2 * z / (torch.sqrt(1 + z) + 1),  # without cancellation for small z
    "huber": _huber,
    "cauchy": torch.log1p,
    "arctan": torch.atan,
}


def slopes(rho: RobustLoss, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return rho'(z) and rho''(z)."""
    if rho is LOSSES["linear"]:
        return torch.ones_like(z), torch.zeros_like(z)
    first = torch.func.grad(lambda z: rho(z).sum())
    return first(z), torch.func.grad(lambda z: first(z).sum())(z)
