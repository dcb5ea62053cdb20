# SPDX-License-Identifier: Apache-2.0
"""Reduce all leaves to one value."""

from __future__ import annotations

import builtins
import functools
from typing import TYPE_CHECKING, Any, Callable, ClassVar, overload

import optree._C as _C
from optree.typing import S, T

if TYPE_CHECKING:
    from optree.typing import PyTree, PyTreeNode


class MissingSentinel:
    """The type of :data:`MISSING`, the default of parameters that accept ``None`` as a value."""

    __slots__: ClassVar[tuple[()]] = ()

    def __repr__(self, /) -> str:
        """Show that there is no default value."""
        return "<MISSING>"


MISSING: Any = MissingSentinel()


@overload
def tree_reduce(
    func: Callable[[T, T], T],
    tree: PyTreeNode[T],
    /,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_reduce(
    func: Callable[[T, T], T],
    tree: PyTree[T],
    /,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_reduce(
    func: Callable[[T, S], T],
    tree: PyTreeNode[S],
    /,
    initial: T,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_reduce(
    func: Callable[[T, S], T],
    tree: PyTree[S],
    /,
    initial: T,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


def tree_reduce(
    func: Callable[[T, S], T],
    tree: PyTree[S],
    /,
    initial: T = MISSING,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T:
    """Return :func:`functools.reduce` of the leaves of a tree.

    Args:
        func: Called with the value so far and the next leaf.
        tree: A tree.
        initial: The value before the first leaf, by default the first leaf.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        The last value.

    Raises:
        TypeError: If the tree has no leaves and there is no ``initial``.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_reduce(lambda x, y: x + y, {'b': (2, [3, 4]), 'a': 1})
        10
        >>> tree_reduce(lambda x, y: x + y, [], 0)
        0
    """
    leaves: Any = _C.leaves(tree, is_leaf, none_is_leaf, namespace)
    if initial is MISSING:
        reduced: T = functools.reduce(func, leaves)
    else:
        reduced = functools.reduce(func, leaves, initial)
    return reduced


@overload
def tree_sum(
    tree: PyTreeNode[T],
    /,
    start: T = ...,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_sum(
    tree: PyTree[T],
    /,
    start: T = ...,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


def tree_sum(
    tree: PyTree[T],
    /,
    start: T = 0,  # type: ignore[assignment]
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T:
    """Return the sum of ``start`` and the leaves of a tree.

    Args:
        tree: A tree.
        start: The first summand. If it is a string, bytes, or bytearray, leaves are joined.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        The sum.

    Raises:
        Exception: The errors of :func:`optree.tree_flatten`, and those of ``+`` or ``join``.

    Examples:
        >>> tree_sum({'b': (2, [3, 4]), 'a': 1})
        10
        >>> tree_sum({'b': 'c', 'a': 'b'}, start='a')
        'abc'
    """
    leaves: Any = _C.leaves(tree, is_leaf, none_is_leaf, namespace)
    joined: Any = start
    if isinstance(start, str):
        joined = "".join([start, *leaves])
    elif isinstance(start, (bytes, bytearray)):
        joined = type(start)().join([start, *leaves])
    else:
        joined = builtins.sum(leaves, joined)
    result: T = joined
    return result


@overload
def tree_max(
    tree: PyTreeNode[T],
    /,
    *,
    default: T = ...,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_max(
    tree: PyTree[T],
    /,
    *,
    default: T = ...,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


def tree_max(
    tree: PyTree[T],
    /,
    *,
    default: T = MISSING,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T:
    """Return the largest leaf of a tree.

    Args:
        tree: A tree.
        default: What to return if the tree has no leaves.
        key: Computes the value to compare from a leaf. By default leaves are compared themselves.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        The first of the largest leaves.

    Raises:
        ValueError: If the tree has no leaves and there is no ``default``.
        Exception: The errors of :func:`optree.tree_flatten`, and those of ``key`` and comparisons.

    Examples:
        >>> tree_max({'b': (2, [-4, 3]), 'a': 1}), tree_max([1, -2], key=abs)
        (3, -2)
        >>> tree_max([], default=0)
        0
    """
    leaves: Any = _C.leaves(tree, is_leaf, none_is_leaf, namespace)
    if default is MISSING:
        largest: T = builtins.max(leaves, key=key)
    else:
        largest = builtins.max(leaves, default=default, key=key)
    return largest


@overload
def tree_min(
    tree: PyTreeNode[T],
    /,
    *,
    default: T = ...,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


@overload
def tree_min(
    tree: PyTree[T],
    /,
    *,
    default: T = ...,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T: ...


def tree_min(
    tree: PyTree[T],
    /,
    *,
    default: T = MISSING,
    key: Callable[[T], Any] | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> T:
    """Return the smallest leaf of a tree.

    Args:
        tree: A tree.
        default: What to return if the tree has no leaves.
        key: Computes the value to compare from a leaf. By default leaves are compared themselves.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        The first of the smallest leaves.

    Raises:
        ValueError: If the tree has no leaves and there is no ``default``.
        Exception: The errors of :func:`optree.tree_flatten`, and those of ``key`` and comparisons.

    Examples:
        >>> tree_min({'b': (2, [-4, 3]), 'a': 1}), tree_min([1, -2], key=abs)
        (-4, 1)
        >>> tree_min([], default=0)
        0
    """
    leaves: Any = _C.leaves(tree, is_leaf, none_is_leaf, namespace)
    if default is MISSING:
        smallest: T = builtins.min(leaves, key=key)
    else:
        smallest = builtins.min(leaves, default=default, key=key)
    return smallest


def tree_all(
    tree: PyTree[T],
    /,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether all leaves of a tree are true. Stop at the first one that is not.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if all leaves are true, and also if there are none.

    Raises:
        Exception: The errors of :func:`optree.tree_flatten`, and those of ``bool(leaf)``.

    Examples:
        >>> tree_all({'b': (2, [3]), 'a': 1}), tree_all([1, 0]), tree_all([None])
        (True, False, True)
    """
    return all(_C.PyTreeIter(tree, is_leaf, none_is_leaf, namespace))


def tree_any(
    tree: PyTree[T],
    /,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether any leaf of a tree is true. Stop at the first one that is.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if there is a true leaf.

    Raises:
        Exception: The errors of :func:`optree.tree_flatten`, and those of ``bool(leaf)``.

    Examples:
        >>> tree_any({'b': (0, [3]), 'a': 0}), tree_any([0, '']), tree_any([None])
        (True, False, False)
    """
    return any(_C.PyTreeIter(tree, is_leaf, none_is_leaf, namespace))
