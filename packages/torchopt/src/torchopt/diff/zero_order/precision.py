# SPDX-License-Identifier: Apache-2.0
"""Wide dtypes for losses and sums, and a warning for perturbations that are rounded away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.zero_order.independent import is_flat
from torchopt.errors import warn_caller
from torchopt.torch_internals import flattened, foreach_norm

__all__ = ["accumulator", "require_sigma", "warn_of_lost_perturbations", "widened"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers are added up: float32 or wider.

    Integers and bools are added up in float64, which is exact up to 2**53 and in which a difference
    of unsigned numbers does not wrap around.

    Example:
        >>> [accumulator(x) for x in (torch.bfloat16, torch.float64, torch.uint8)]
        [torch.float32, torch.float64, torch.float64]
    """
    if not dtype.is_floating_point:
        return torch.float64
    return torch.float32 if dtype.itemsize < 4 else dtype


def require_sigma(sigma: Any) -> None:
    """Raise unless `sigma` is a positive number.

    Raises:
        ValueError: `sigma` is not a positive number, or is a tensor that requires a gradient.
    """
    if isinstance(sigma, Tensor) and sigma.requires_grad:
        raise ValueError(
            "`sigma`: expected a number, got a tensor that requires a gradient. An estimate is not "
            "differentiated in sigma: pass float(sigma)."
        )
    try:
        good = 0.0 < float(sigma) < math.inf
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good or isinstance(sigma, str):
        raise ValueError(f"`sigma`: expected a positive number, got {sigma!r}.")


def widened(losses: Tensor) -> Tensor:
    """Return losses in the dtype of their sums.

    Raises:
        TypeError: The losses are complex; a complex loss has no descent direction.
    """
    if losses.is_complex():
        raise TypeError(
            f"the loss: expected a real number, got {losses.dtype}. Return its real part, its "
            "modulus, or another real number."
        )
    return losses.to(accumulator(losses.dtype))


def _spacing(x: Tensor) -> Tensor:
    """Return the distance from each entry to the next larger number of its dtype, in float64."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.double().abs())
    ulp = torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)
    return ulp.clamp(min=info.smallest_normal * info.eps)


def _is_resolved(largest: float, dtype: torch.dtype, limit: float) -> bool:
    """Return whether numbers of a dtype up to `largest` are at most `limit` apart."""
    info = torch.finfo(dtype)
    return max(largest, info.smallest_normal) * info.eps <= limit


def _least(x: float | Tensor) -> float:
    return float(x.amin()) if isinstance(x, Tensor) else x


def warn_of_lost_perturbations(
    leaves: Sequence[Tensor],
    sigma: float | Sequence[Tensor],
    normal: bool,
    name: Callable[[int], str],
    what: str = "sigma",
) -> None:
    """Warn if the dtype of some weights is too coarse for perturbations of size `sigma`.

    A perturbation is rounded to a multiple of h, the spacing of floating-point numbers around the
    weight. With normal directions the bias of the estimate is below 1.5 % if sigma is at least
    h / 2; with signs and other entries of fixed size it is up to h / (2 sigma). Leaves with entries
    that are not finite are skipped, because their loss is not finite either.

    Args:
        leaves: The point.
        sigma: The size of the perturbation, or that of each entry, a tensor like each leaf.
        normal: Whether the entries of a direction are normally distributed.
        name: Maps the number of a leaf to its name.
        what: The name of the size.
    """
    present = [(k, x.detach()) for k, x in enumerate(leaves) if x.numel()]
    points, share = [x for _, x in present], 2.0 if normal else 0.25
    if points and not isinstance(sigma, Sequence) and is_flat(points):
        # Two operations usually find that no entry of small leaves is too large.
        largest = max(abs(float(end)) for end in torch.aminmax(flattened(points)))
        if largest < math.inf and _is_resolved(largest, points[0].dtype, share * sigma):
            return
    moduli = foreach_norm(points, math.inf) if points else []
    for (k, x), modulus in zip(present, moduli):
        size = sigma[k].double() if isinstance(sigma, Sequence) else sigma
        limit, largest = share * size, float(modulus)
        if not math.isfinite(largest) or _is_resolved(largest, x.dtype, _least(limit)):
            continue
        spacing = _spacing(x)
        lost = int((spacing > limit).sum())
        if lost:
            warn_caller(
                f"zero-order estimation: expected {what} above the resolution of the weights, got "
                f"{what}={_least(size):g}; at {name(k)} {lost} of {x.numel()} entries are "
                f"{x.dtype} numbers up to {float(spacing.max()):g} apart, so that perturbations "
                "are rounded away and the gradient there is wrong or zero. Use a larger "
                f"{what}, or keep these weights in a wider dtype."
            )
            return
