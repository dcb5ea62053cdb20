# SPDX-License-Identifier: Apache-2.0
"""Transposed, normal, shifted and materialised products on trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import transpose_linear
from torchopt.tree import tree_map

__all__ = ["make_normal_matvec", "make_ridge_matvec", "make_rmatvec", "materialize_matvec"]

TreeMap = Callable[[Any], Any]


def make_rmatvec(matvec: TreeMap, x: Any) -> TreeMap:
    """Return v -> Aᴴ v for matvec: v -> A v.

    Args:
        matvec: A linear function of trees.
        x: A tree with the structure and shapes of the argument of matvec.
    """
    layout = Layout.of(x, "make_rmatvec: x")
    pull = transpose_linear(
        lambda v: layout.ravel(matvec(layout.unravel(v)), "make_rmatvec: output of matvec"),
        layout.ravel(x),
    )
    return lambda y: layout.unravel(pull(layout.ravel(y, "rmatvec")))


def make_normal_matvec(matvec: TreeMap) -> TreeMap:
    """Return v -> Aᴴ A v for matvec: v -> A v."""

    def normal_matvec(x: Any) -> Any:
        return make_rmatvec(matvec, x)(matvec(x))

    return normal_matvec


def make_ridge_matvec(matvec: TreeMap, ridge: float | Tensor = 0.0) -> TreeMap:
    """Return v -> A v + ridge v for matvec: v -> A v."""

    def ridge_matvec(v: Any) -> Any:
        return tree_map(lambda Av, x: Av + ridge * x, matvec(v), v)

    return ridge_matvec


def materialize_matvec(
    matvec: TreeMap, x: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Any], Tensor], Callable[[Tensor], Any]]:
    """Return the matrix of matvec: v -> A v, for all leaves together.

    Args:
        matvec: A linear function of trees.
        x: A tree with the structure and shapes of the argument of matvec.

    Returns:
        (A, matvec on vectors, tree -> vector, vector -> tree). A is [n, n], where n is the number
        of elements of all leaves.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve.utils import materialize_matvec
        >>> A, *_ = materialize_matvec(lambda v: (2 * v[0] + v[1], 3 * v[1]), (torch.ones(1),) * 2)
        >>> A
        tensor([[2., 1.],
                [0., 3.]])
    """
    layout = Layout.of(x, "materialize_matvec: x")

    def ravel(tree: Any) -> Tensor:
        return layout.ravel(tree, "materialize_matvec: tree")

    def flat(v: Tensor) -> Tensor:
        return ravel(matvec(layout.unravel(v)))

    like = ravel(x)
    eye = torch.eye(layout.size, dtype=like.dtype, device=like.device)
    return torch.func.vmap(flat)(eye).T, flat, ravel, layout.unravel
