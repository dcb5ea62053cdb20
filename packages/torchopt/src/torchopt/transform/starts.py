# SPDX-License-Identifier: Apache-2.0
"""Initial values of states."""

from __future__ import annotations

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
    """Return tensors like the parameters, filled with `value`, which is differentiated."""
    if isinstance(value, torch.Tensor):
        value = value.reshape(()) if value.numel() == 1 else value
        return [zeros + value.to(zeros) for zeros in zeros_like(params)]
    return [torch.full_like(p, value, requires_grad=False) for p in params]
