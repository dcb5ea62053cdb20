# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the rules: moving averages, roots with a derivative at zero, a sign for NaN.

Where a radicand is exactly zero, the derivative of the quotient (or of the root) is defined to be
zero. A parameter whose gradients have all been zero has a second moment of exactly zero. The
square root has no derivative there, and autograd produces 0 * inf = NaN, which makes the whole
meta-gradient NaN. The one-sided slope is of the order 1 / eps, 1e8 with the usual eps, which is no
better in practice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bias_correction", "divide_by_root", "in_double", "moving_average", "root", "sign"]


def moving_average(average: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """Return decay * average + (1 - decay) * value."""
    return average * decay + value * (1 - decay)


def bias_correction(
    decay: float | Tensor, count: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return 1 - decay ** count as a 0-dim tensor of `dtype`.

    The power is taken in float64: in float32, 1 - 0.999 has a relative error of 1e-5.
    """
    return (1 - torch.pow(in_double(decay, count), count)).to(dtype)


def in_double(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a hyper-parameter in float64 on the device of `like`.

    A number is filled in there: a copy from the host would wait for the device.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device=like.device, dtype=torch.float64)
    return torch.full((), value, dtype=torch.float64, device=like.device)


def divide_by_root(numerator: Tensor, radicand: Tensor, eps: float | Tensor) -> Tensor:
    """Return numerator / (sqrt(radicand) + eps), with derivative zero where radicand is zero."""
    at_zero = radicand == 0
    quotient = numerator / (torch.where(at_zero, 1.0, radicand).sqrt() + eps)
    if isinstance(eps, torch.Tensor):
        eps = eps.detach()
    return torch.where(at_zero, numerator.detach() / eps, quotient)


def root(radicand: Tensor) -> Tensor:
    """Return sqrt(radicand), with derivative zero where radicand is zero."""
    at_zero = radicand == 0
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, radicand).sqrt())


def sign(x: Tensor) -> Tensor:
    """Return -1, 0 or 1 with derivative 0, and NaN for NaN, where torch.sign returns 0.

    Example:
        >>> sign(torch.tensor([-3.0, 0.0, float("nan")]))
        tensor([-1., 0., nan])
    """
    return torch.where(x.isnan(), torch.nan, torch.sign(x))
