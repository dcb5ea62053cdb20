# SPDX-License-Identifier: Apache-2.0
"""Replace NaN and infinite updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation_of

__all__ = ["nan_to_num"]


@dataclass(frozen=True)
class NanToNum(LeafRule):
    """u = torch.nan_to_num(g)."""

    nan: float | Tensor = 0.0
    posinf: float | Tensor | None = None
    neginf: float | Tensor | None = None
    widens: ClassVar[bool] = False  # the largest number depends on the dtype

    def moved(self, g: Tensor, p: Any) -> Tensor:
        nan, posinf, neginf = (
            None if isinstance(value, Tensor) else value
            for value in (self.nan, self.posinf, self.neginf)
        )
        out = g.nan_to_num(nan, posinf, neginf)
        if isinstance(self.nan, Tensor):
            out = torch.where(g.isnan(), self.nan.to(g), out)
        if isinstance(self.posinf, Tensor):
            out = torch.where(g == math.inf, self.posinf.to(g), out)
        if isinstance(self.neginf, Tensor):
            out = torch.where(g == -math.inf, self.neginf.to(g), out)
        return out


@transformation_of(NanToNum)
def nan_to_num() -> None:
    """Return the transformation that replaces NaN and infinities in updates.

    Args:
        nan: The value for NaN: a number, or a 0-dim tensor, which is differentiated.
        posinf: The value for +inf; None for the largest number of the dtype.
        neginf: The value for -inf; None for the smallest number of the dtype.

    Example:
        >>> import torch
        >>> clean = nan_to_num(nan=1.0)
        >>> clean.update([torch.tensor([float("nan"), 2.0])], clean.init([torch.zeros(2)]))[0]
        [tensor([1., 2.])]
    """
