# SPDX-License-Identifier: Apache-2.0
"""All names of optree, and arithmetic on trees of tensors."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optree import *  # noqa: F403
from optree import PyTreeSpec, tree_flatten, tree_leaves, tree_map
from optree import __all__ as _optree_names
from torchopt.typing import RRef, TensorTree

__all__ = [  # noqa: PLE0604
    *_optree_names,
    "tree_add",
    "tree_add_scalar_mul",
    "tree_flatten_as_tuple",
    "tree_matmul",
    "tree_mul",
    "tree_neg",
    "tree_pos",
    "tree_scalar_mul",
    "tree_sub",
    "tree_sub_scalar_mul",
    "tree_truediv",
    "tree_vdot_real",
    "tree_wait",
]


def tree_flatten_as_tuple(
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[tuple[Any, ...], PyTreeSpec]:
    """Return the leaves of a tree as a tuple, and its spec; see `optree.tree_flatten`."""
    leaves, spec = tree_flatten(tree, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace)
    return tuple(leaves), spec


def acc_add(*args: Any) -> Any:
    """Return the sum of the arguments."""
    return functools.reduce(operator.add, args)


def acc_mul(*args: Any) -> Any:
    """Return the product of the arguments."""
    return functools.reduce(operator.mul, args)


def acc_matmul(*args: Any) -> Any:
    """Return the matrix product of the arguments, from the left."""
    return functools.reduce(operator.matmul, args)


def tree_pos(tree: TensorTree) -> TensorTree:
    """Return +tree."""
    return tree_map(operator.pos, tree)


def tree_neg(tree: TensorTree) -> TensorTree:
    """Return -tree."""
    return tree_map(operator.neg, tree)


def tree_add(*trees: TensorTree) -> TensorTree:
    """Return the sum of trees.

    Example:
        >>> tree_add({"a": 1}, {"a": 2}, {"a": 3})
        {'a': 6}
    """
    return tree_map(acc_add, *trees)


def tree_add_scalar_mul(tree_x: TensorTree, tree_y: TensorTree, alpha: Any = None) -> TensorTree:
    """Return tree_x + alpha * tree_y; an alpha of None means 1."""
    if alpha is None:
        return tree_map(operator.add, tree_x, tree_y)
    return tree_map(lambda x, y: x + alpha * y, tree_x, tree_y)


def tree_sub(minuend_tree: TensorTree, subtrahend_tree: TensorTree) -> TensorTree:
    """Return the difference of two trees."""
    return tree_map(operator.sub, minuend_tree, subtrahend_tree)


def tree_sub_scalar_mul(tree_x: TensorTree, tree_y: TensorTree, alpha: Any = None) -> TensorTree:
    """Return tree_x - alpha * tree_y; an alpha of None means 1."""
    if alpha is None:
        return tree_map(operator.sub, tree_x, tree_y)
    return tree_map(lambda x, y: x - alpha * y, tree_x, tree_y)


def tree_mul(*trees: TensorTree) -> TensorTree:
    """Return the element-wise product of trees."""
    return tree_map(acc_mul, *trees)


def tree_matmul(*trees: TensorTree) -> TensorTree:
    """Return the matrix product of trees, leaf by leaf."""
    return tree_map(acc_matmul, *trees)


def tree_scalar_mul(scalar: Any, multiplicand_tree: TensorTree) -> TensorTree:
    """Return scalar * tree."""
    return tree_map(lambda x: scalar * x, multiplicand_tree)


def tree_truediv(dividend_tree: TensorTree, divisor_tree: TensorTree) -> TensorTree:
    """Return the element-wise quotient of two trees."""
    return tree_map(operator.truediv, dividend_tree, divisor_tree)


def tree_vdot_real(tree_x: TensorTree, tree_y: TensorTree) -> float:
    """Return the sum over leaves and elements of Re(conj(x) y), as a number.

    Example:
        >>> tree_vdot_real({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])})
        11.0
    """

    def vdot_real(x: Tensor, y: Tensor) -> float:
        x, y = x.contiguous(), y.contiguous()
        return float(torch.vdot(x.reshape(-1), y.reshape(-1)).real.item())

    return sum(tree_leaves(tree_map(vdot_real, tree_x, tree_y)))


def tree_wait(future_tree: Any) -> Any:
    """Wait for all futures of a tree, and return the tree of their results."""
    futures, spec = tree_flatten(future_tree)
    return spec.unflatten(torch.futures.wait_all(futures))


if RRef is not None:
    _rpc: Any = importlib.import_module("torch.distributed.rpc")
    __all__ += ["tree_as_rref", "tree_to_here"]
    _UNSET_TIMEOUT: float = getattr(_rpc.api, "UNSET_RPC_TIMEOUT")  # noqa: B009 - not exported

    def tree_as_rref(tree: TensorTree) -> Any:
        """Return a tree of remote references to the leaves."""
        return tree_map(_rpc.RRef, tree)

    def tree_to_here(rref_tree: Any, timeout: float = _UNSET_TIMEOUT) -> Any:
        """Return the values of a tree of remote references, copied to this process."""
        return tree_map(lambda x: x.to_here(timeout=timeout), rref_tree)

    def tree_local_value(rref_tree: Any) -> Any:
        """Return the values of a tree of remote references that this process owns."""
        return tree_map(lambda x: x.local_value(), rref_tree)
