# SPDX-License-Identifier: Apache-2.0
"""Multiply updates by a number."""

from __future__ import annotations

from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.linear import Scale

__all__ = ["scale"]


@transformation
def scale(step_size: float | Tensor) -> LeafRule:
    """Return the transformation u = step_size * g.

    Args:
        step_size: The factor: a number, or a 0-dim tensor, which is differentiated.

    Example:
        >>> import torch
        >>> halve = scale(0.5)
        >>> updates, _ = halve.update({"w": torch.tensor([2.0])}, halve.init({"w": torch.zeros(1)}))
        >>> updates
        {'w': tensor([1.])}
    """
    return Scale(step_size)
