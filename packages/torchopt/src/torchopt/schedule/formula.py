# SPDX-License-Identifier: Apache-2.0
"""Functions of numbers or tensors, so that one formula of a schedule serves both."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["choose", "cosine", "floor", "lifted", "part", "power"]


def lifted(*values: Any) -> tuple[Any, ...]:
    """Return `values` as they are, or all as float64 tensors on one device if one is a tensor.

    The device is that of the first tensor that is not on the CPU, if there is one.
    """
    devices = [value.device for value in values if isinstance(value, torch.Tensor)]
    if not devices:
        return values
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    return tuple(torch.as_tensor(value, dtype=torch.float64, device=device) for value in values)


def choose(condition: Any, first: Any, second: Any) -> Any:
    """Return `first` where the condition holds, else `second`."""
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, first, second)
    return first if condition else second


def part(count: Any, begin: int, steps: int | None = None) -> Any:
    """Return (count - begin) / steps, clamped to [0, 1]; without `steps`, max(count - begin, 0).

    The difference is exact even if the count has more digits than a float64.
    """
    (elapsed,) = lifted(count - begin)
    if isinstance(elapsed, torch.Tensor):
        return elapsed.clamp(min=0) if steps is None else elapsed.clamp(0, steps) / steps
    return max(elapsed, 0) if steps is None else min(max(elapsed, 0), steps) / steps


def power(base: Any, exponent: Any) -> Any:
    """Return base ** exponent. For numbers, inf or NaN replaces exceptions and complex results."""
    if isinstance(base, torch.Tensor) or isinstance(exponent, torch.Tensor):
        return base**exponent
    try:
        value = float(base) ** exponent
    except (OverflowError, ZeroDivisionError):
        value = None
    if isinstance(value, float):
        return value
    return (torch.tensor(base, dtype=torch.float64) ** exponent).item()


def cosine(x: Any) -> Any:
    """Return the cosine."""
    return torch.cos(x) if isinstance(x, torch.Tensor) else math.cos(x)


def floor(x: Any) -> Any:
    """Return x rounded down to a whole number, as a float or tensor."""
    return torch.floor(x) if isinstance(x, torch.Tensor) else float(math.floor(x))
