# SPDX-License-Identifier: Apache-2.0
"""Initial values of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["filled_like", "zeros_like"]


def zeros_like(params: list[Tensor], requires_grad: bool = False) -> list[Tensor]:
    """Return zeros of the parameters' shapes, dtypes and devices."""
    return [
        torch.zeros_like(p, requires_grad=requires_grad, memory_format=torch.preserve_format)
        for p in params
    ]


def filled_like(params: list[Tensor], value: float | Tensor) -> list[Tensor]:
    """Return tensors like the parameters, filled with `value`, which is differentiated.

    A complex number is a pair of real ones, both of which start with `value`.
    """
    if isinstance(value, torch.Tensor):
        value = value.reshape(()) if value.numel() == 1 else value
        return [zeros + _for_pairs(value.to(zeros), zeros) for zeros in zeros_like(params)]
    return [torch.full_like(p, _for_pairs(value, p), requires_grad=False) for p in params]


def _for_pairs(value: Any, like: Tensor) -> Any:
    return value * (1 + 1j) if like.is_complex() else value
