# SPDX-License-Identifier: Apache-2.0
"""Replace NaN and infinite updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.transform.base import LeafRule, transformation

__all__ = ["nan_to_num"]


@dataclass(frozen=True)
class NanToNum(LeafRule):
    """u = torch.nan_to_num(g)."""

    nan: float
    posinf: float | None
    neginf: float | None

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the updates with numbers in place of NaN and infinities."""
        return [g.nan_to_num(self.nan, self.posinf, self.neginf) for g in grads], state


@transformation
def nan_to_num(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> LeafRule:
    """Return the transformation that replaces NaN and infinities in updates.

    Args:
        nan: What replaces NaN.
        posinf: What replaces +inf; None stands for the largest number of the dtype.
        neginf: What replaces -inf; None stands for the smallest number of the dtype.

    Example:
        >>> import torch
        >>> clean = nan_to_num(nan=1.0)
        >>> clean.update([torch.tensor([float("nan"), 2.0])], clean.init([torch.zeros(2)]))[0]
        [tensor([1., 2.])]
    """
    return NanToNum(nan, posinf, neginf)
