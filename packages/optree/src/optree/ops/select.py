# SPDX-License-Identifier: Apache-2.0
"""Operate on some of the leaves: those of a type, or the one at a place."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Callable, Final, Union, get_args, get_origin

import optree._C as _C
from optree.accessors import PyTreeAccessor
from optree.typing import T, U

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optree.typing import PyTree, PyTreeSpec


def tree_map_only(
    leaf_type: type[T] | tuple[type[Any], ...] | Callable[[Any], bool],
    func: Callable[[Any], U],
    tree: PyTree[Any],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[Any]:
    """Return the tree with ``func`` applied to some of the leaves.

    Args:
        leaf_type: Which leaves: a class, or a union or tuple of classes, for their instances; or a
            predicate, which is called with each leaf.
        func: Called with each of these leaves.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree; the other leaves are the same objects.

    Raises:
        TypeError: If ``leaf_type`` is none of these.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_map_only(int, lambda x: -x, {'a': 1, 'b': ['two', 3.0, 4]})
        {'a': -1, 'b': ['two', 3.0, -4]}
        >>> tree_map_only(lambda x: x > 2, lambda x: 0, [1, 2, 3, 4])
        [1, 2, 0, 0]
    """
    is_wanted = leaf_filter(leaf_type)

    def transform(x: Any, /) -> Any:
        return func(x) if is_wanted(x) else x

    return _C.map(transform, tree, (), is_leaf, none_is_leaf, namespace)


def leaf_filter(leaf_type: Any, /) -> Callable[[Any], bool]:
    """Return the predicate for a class, a union or tuple of classes, or a predicate.

    Raises:
        TypeError: If ``leaf_type`` is none of these.
    """
    if not isinstance(leaf_type, (type, tuple)) and get_origin(leaf_type) not in _UNIONS:
        if not callable(leaf_type):
            raise TypeError(
                f"Expected a class, a union or tuple of classes, or a predicate, got {leaf_type!r}."
            )
        predicate: Callable[[Any], bool] = leaf_type
        return predicate
    classes = tuple(_classes_in(leaf_type))
    return lambda x: isinstance(x, classes)


_UNIONS: Final = (Union, getattr(types, "UnionType", Union))


def _classes_in(leaf_type: Any, /) -> list[type[Any]]:
    if isinstance(leaf_type, tuple):
        return [cls for member in leaf_type for cls in _classes_in(member)]
    if get_origin(leaf_type) in _UNIONS:
        return [cls for member in get_args(leaf_type) for cls in _classes_in(member)]
    if not isinstance(leaf_type, type):
        raise TypeError(f"Expected a class, or a union or tuple of classes, got {leaf_type!r}.")
    return [leaf_type]


def tree_all_only(
    leaf_type: type[T] | tuple[type[Any], ...] | Callable[[Any], bool],
    predicate: Callable[[Any], Any],
    tree: PyTree[Any],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether all leaves of a type satisfy a predicate. Stop at the first that does not.

    Args:
        leaf_type: Which leaves, see :func:`optree.tree_map_only`.
        predicate: Called with each leaf of that type.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if all these leaves satisfy it, and also if there are none.

    Raises:
        TypeError: See :func:`optree.tree_map_only`.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``predicate`` raises.

    Examples:
        >>> tree_all_only(int, lambda x: x > 0, {'a': 1, 'b': ['two', 3]})
        True
    """
    is_wanted = leaf_filter(leaf_type)
    for leaf in _C.PyTreeIter(tree, is_leaf, none_is_leaf, namespace):
        if is_wanted(leaf) and not predicate(leaf):
            return False
    return True


def tree_any_only(
    leaf_type: type[T] | tuple[type[Any], ...] | Callable[[Any], bool],
    predicate: Callable[[Any], Any],
    tree: PyTree[Any],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether any leaf of a type satisfies a predicate. Stop at the first that does.

    Args:
        leaf_type: Which leaves, see :func:`optree.tree_map_only`.
        predicate: Called with each leaf of that type.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if one of these leaves satisfies it.

    Raises:
        TypeError: See :func:`optree.tree_map_only`.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``predicate`` raises.

    Examples:
        >>> tree_any_only(int, lambda x: x > 2, {'a': 1, 'b': ['two', 3]})
        True
    """
    is_wanted = leaf_filter(leaf_type)
    for leaf in _C.PyTreeIter(tree, is_leaf, none_is_leaf, namespace):
        if is_wanted(leaf) and predicate(leaf):
            return True
    return False


def _top_of(root: Any, none_is_leaf: bool, namespace: str, /) -> PyTreeSpec:
    """Return the spec of a node with its children as leaves."""

    def is_below(x: Any, /) -> bool:
        return x is not root

    return _C.structure(root, is_below, none_is_leaf, namespace)


def tree_replace_at(
    path: PyTreeAccessor | Iterable[Any],
    value: Any,
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[Any]:
    """Return the tree with another leaf or subtree at one place.

    Only the nodes on the way to the place are rebuilt; the result shares all others with ``tree``.

    Args:
        path: The place: a path as in :func:`optree.tree_paths`, or an accessor. The empty path is
            the root.
        value: The new leaf or subtree.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree. ``tree`` is untouched.

    Raises:
        KeyError: If there is no such place.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> tree = {'layers': [{'bias': 0}, {'bias': 1}]}
        >>> tree_replace_at(('layers', 1, 'bias'), 5, tree)
        {'layers': [{'bias': 0}, {'bias': 5}]}
    """
    steps = list(path.path if isinstance(path, PyTreeAccessor) else path)
    nodes: list[tuple[Any, list[Any], int]] = []
    for step in steps:
        if _C.is_leaf(tree, is_leaf, none_is_leaf, namespace):
            raise KeyError(f"Expected a place of the tree, got {steps!r}: a leaf is at {step!r}.")
        root = tree
        top = _top_of(root, none_is_leaf, namespace)
        entries = top.entries()
        if step not in entries:
            raise KeyError(f"Expected one of the entries {entries!r}, got {step!r} in {steps!r}.")
        index = entries.index(step)
        children = top.flatten_up_to(root)
        nodes.append((top, children, index))
        tree = children[index]
    for top, children, index in reversed(nodes):
        children[index] = value
        value = top.unflatten(children)
    return value
