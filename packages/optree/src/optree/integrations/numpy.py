# SPDX-License-Identifier: Apache-2.0
"""Trees of NumPy arrays as one flat array."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
from numpy.typing import ArrayLike

from optree.ops import tree_flatten, tree_unflatten
from optree.typing import PyTreeSpec, PyTreeTypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeAlias


__all__ = ["ArrayLikeTree", "ArrayTree", "tree_ravel"]


ArrayLikeTree: TypeAlias = PyTreeTypeVar("ArrayLikeTree", ArrayLike)  # type: ignore[valid-type]
ArrayTree: TypeAlias = PyTreeTypeVar("ArrayTree", np.ndarray)  # type: ignore[valid-type]


def tree_ravel(
    tree: ArrayLikeTree,
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[np.ndarray[Any, Any], Callable[[np.ndarray[Any, Any]], ArrayTree]]:
    """Return the leaves of a tree as one flat array, and a function that restores the tree.

    Args:
        tree: A tree of arrays and numbers, of any shapes. If their types differ, they are cast to
            the common type (:func:`numpy.result_type`). A ``None`` leaf becomes NaN.
        is_leaf: See :func:`optree.tree_flatten`.
        none_is_leaf: See :func:`optree.tree_flatten`.
        namespace: See :func:`optree.tree_flatten`.

    Returns:
        A new array ``[number of elements]`` and a function from such an array to a tree of arrays
        with the original shapes and types. If all types were the same, that function does not check
        the type, and the arrays it returns share the memory of its argument.

    Raises:
        ValueError: Raised by the returned function if its argument has the wrong shape or type.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> import numpy as np
        >>> flat, unravel = tree_ravel({'bias': 5.0, 'weight': np.array([[1.0, 2.0], [3.0, 4.0]])})
        >>> flat
        array([5., 1., 2., 3., 4.])
        >>> unravel(10 * flat)
        {'bias': array(50.), 'weight': array([[10., 20.], [30., 40.]])}
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
    unravel: Callable[[Any], list[np.ndarray[Any, Any]]],
    flat: np.ndarray[Any, Any],
) -> ArrayTree:
    return tree_unflatten(treespec, unravel(flat))


def _ravel_leaves(
    leaves: list[Any],
) -> tuple[np.ndarray[Any, Any], Callable[[Any], list[np.ndarray[Any, Any]]]]:
    if not leaves:
        return np.zeros(0), _unravel_empty

    arrays = [np.asarray(np.nan if leaf is None else leaf) for leaf in leaves]
    shapes = tuple(array.shape for array in arrays)
    offsets = tuple(itertools.accumulate(array.size for array in arrays))
    dtypes = tuple(array.dtype for array in arrays)
    common_dtype = np.result_type(*dtypes)
    flat = np.concatenate([array.ravel().astype(common_dtype, copy=False) for array in arrays])
    if all(dtype == common_dtype for dtype in dtypes):
        return flat, functools.partial(_unravel_leaves_single_dtype, offsets, shapes)
    return flat, functools.partial(_unravel_leaves, offsets, shapes, dtypes, common_dtype)


def _check_shape(flat: np.ndarray[Any, Any], size: int) -> None:
    if flat.shape != (size,):
        raise ValueError(
            f"The unravel function expected an array of shape {(size,)}, got shape {flat.shape}.",
        )


def _unravel_empty(flat: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    _check_shape(np.asarray(flat), 0)
    return []


def _unravel_leaves_single_dtype(
    offsets: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    flat: np.ndarray[Any, Any],
) -> list[np.ndarray[Any, Any]]:
    flat = np.asarray(flat)
    _check_shape(flat, offsets[-1])
    parts = np.split(flat, offsets[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def _unravel_leaves(
    offsets: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[np.dtype[Any], ...],
    common_dtype: np.dtype[Any],
    flat: np.ndarray[Any, Any],
) -> list[np.ndarray[Any, Any]]:
    flat = np.asarray(flat)
    _check_shape(flat, offsets[-1])
    if flat.dtype != common_dtype:
        raise ValueError(
            f"The unravel function expected an array of dtype {common_dtype}, "
            f"got dtype {flat.dtype}.",
        )
    parts = np.split(flat, offsets[:-1])
    return [
        # A real leaf among complex ones drops its imaginary part on purpose, without a warning.
        (part.real if part.dtype.kind == "c" and dtype.kind != "c" else part)
        .reshape(shape)
        .astype(dtype)
        for part, shape, dtype in zip(parts, shapes, dtypes)
    ]
