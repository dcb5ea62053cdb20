# SPDX-License-Identifier: Apache-2.0
"""The sign of a number, where NaN stays visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["sign"]


def sign(x: Tensor) -> Tensor:
    """Return -1, 0 or 1, with the derivative 0, and NaN for NaN, for which torch.sign has 0.

    Example:
        >>> sign(torch.tensor([-3.0, 0.0, float("nan")]))
        tensor([-1., 0., nan])
    """
    return torch.where(x.isnan(), torch.nan, torch.sign(x))
