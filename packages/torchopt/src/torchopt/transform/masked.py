# SPDX-License-Identifier: Apache-2.0
"""Apply a transformation to some of the leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torchopt.base import Driver, GradientTransformation, require_transformation
from torchopt.transform.base import transformation
from torchopt.tree import flatten_up_to, prefix_leaves, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["MaskedNode", "MaskedState", "masked"]


class MaskedState(NamedTuple):
    """`inner_state`: the state of the inner transformation, for the leaves it is applied to."""

    inner_state: Any


class MaskedNode(NamedTuple):
    """Replaces a leaf that is left out. It is a tree node without children."""


def mask_leaves(mask: Any, tree: Any, what: str) -> list[bool]:
    """Return the value of a mask, or of a function that returns one, for each leaf of `tree`.

    Raises:
        ValueError: The mask is not a prefix of the tree; the message starts with `what`.
        TypeError: A leaf of the mask is not a bool.
    """
    kept = prefix_leaves(mask(tree) if callable(mask) else mask, tree, what)
    # A missing leaf needs no bool.
    absent = [leaf is None for leaf in tree_leaves(tree, none_is_leaf=True)]
    kept = [False if gone and value is None else value for value, gone in zip(kept, absent)]
    for value in kept:
        if not isinstance(value, bool):
            kind = type(value)
            name = kind.__name__ if kind.__name__ != "bool" else f"{kind.__module__}.bool"
            raise TypeError(
                f"{what}: expected a tree of bools, or a function that returns one for the "
                f"parameters; got a leaf of type {name}"
            )
    return kept


def part_of(leaves: Sequence[Any], labels: Sequence[Any], label: Any) -> list[Any]:
    """Return the leaves with a label, and a node without children for each of the others."""
    return [leaf if own == label else MaskedNode() for leaf, own in zip(leaves, labels)]


@dataclass(frozen=True)
class Masked(Driver):
    """Applies `inner` where the mask is true. It needs the tree, to which masks refer."""

    inner: GradientTransformation
    mask: Any
    needs_tree: ClassVar[bool] = True

    def _hide(self, tree: Any) -> tuple[Any, list[bool], Any]:
        leaves, spec = tree_flatten(tree, none_is_leaf=True)
        kept = mask_leaves(self.mask, tree, "masked(inner, mask)")
        return tree_unflatten(spec, part_of(leaves, kept, True)), kept, spec

    def init(self, params: Any) -> MaskedState:
        return MaskedState(inner_state=self.inner.init(self._hide(params)[0]))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Transform the updates where the mask is true; return the others unchanged."""
        visible, kept, spec = self._hide(updates if params is None else params)
        leaves = flatten_up_to(spec, updates, "updates")
        new_updates, inner_state = self.inner.update(
            tree_unflatten(spec, part_of(leaves, kept, True)),
            state.inner_state,
            params=None if params is None else visible,
            inplace=inplace,
        )
        new_leaves = flatten_up_to(spec, new_updates, "updates")
        merged = [new if keep else old for new, old, keep in zip(new_leaves, leaves, kept)]
        return tree_unflatten(spec, merged), MaskedState(inner_state=inner_state)


@transformation
def masked(
    inner: GradientTransformation,
    mask: Any | Callable[[Any], Any] | None = None,
) -> GradientTransformation:
    """Return the transformation that applies `inner` to the leaves where `mask` is true.

    Other leaves are returned unchanged and have no state.

    Args:
        inner: A transformation for trees.
        mask: A tree of bools that is a prefix of the tree of parameters (one bool applies to all
            leaves below it), or a function that returns such a tree for the parameters (for the
            updates if `update` is called without `params`). None applies `inner` to all leaves.

    Raises:
        ValueError: From `init` and `update`, when the mask is not a prefix of the parameters.
        TypeError: From `init` and `update`, when the mask has a leaf that is not a bool.

    Example:
        >>> import torch
        >>> from torchopt.transform import scale
        >>> freeze_b = masked(scale(0.0), {"w": False, "b": True})
        >>> grads = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> freeze_b.update(grads, freeze_b.init(grads))[0]
        {'w': tensor([1.]), 'b': tensor([0.])}
    """
    require_transformation(inner, "masked(inner, mask)")
    return Masked(inner, True if mask is None else mask).pair()
