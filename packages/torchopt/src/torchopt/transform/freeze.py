# SPDX-License-Identifier: Apache-2.0
"""Leave some parameters unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torchopt.base import Driver, EmptyState, GradientTransformation
from torchopt.transform.masked import mask_leaves
from torchopt.tree import flatten_up_to, tree_flatten, tree_unflatten

__all__ = ["freeze"]


@dataclass(frozen=True)
class Freeze(Driver):
    """Removes the updates where the mask is true."""

    mask: Any
    needs_tree: ClassVar[bool] = True

    def init(self, params: Any) -> EmptyState:
        """Check the mask and return the empty state."""
        mask_leaves(self.mask, params, "freeze(mask)")
        return EmptyState()

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Replace the updates of frozen parameters by None."""
        leaves, spec = tree_flatten(updates if params is None else params, none_is_leaf=True)
        frozen = mask_leaves(self.mask, tree_unflatten(spec, leaves), "freeze(mask)")
        values = flatten_up_to(spec, updates, "updates")
        kept = [None if is_frozen else u for u, is_frozen in zip(values, frozen)]
        return tree_unflatten(spec, kept), state


def freeze(mask: Any | Callable[[Any], Any] = True) -> GradientTransformation:
    """Return the transformation that removes the updates of parameters where `mask` is true.

    As the first member of a chain, it also leaves the states of frozen parameters unchanged.

    Args:
        mask: A tree of bools that is a prefix of the parameters, or a function that returns one;
            see `masked`.

    Raises:
        ValueError: From `init` and `update`, when the mask is not a prefix of the parameters.
        TypeError: From `init` and `update`, when the mask has a leaf that is not a bool.

    Example:
        >>> import torch, torchopt
        >>> optimizer = torchopt.chain(freeze({"body": True, "head": False}), torchopt.sgd(0.5))
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> optimizer.update(params, optimizer.init(params), params=params)[0]
        {'body': None, 'head': tensor([-0.5000])}
    """
    return Freeze(mask).pair()
