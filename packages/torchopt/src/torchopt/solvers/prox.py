# SPDX-License-Identifier: Apache-2.0
"""Proximal operators: argmin_u ½ ‖u - x‖² + penalty(u), with their exact Jacobians.

As for the projections, the derivative on the border between two pieces is that of one of them, and
NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.solvers.projection import promoted, row_norm

__all__ = ["prox_elastic_net", "prox_group_lasso", "prox_l1", "prox_l2_squared"]


def prox_l1(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """Return the soft threshold sign(x) max(|x| - weight, 0), the prox of weight ‖x‖₁.

    Args:
        x: Any shape.
        weight: The weight, ≥ 0, which broadcasts to x; it is differentiated.

    Example:
        >>> prox_l1(torch.tensor([2.0, -0.5, -3.0]))
        tensor([ 1.,  0., -2.])
    """
    sign = x.detach().sign()
    return torch.where(x.abs() <= weight, torch.zeros_like(x), x - sign * weight)


def prox_l2_squared(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """Return x / (1 + weight), the prox of weight / 2 ‖x‖₂².

    Args:
        x: Any shape.
        weight: The weight, ≥ 0, which broadcasts to x; it is differentiated.

    Example:
        >>> prox_l2_squared(torch.tensor([2.0]))
        tensor([1.])
    """
    return x / (1 + weight)


def prox_elastic_net(x: Tensor, l1: float | Tensor = 1.0, l2: float | Tensor = 1.0) -> Tensor:
    """Return the prox of l1 ‖x‖₁ + l2 / 2 ‖x‖₂²: the soft threshold, then the shrinkage.

    Args:
        x: Any shape.
        l1: The weight of ‖x‖₁, ≥ 0, which broadcasts to x; it is differentiated.
        l2: The weight of ‖x‖₂² / 2, ≥ 0, which broadcasts to x; it is differentiated.

    Example:
        >>> prox_elastic_net(torch.tensor([3.0, 0.5]))
        tensor([1., 0.])
    """
    return prox_l2_squared(prox_l1(x, l1), l2)


def prox_group_lasso(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """Return the prox of weight ‖x‖₂ over the last dimension: max(1 - weight / ‖x‖, 0) x.

    Args:
        x: `[*batch, n]`.
        weight: The weight, ≥ 0, a number or `[*batch]`; it is differentiated.

    Example:
        >>> prox_group_lasso(torch.tensor([3.0, 4.0]))
        tensor([2.4000, 3.2000])
    """
    x = promoted(x, weight, 1.0)
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)[..., None]
    length = row_norm(x)
    dropped = length <= weight
    kept = torch.where(dropped, torch.ones_like(length), length)
    return torch.where(dropped, torch.zeros_like(x), (1 - weight / kept) * x)
