# SPDX-License-Identifier: Apache-2.0
"""Decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.linear import AddDecayedWeights
from torchopt.transform.masked import MaskedNode, MaskedState, masked
from torchopt.transform.validate import check

__all__ = ["MaskedNode", "MaskedState", "add_decayed_weights", "masked"]


@transformation
def add_decayed_weights(
    weight_decay: float | Tensor = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
) -> LeafRule | GradientTransformation | None:
    """Return the transformation u = g + weight_decay * p.

    Args:
        weight_decay: Coefficient of the decay, >= 0, a number or a 0-dim tensor; with 0 and no mask
            the result is the identity.
        mask: Which parameters decay; see `masked`.

    Raises:
        ValueError: A negative `weight_decay`.
        AssertionError: From `update`, when it is called without `params`.

    Example:
        >>> import torch
        >>> decay = add_decayed_weights(0.5)
        >>> p, g = torch.tensor([2.0]), torch.tensor([1.0])
        >>> decay.update(g, decay.init(p), params=p)[0]
        tensor([2.])
    """
    check(weight_decay, "a number >= 0", "weight_decay value")
    if mask is not None:
        return masked(add_decayed_weights(weight_decay), mask)
    if not isinstance(weight_decay, torch.Tensor) and weight_decay == 0.0:
        return None
    return AddDecayedWeights(weight_decay)
