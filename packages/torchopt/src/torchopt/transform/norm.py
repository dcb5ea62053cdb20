# SPDX-License-Identifier: Apache-2.0
"""Euclidean norms that neither overflow nor underflow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.formulas import root
from torchopt.params.sharded import largest_absolute

__all__ = ["Scaled", "power_of_two", "scaled"]


class Scaled(NamedTuple):
    """A tensor as `size` * `unit`, where the largest part of `unit` lies in [1, 2).

    Attributes:
        size: A power of two, so that nothing is rounded; a constant for differentiation. 1 where
            the tensor is zero or not finite.
        unit: The tensor divided by `size`.
        norm: The Euclidean norm of `unit`; that of the tensor is `size * norm`. Its derivative is
            zero where it is zero.
    """

    size: Tensor
    unit: Tensor
    norm: Tensor


def power_of_two(top: Tensor) -> Tensor:
    """Return the power of two in (top / 2, top]; 1 where it is zero or not finite."""
    usable = (top > 0) & torch.isfinite(top)
    return torch.where(usable, torch.exp2(torch.log2(top).floor()), 1.0)


def scaled(x: Tensor, dim: Any = None) -> Scaled:
    """Return `x` with its size taken out, for norms over `dim`.

    The squares of float32 numbers leave its range at 1e19 and 1e-23: a norm from them is infinite
    or zero, and what is divided by it is lost. The derivative of `size * f(x / size)` is right
    with a constant `size`, because the value does not depend on it.

    Args:
        x: Real or complex.
        dim: Dimensions to take the norm over, which stay with size 1; None for all, which go.

    Returns:
        `size` and `norm` have the shape of the norm.
    """
    keep = dim is not None
    over = tuple(range(x.ndim)) if dim is None else dim

    def norm(x: Tensor) -> Tensor:
        square = x.real.square() + x.imag.square() if x.is_complex() else x * x
        return root(square.sum(dim=over, keepdim=keep))

    if x.numel() == 0:
        return Scaled(torch.ones_like(norm(x)), x, norm(x))
    size = power_of_two(largest_absolute(x, over, keep))
    unit = x / size
    return Scaled(size, unit, norm(unit))
