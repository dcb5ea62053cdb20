# SPDX-License-Identifier: Apache-2.0
"""Apply updates to parameters."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from torchopt.errors import LeafTypeError, MismatchError
from torchopt.precision import forget_casts
from torchopt.torch_internals import foreach_add_, overlaps_itself
from torchopt.tree import (
    PyTreeSpec,
    advice_for,
    describe_mismatch,
    first_of_another_shape,
    flatten_up_to,
    located,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from torchopt.tree_function import add_lists, are_plain, placed_like
from torchopt.typing import Params, Tensor, Updates

__all__ = ["add_", "apply_updates", "writable"]


def apply_updates(params: Params, updates: Updates, *, inplace: bool = True) -> Params:
    """Return ``params + updates``.

    Args:
        params: Tree of tensors.
        updates: Tree like ``params``; ``None`` leaves a parameter as it is.
        inplace: Write into the tensors of ``params``. The write increments their version counters,
            so that a graph that still needs the old values raises instead of using the new ones.
            With ``False`` the sum is differentiable with respect to both trees.

    Returns:
        A tree like ``params``; with ``inplace=True`` it holds the same tensors.

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

    moved, ps, us = _moved(leaves, update_leaves, spec)
    try:
        if inplace:
            add_(ps, us)
        else:
            together = _are_one_call(ps, us)
            summed = add_lists(ps, us) if together else [p.add(u) for p, u in zip(ps, us)]
            for i, p in zip(moved, summed):
                leaves[i] = p
    except TypeError:
        _require_tensors(moved, ps, us, spec)
        raise
    except RuntimeError as error:
        for i, p, u in zip(moved, ps, us):
            if describe_mismatch(p, u) is not None:
                raise _mismatch(i, p, u, spec) from error
        raise
    return tree_unflatten(spec, leaves)


def _moved(
    leaves: list[Any], update_leaves: list[Any], spec: PyTreeSpec
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Return the indices of the leaves that have an update, those leaves, and their updates."""
    moved = [
        i for i, (p, u) in enumerate(zip(leaves, update_leaves)) if p is not None and u is not None
    ]
    ps, us = [leaves[i] for i in moved], [update_leaves[i] for i in moved]
    if len(moved) < len(leaves):
        for i, u in enumerate(update_leaves):
            if leaves[i] is None and tree_leaves(u):
                _require_tensors([i], [None], [u], spec)
    try:
        wrong = first_of_another_shape(ps, us)
    except AttributeError:
        _require_tensors(moved, ps, us, spec)
        raise
    if wrong is not None:
        raise _mismatch(moved[wrong], ps[wrong], us[wrong], spec)
    return moved, ps, us


def writable(params: Params, updates: Updates) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that have an update, and their updates, for `add_`.

    The errors that `apply_updates(params, updates, inplace=True)` would raise half-way are raised
    here, before anything is written.

    Raises:
        ValueError: The trees differ.
        MismatchError: An update cannot be added to its parameter in place.
    """
    leaves, spec = tree_flatten(params, none_is_leaf=True)
    moved, ps, us = _moved(leaves, flatten_up_to(spec, updates, "updates"), spec)
    for i, p, u in zip(moved, ps, us):
        reason = _why_not_writable(p, u)
        if reason is not None:
            raise located(MismatchError(i, reason), spec)
    return ps, us


def _why_not_writable(p: Tensor, u: Tensor) -> str | None:
    if p.device != u.device:
        return f"an update like the parameter: {describe_mismatch(p, u)}"
    if u.dtype is not p.dtype and not torch.can_cast(u.dtype, p.dtype):
        return f"expected an update that fits {p.dtype}, got {u.dtype}"
    if p.is_inference() and not torch.is_inference_mode_enabled():
        return "expected a parameter to write to, got an inference tensor; clone it first"
    if p.layout is torch.strided and overlaps_itself(p):
        return "expected a parameter to write to, got an expanded tensor; clone it first"
    if p.layout is not torch.strided and u.layout is torch.strided:
        return f"expected a dense parameter, got one of layout {p.layout}"
    return None


def _mismatch(index: int, p: Tensor, u: Tensor, spec: PyTreeSpec) -> MismatchError:
    reason = f"an update like the parameter: {describe_mismatch(p, u)}"
    if p.shape != u.shape:
        reason += "; updates are not broadcast, expand one that is meant for every element"
    return located(MismatchError(index, f"apply_updates(params, updates): {reason}"), spec)


def _require_tensors(
    where: list[int], params: list[Any], updates: list[Any], spec: PyTreeSpec
) -> None:
    for index, pair in zip(where, zip(params, updates)):
        for what, x in zip(("a parameter", "an update"), pair):
            if not isinstance(x, Tensor):
                kind = f"{type(x).__name__}; {advice_for(x)}"
                if x is None:
                    kind = "None; pass the tree that the updates are for"
                reason = f"apply_updates(params, updates): {what}: expected a tensor, got {kind}"
                raise located(LeafTypeError(index, reason), spec)


def share_memory(tensors: list[Tensor]) -> bool:
    """Return whether the memory of two tensors overlaps, where kernels for lists would race."""
    spans = sorted(_span(x) for x in tensors if x.numel())
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def _span(x: Tensor) -> tuple[int, int]:
    """Return the address of the first element of a dense tensor, and that after the last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _are_one_call(params: list[Tensor], updates: list[Tensor]) -> bool:
    """Return whether one operation on lists can add all: torch.func has no rules for those."""
    if not params or not are_plain(params, updates):
        return False
    return not (params[0].is_cuda and share_memory(params))


@torch.no_grad()
def add_(params: list[Tensor], updates: list[Tensor]) -> None:
    """Add updates to parameters in place, tensor by tensor."""
    forget_casts()
    if _are_one_call(params, updates):
        try:
            foreach_add_(params, updates)
            return
        except RuntimeError:  # torch does not write to lists with a pending negation
            if not any(p.is_neg() for p in params):
                raise
    for p, u in zip(params, updates):
        p.add_(placed_like(p, u))
