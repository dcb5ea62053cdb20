# SPDX-License-Identifier: Apache-2.0
"""Multiply updates by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.tree_function import any_watched, are_plain

__all__ = ["scale"]


@dataclass(frozen=True)
class Scale(LeafRule):
    """u = sign * step_size * g, with `sign` 1 or -1."""

    step_size: float | Tensor
    sign: int = 1
    keeps_sparse: ClassVar[bool] = True

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the scaled gradients."""
        step_size = self.sign * self.step_size
        if isinstance(step_size, torch.Tensor):
            return [g * step_size.to(g) for g in grads], state
        if grads and are_plain(grads) and not any_watched(grads):
            return list(torch._foreach_mul(grads, step_size)), state
        return [g * step_size for g in grads], state


@transformation
def scale(step_size: float | Tensor) -> LeafRule:
    """Return the transformation u = step_size * g.

    Args:
        step_size: A number, or a 0-dim tensor with respect to which the updates are differentiable.

    Example:
        >>> halve = scale(0.5)
        >>> updates, _ = halve.update({"w": torch.tensor([2.0])}, halve.init({"w": torch.zeros(1)}))
        >>> updates
        {'w': tensor([1.])}
    """
    return Scale(step_size)
