# SPDX-License-Identifier: Apache-2.0
"""The leaves of a tree that are perturbed: floating-point ones, and complex ones as real pairs.

The gradient of a real loss L by z = a + ib is dL/da + i dL/db, as in torch, which is the gradient
by the pair (a, b).
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
    """Return a complex tensor as a real one, `[*shape, 2]`, or a real tensor unchanged."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_stored(x: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of `as_real`, given the original tensor."""
    return torch.view_as_complex(x.contiguous()) if like.is_complex() else x


class Layout:
    """A tree split into perturbed leaves and other leaves, which are kept.

    Attributes:
        leaves: The perturbed leaves as real tensors.
    """

    def __init__(self, tree: Any) -> None:
        self._flat, self._spec = tree_flatten(tree)
        self._places = [k for k, leaf in enumerate(self._flat) if is_perturbed(leaf)]
        self.leaves: list[Tensor] = [as_real(self._flat[k]) for k in self._places]

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Return the tree with other perturbed leaves."""
        return self._filled(list(self._flat), leaves)

    def gradient(self, leaves: Sequence[Tensor]) -> Any:
        """Return the tree with other perturbed leaves, and None for all other leaves."""
        return self._filled([None] * len(self._flat), leaves)

    def _filled(self, flat: list[Any], leaves: Sequence[Tensor]) -> Any:
        for k, x in zip(self._places, leaves, strict=True):
            flat[k] = as_stored(x, self._flat[k])
        return tree_unflatten(self._spec, flat)

    def name(self, leaf: int) -> str:
        """Return the path of a perturbed leaf, such as `$['fc1'].bias`."""
        return self._spec.accessors()[self._places[leaf]].codify("$")
