# SPDX-License-Identifier: Apache-2.0
"""Objectives to be minimised, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import count_transforms, is_differentiated
from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["objective_value", "tree_grad"]


def objective_value(value: Any) -> Tensor:
    """Check and return the value of an objective, inside the transform for its gradient.

    Raises:
        NotDifferentiableError: The value does not depend on the variables, so that every start
            would seem to be a minimum.
        TypeError: The value is not a 0-dim floating-point tensor.
    """
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"{value.dtype} of shape {tuple(value.shape)}"
        raise TypeError(
            "solver: function: expected a 0-dim floating-point tensor, which is minimised, got "
            f"{got}; return the loss alone, summed or averaged."
        )
    if not is_differentiated(value, count_transforms()):
        raise NotDifferentiableError(
            "solver: function: expected an objective that depends on its first argument, got one "
            "that does not: every point would be a minimum. Compute it from that argument, without "
            ".detach(), .data or .item()."
        )
    return value


def tree_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ∇f with respect to the first argument, a tree like it, which may contain None."""

    def gradient(x: Any, *args: Any) -> Any:
        leaves, spec = tree_flatten(x)

        def value(leaves: list[Tensor]) -> Tensor:
            return objective_value(function(tree_unflatten(spec, leaves), *args))

        found = torch.func.grad(value)(leaves)
        return tree_unflatten(spec, found)

    return gradient
