# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages and their bias correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["bias_correction", "moving_average"]


def moving_average(average: Tensor, value: Tensor, decay: float | Tensor) -> Tensor:
    """Return decay * average + (1 - decay) * value."""
    return average * decay + value * (1 - decay)


def bias_correction(
    decay: float | Tensor, count: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return 1 - decay ** count as a 0-dim tensor of `dtype`.

    The power is taken in float64: in float32, 1 - 0.999 has a relative error of 1e-5.
    """
    power = torch.pow(torch.as_tensor(decay, dtype=torch.float64, device=count.device), count)
    return (1 - power).to(dtype)
