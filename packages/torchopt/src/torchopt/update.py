# SPDX-License-Identifier: Apache-2.0
"""Apply updates to parameters."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from torchopt.errors import MismatchError
from torchopt.tree import describe_mismatch, flatten_up_to, located, tree_flatten, tree_unflatten
from torchopt.typing import Params, Tensor, Updates

__all__ = ["apply_updates"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


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
        MismatchError: An update has another shape than its parameter, or is on another device.

    Example:
        >>> params = {"w": torch.ones(2), "b": torch.zeros(1)}
        >>> apply_updates(params, {"w": torch.full((2,), -0.5), "b": None}, inplace=False)
        {'w': tensor([0.5000, 0.5000]), 'b': tensor([0.])}
    """
    leaves, spec = tree_flatten(params, none_is_leaf=True)
    update_leaves = flatten_up_to(spec, updates, "apply_updates(params, updates)")

    moved = [
        i for i, (p, u) in enumerate(zip(leaves, update_leaves)) if p is not None and u is not None
    ]
    ps, us = [leaves[i] for i in moved], [update_leaves[i] for i in moved]
    # One call for all tensors, which torch.func transforms have no rules for.
    together = bool(moved) and _are_plain(ps) and _are_plain(us)
    try:
        if inplace:
            _add_(ps, us, together)
        else:
            summed = torch._foreach_add(ps, us) if together else [p.add(u) for p, u in zip(ps, us)]
            for i, p in zip(moved, summed):
                leaves[i] = p
    except RuntimeError as error:
        for i, p, u in zip(moved, ps, us):
            reason = describe_mismatch(p, u)
            if reason is not None:
                reason = f"apply_updates(params, updates): an update like the parameter: {reason}"
                raise located(MismatchError(i, reason), spec) from error
        raise
    return tree_unflatten(spec, leaves)


@torch.no_grad()
def _add_(params: list[Tensor], updates: list[Tensor], together: bool) -> None:
    if together:
        torch._foreach_add_(params, updates)
        return
    for p, u in zip(params, updates):
        p.add_(u)


def _are_plain(tensors: list[Tensor]) -> bool:
    """Return whether no transform follows the tensors, and no subclass has a say."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return (
        forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and all(type(x) in _PLAIN and not wrapped(x) for x in tensors)
    )
