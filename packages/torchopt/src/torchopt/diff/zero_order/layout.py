# SPDX-License-Identifier: Apache-2.0
"""What is perturbed: the floating-point leaves of a tree, complex ones as pairs of real numbers.

A real loss L of z = a + ib has the gradient dL/da + i dL/db, torch's convention: that of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["Layout", "as_real", "as_stored", "is_perturbed"]


def is_perturbed(leaf: Any) -> bool:
    """Return whether a leaf is a tensor that can be perturbed."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def as_real(x: Tensor) -> Tensor:
    """Return a complex `[*shape]` as real `[*shape, 2]`, a view where it can be; others as such."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_stored(x: Tensor, like: Tensor) -> Tensor:
    """Return what `as_real` made real as complex again."""
    return torch.view_as_complex(x.contiguous()) if like.is_complex() else x


class Layout:
    """A tree taken apart into the leaves that are perturbed and the others, which are kept.

    Attributes:
        leaves: The perturbed leaves, real.
    """

    def __init__(self, tree: Any) -> None:
        self._flat, self._spec = tree_flatten(tree)
        self._places = [k for k, leaf in enumerate(self._flat) if is_perturbed(leaf)]
        self.leaves: list[Tensor] = [as_real(self._flat[k]) for k in self._places]

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Return the tree with other perturbed leaves."""
        return self._filled(list(self._flat), leaves)

    def gradient(self, leaves: Sequence[Tensor]) -> Any:
        """Return the tree with other perturbed leaves, and None for what is not perturbed."""
        return self._filled([None] * len(self._flat), leaves)

    def _filled(self, flat: list[Any], leaves: Sequence[Tensor]) -> Any:
        for k, x in zip(self._places, leaves, strict=True):
            flat[k] = as_stored(x, self._flat[k])
        return tree_unflatten(self._spec, flat)

    def name(self, leaf: int) -> str:
        """Return the place of a perturbed leaf, such as `$['fc1'].bias`."""
        return self._spec.accessors()[self._places[leaf]].codify("$")
