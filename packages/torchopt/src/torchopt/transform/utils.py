# SPDX-License-Identifier: Apache-2.0
"""Building blocks for transformations that are defined outside of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.transform.base import with_flattened
from torchopt.tree import tree_map
from torchopt.tree_function import placed_like

__all__ = ["inc_count", "tree_map_flat", "tree_map_flat_", "update_moment"]

INT64_MAX = torch.iinfo(torch.int64).max


def tree_map_flat(
    func: Callable[..., Any],
    flat_arg: Sequence[Any],
    *flat_args: Any,
    none_is_leaf: bool = False,
) -> Sequence[Any]:
    """Map `func` over lists of leaves; None in the first list stays None unless `none_is_leaf`."""
    rows = zip(flat_arg, *flat_args)
    mapped = [func(*row) if none_is_leaf or row[0] is not None else None for row in rows]
    return mapped if isinstance(flat_arg, list) else tuple(mapped)


def tree_map_flat_(
    func: Callable[..., Any],
    flat_arg: Sequence[Any],
    *flat_args: Any,
    none_is_leaf: bool = False,
) -> Sequence[Any]:
    """Call `func` on lists of leaves for its side effects and return the first list."""
    tree_map_flat(func, flat_arg, *flat_args, none_is_leaf=none_is_leaf)
    return flat_arg


def inc_count(updates: Any, count: Any) -> Any:
    """Return the tree of counts plus one where there is an update.

    Counts saturate at the largest int64.
    """

    def increment(c: Tensor, g: Tensor | None) -> Tensor:
        return c if g is None else c + (c != INT64_MAX).to(torch.int64)

    return tree_map(lambda g, c: increment(c, g), updates, count, none_is_leaf=True)


def update_moment(
    updates: Any, moments: Any, decay: float, *, order: int, inplace: bool = True
) -> Any:
    """Return decay * moment + (1 - decay) * update ** order where there is an update.

    Args:
        updates: Tree of tensors or None.
        moments: Tree like `updates`.
        decay: Decay of the moments, in [0, 1).
        order: 1 or 2.
        inplace: Write into `moments`.

    Raises:
        ValueError: Another `order`.
    """
    if order not in (1, 2):
        raise ValueError(f"expected order 1 or 2, got {order}")

    def moved(g: Tensor | None, t: Tensor | None) -> Tensor | None:
        if g is None or t is None:
            return t
        new = t * decay + (g if order == 1 else g * g) * (1 - decay)
        return t.copy_(placed_like(t, new)) if inplace else new

    return tree_map(moved, updates, moments, none_is_leaf=True)


def _for_trees_and_lists(function: Callable[..., Any]) -> None:
    """Give `function` the attributes `flat` and `impl`; lists of leaves are trees, too."""

    @functools.wraps(function)
    def impl(*args: Any, already_flattened: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    vars(impl)["__signature__"] = with_flattened(function)
    vars(function).update(flat=function, impl=impl)


_for_trees_and_lists(inc_count)
_for_trees_and_lists(update_moment)
