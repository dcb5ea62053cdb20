# SPDX-License-Identifier: Apache-2.0
"""Projections onto convex sets: the nearest point, with its exact Jacobian.

All act on the last dimension, `[*batch, n]`, or element by element. They consist of differentiable
torch operations, so they work in every mode, to any order, and under `torch.func.vmap`. On the
border between two pieces, where a projection has no derivative, the derivative of one of the pieces
is used. Bounds and radii are differentiated too. NaN stays NaN. For integers the result has a
floating-point dtype, unless the bounds are integers as well.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = [
    "project_box",
    "project_l1_ball",
    "project_l2_ball",
    "project_non_negative",
    "project_simplex",
]


def project_box(
    x: Tensor, lower: float | Tensor | None = None, upper: float | Tensor | None = None
) -> Tensor:
    """Return the nearest point with lower ≤ x ≤ upper, element by element.

    Args:
        x: Any shape.
        lower: The lower bound, which broadcasts to x; None: no bound.
        upper: The upper bound, which broadcasts to x; None: no bound.

    Example:
        >>> project_box(torch.tensor([-1.0, 0.5, 2.0]), 0.0, 1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    x = promoted(x, *(bound for bound in (lower, upper) if bound is not None))
    if lower is not None:
        kept = (x > lower) | x.isnan()
        x = torch.where(kept, x, torch.as_tensor(lower, dtype=x.dtype, device=x.device))
    if upper is not None:
        kept = (x < upper) | x.isnan()
        x = torch.where(kept, x, torch.as_tensor(upper, dtype=x.dtype, device=x.device))
    return x


def project_non_negative(x: Tensor) -> Tensor:
    """Return the nearest point without negative elements.

    Example:
        >>> project_non_negative(torch.tensor([-1.0, 0.5]))
        tensor([0.0000, 0.5000])
    """
    return project_box(x, lower=0)


def project_simplex(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the nearest point with x ≥ 0 and Σ x = scale, over the last dimension.

    It is max(x - τ, 0) with τ = (Σ_S x - scale) / |S| for the support S. The Jacobian is
    I - 1 1ᵀ / |S| on the support.

    Args:
        x: `[*batch, n]`, n ≥ 1.
        scale: The sum, > 0, a number or `[*batch]`.

    References:
        Held, Wolfe, Crowder, Validation of subgradient optimization, 1974.

    Example:
        >>> project_simplex(torch.tensor([0.5, 1.0, -1.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """
    x = promoted(x, scale, 1.0)
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)[..., None]
    ordered = x.detach().sort(dim=-1, descending=True).values
    sums = ordered.cumsum(-1) - scale.detach()
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    size = (ordered * count > sums).sum(-1, keepdim=True)
    # A scale of 0 or NaN leaves no support; then the first element is used.
    threshold = sums.gather(-1, size.clamp(min=1) - 1) / size.clamp(min=1)
    support = x.detach() > threshold
    inside = torch.where(support, x, torch.zeros_like(x)).sum(-1, keepdim=True)
    tau = (inside - scale) / support.sum(-1, keepdim=True).clamp(min=1)
    nearest = torch.where(support, x - tau, torch.zeros_like(x))
    known = x.detach().amax(-1, keepdim=True).isfinite() & scale.detach().isfinite()
    return torch.where(known, nearest, torch.nan)


def project_l1_ball(x: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """Return the nearest point with Σ |x| ≤ radius, over the last dimension.

    Args:
        x: `[*batch, n]`.
        radius: > 0, a number or `[*batch]`.

    References:
        Duchi, Shalev-Shwartz, Singer, Chandra, Efficient projections onto the l1-ball, 2008.

    Example:
        >>> project_l1_ball(torch.tensor([1.0, -0.5]))
        tensor([ 0.7500, -0.2500])
    """
    x = promoted(x, radius, 1.0)
    size = x.abs().sum(-1, keepdim=True)
    limit = torch.as_tensor(radius, dtype=x.dtype, device=x.device)[..., None]
    outside = x.sign() * project_simplex(x.abs(), radius)
    return torch.where(size <= limit, x, outside)


def project_l2_ball(x: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    """Return the nearest point with ‖x‖₂ ≤ radius, over the last dimension.

    Args:
        x: `[*batch, n]`.
        radius: > 0, a number or `[*batch]`.

    Example:
        >>> project_l2_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    x = promoted(x, radius, 1.0)
    limit = torch.as_tensor(radius, dtype=x.dtype, device=x.device)[..., None]
    length = row_norm(x)
    inside = length <= limit
    return torch.where(
        inside, x, x * (limit / torch.where(inside, torch.ones_like(length), length))
    )


def promoted(x: Tensor, *others: float | Tensor) -> Tensor:
    """Return integers in the dtype of arithmetic with `others`; floating-point x unchanged."""
    if x.is_floating_point():
        return x
    dtypes = (torch.result_type(x, other) for other in others)
    return x.to(functools.reduce(torch.promote_types, dtypes, x.dtype))


def row_norm(x: Tensor) -> Tensor:
    """Return ‖x‖₂ over the last dimension, `[*batch, 1]`, without overflow or underflow.

    The derivative at x = 0 is zero.
    """
    if x.shape[-1] == 0:
        return x.sum(-1, keepdim=True)
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    squared = ((x / scale) ** 2).sum(-1, keepdim=True)
    zero = squared == 0
    length = torch.sqrt(torch.where(zero, torch.ones_like(squared), squared)) * scale
    return torch.where(zero, torch.zeros_like(squared), length)
