# SPDX-License-Identifier: Apache-2.0
"""Apply updates to parameters."""

from __future__ import annotations

import torch

from torchopt.tree import flatten_up_to, tree_flatten, tree_unflatten
from torchopt.typing import Params, Tensor, Updates

__all__ = ["apply_updates"]


def apply_updates(params: Params, updates: Updates, *, inplace: bool = True) -> Params:
    """Return ``params + updates``.

    Args:
        params: Tree of tensors.
        updates: Tree like ``params``; ``None`` leaves a parameter as it is.
        inplace: Write into the tensors of ``params``. The write is recorded in the tensors'
            version, so that a graph that still needs the old values refuses to run instead of using
            the new ones. With ``False`` the sum is differentiable with respect to both trees.

    Returns:
        A tree like ``params``; with ``inplace=True``, of the same tensors.

    Raises:
        ValueError: The trees differ.

    Example:
        >>> params = {"w": torch.ones(2), "b": torch.zeros(1)}
        >>> apply_updates(params, {"w": torch.full((2,), -0.5), "b": None}, inplace=False)
        {'w': tensor([0.5000, 0.5000]), 'b': tensor([0.])}
    """
    leaves, spec = tree_flatten(params, none_is_leaf=True)
    update_leaves = flatten_up_to(spec, updates, "apply_updates(params, updates)")

    def apply(p: Tensor | None, u: Tensor | None) -> Tensor | None:
        if p is None or u is None:
            return p
        if not inplace:
            return p.add(u)
        with torch.no_grad():
            return p.add_(u)

    return tree_unflatten(spec, [apply(p, u) for p, u in zip(leaves, update_leaves)])
