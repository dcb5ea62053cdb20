# SPDX-License-Identifier: Apache-2.0
"""Square roots whose derivative is defined at zero.

Rule: where a radicand is exactly zero, the derivative of the quotient (or of the root) is defined
to be zero.

A parameter whose gradients have all been zero has a second moment of exactly zero. There the square
root has no derivative and autograd produces 0 * inf = NaN, which then spoils the whole
meta-gradient. The one-sided slope is of the order 1 / eps, 1e8 with the usual eps, which is no
better in practice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["divide_by_root", "root"]


def divide_by_root(numerator: Tensor, radicand: Tensor, eps: float | Tensor) -> Tensor:
    """Return numerator / (sqrt(radicand) + eps); where radicand is zero, with derivative zero."""
    at_zero = radicand == 0
    quotient = numerator / (torch.where(at_zero, 1.0, radicand).sqrt() + eps)
    if isinstance(eps, torch.Tensor):
        eps = eps.detach()
    return torch.where(at_zero, numerator.detach() / eps, quotient)


def root(radicand: Tensor) -> Tensor:
    """Return sqrt(radicand); where radicand is zero, with derivative zero."""
    at_zero = radicand == 0
    return torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, radicand).sqrt())
