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
    """A tensor as `size` * `unit`, with the largest element of `unit` in [1, 2).

    For a tensor of subnormal numbers it is below 1.

    Attributes:
        size: A power of two, so that the division is exact; a constant for differentiation. It is 1
            if the tensor is zero or not finite.
        unit: The tensor divided by `size`.
        norm: The Euclidean norm of `unit`; that of the tensor is `size * norm`. Where it is zero,
            its derivative is zero.
    """

    size: Tensor
    unit: Tensor
    norm: Tensor


def power_of_two(top: Tensor) -> Tensor:
    """Return the power of two in (top / 2, top]; 1 if `top` is zero or not finite.

    It is at least the smallest normal number: the power of a subnormal number may become zero, and
    quotients by it overflow.
    """
    usable = (top > 0) & torch.isfinite(top)
    normal = top.clamp(min=torch.finfo(top.dtype).tiny)
    return torch.where(usable, torch.exp2(torch.log2(normal).floor()), 1.0)


def scaled(x: Tensor, dim: Any = None) -> Scaled:
    """Return `x` with a power of two factored out, for norms over `dim`.

    The squares of float32 numbers above 1e19 or below 1e-23 leave the range of float32: a norm
    computed from them is infinite or zero. The derivative of `size * f(x / size)` is right with a
    constant `size`, because the value does not depend on it.

    Args:
        x: A real or complex tensor.
        dim: The dimensions of the norm, which are kept with size 1; None for all, which are not
            kept.

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
