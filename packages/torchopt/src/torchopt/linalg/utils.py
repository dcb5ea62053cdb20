# SPDX-License-Identifier: Apache-2.0
"""Linear operators given as a callable, a matrix or a tree of matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["cat_shapes", "check_like", "normalize_matvec"]


def cat_shapes(tree: Any) -> tuple[int, ...]:
    """Return the concatenated shapes of all leaves of a tree."""
    return tuple(itertools.chain.from_iterable(tuple(leaf.shape) for leaf in tree_leaves(tree)))


def check_like(x0: Any, b: Any) -> None:
    """Raise unless the leaves of x0 and b have the same shapes.

    Raises:
        ValueError: The shapes differ.
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(x0)]
    expected = [tuple(leaf.shape) for leaf in tree_leaves(b)]
    if shapes != expected:
        raise ValueError(f"Tensors in x0 and b must have matching shapes: {shapes} vs. {expected}.")


def normalize_matvec(matvec: Any) -> Callable[[Any], Any]:
    """Return v -> A v for a callable, a square matrix or a tree of square matrices.

    Raises:
        TypeError: A matrix is not square, or a leaf is not a tensor.
    """
    if callable(matvec):
        return matvec  # type: ignore[no-any-return]
    matrices = tree_leaves(matvec)
    for matrix in matrices:
        if not isinstance(matrix, Tensor):
            raise TypeError(
                "Linear operator must be a callable, a matrix or a tree of matrices, but has a "
                f"leaf of type {type(matrix).__name__}"
            )
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise TypeError(
                f"Linear operator must be a square matrix, but has shape: {tuple(matrix.shape)}"
            )

    def apply(x: Any) -> Any:
        leaves, spec = tree_flatten(x)
        if len(leaves) != len(matrices):
            raise ValueError(
                f"Linear operator has {len(matrices)} matrices, but the tensors have "
                f"{len(leaves)} leaves."
            )
        return tree_unflatten(spec, [A @ v for A, v in zip(matrices, leaves)])

    return apply
