# SPDX-License-Identifier: Apache-2.0
"""Trees of PyTorch tensors as one flat tensor."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable

import torch

from optree.ops import tree_flatten, tree_unflatten
from optree.typing import PyTreeSpec, PyTreeTypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeAlias


__all__ = ["TensorTree", "tree_ravel"]


TensorTree: TypeAlias = PyTreeTypeVar("TensorTree", torch.Tensor)  # type: ignore[valid-type]


def tree_ravel(
    tree: TensorTree,
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[torch.Tensor, Callable[[torch.Tensor], TensorTree]]:
    """Return the leaves of a tree as one flat tensor, and a function that restores the tree.

    Both directions are differentiable.

    Args:
        tree: A tree of tensors of any shapes, on one device. If their types differ, they are cast
            to the common type (:func:`torch.promote_types`).
        is_leaf: See :func:`optree.tree_flatten`.
        none_is_leaf: See :func:`optree.tree_flatten`.
        namespace: See :func:`optree.tree_flatten`.

    Returns:
        A new tensor ``[number of elements]`` and a function from such a tensor to a tree of tensors
        with the original shapes and types. If all types were the same, that function does not check
        the type, and the tensors it returns are views of its argument.

    Raises:
        ValueError: If a leaf is not a tensor. Raised by the returned function if its argument is
            not a tensor or has the wrong shape or type.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> import torch
        >>> tree = {'bias': torch.tensor(5.0), 'weight': torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> flat, unravel = tree_ravel(tree)
        >>> flat
        tensor([5., 1., 2., 3., 4.])
        >>> unravel(10 * flat)['weight']
        tensor([[10., 20.], [30., 40.]])
    """
    leaves, treespec = tree_flatten(
        tree,
        is_leaf=is_leaf,
        none_is_leaf=none_is_leaf,
        namespace=namespace,
    )
    flat, unravel = _ravel_leaves(leaves)
    return flat, functools.partial(_tree_unravel, treespec, unravel)


ravel_pytree = tree_ravel


def _tree_unravel(
    treespec: PyTreeSpec,
    unravel: Callable[[torch.Tensor], list[torch.Tensor]],
    flat: torch.Tensor,
) -> TensorTree:
    return tree_unflatten(treespec, unravel(flat))


def _ravel_leaves(
    leaves: list[Any],
) -> tuple[torch.Tensor, Callable[[torch.Tensor], list[torch.Tensor]]]:
    if not leaves:
        return torch.zeros(0), _unravel_empty
    if not all(torch.is_tensor(leaf) for leaf in leaves):
        raise ValueError("All leaves must be tensors.")

    sizes = tuple(leaf.numel() for leaf in leaves)
    shapes = tuple(leaf.shape for leaf in leaves)
    dtypes = tuple(leaf.dtype for leaf in leaves)
    common_dtype = functools.reduce(torch.promote_types, dtypes)
    flat = torch.cat([leaf.reshape(-1).to(common_dtype) for leaf in leaves])
    if all(dtype == common_dtype for dtype in dtypes):
        return flat, functools.partial(_unravel_leaves_single_dtype, sizes, shapes)
    return flat, functools.partial(_unravel_leaves, sizes, shapes, dtypes, common_dtype)


def _check_tensor(flat: Any, size: int) -> None:
    if not torch.is_tensor(flat):
        raise ValueError(f"Expected a tensor to unravel, got {type(flat)}.")
    if flat.shape != (size,):
        raise ValueError(
            f"The unravel function expected a tensor of shape {(size,)}, got shape {flat.shape}.",
        )


def _unravel_empty(flat: torch.Tensor) -> list[torch.Tensor]:
    _check_tensor(flat, 0)
    return []


def _unravel_leaves_single_dtype(
    sizes: tuple[int, ...],
    shapes: tuple[torch.Size, ...],
    flat: torch.Tensor,
) -> list[torch.Tensor]:
    _check_tensor(flat, sum(sizes))
    return [part.reshape(shape) for part, shape in zip(torch.split(flat, list(sizes)), shapes)]


def _unravel_leaves(
    sizes: tuple[int, ...],
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    common_dtype: torch.dtype,
    flat: torch.Tensor,
) -> list[torch.Tensor]:
    _check_tensor(flat, sum(sizes))
    if flat.dtype != common_dtype:
        raise ValueError(
            f"The unravel function expected a tensor of dtype {common_dtype}, "
            f"got dtype {flat.dtype}.",
        )
    return [
        # A real leaf among complex ones drops its imaginary part on purpose, without a warning.
        (part.real if part.is_complex() and not dtype.is_complex else part).reshape(shape).to(dtype)
        for part, shape, dtype in zip(torch.split(flat, list(sizes)), shapes, dtypes)
    ]
