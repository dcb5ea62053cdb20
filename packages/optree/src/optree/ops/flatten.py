# SPDX-License-Identifier: Apache-2.0
"""From a tree to its leaves and its spec, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, overload

import optree._C as _C
from optree.typing import T

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from optree.accessors import PyTreeAccessor
    from optree.typing import PyTree, PyTreeNode, PyTreeSpec


@overload
def tree_flatten(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[T], PyTreeSpec]: ...


@overload
def tree_flatten(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[T], PyTreeSpec]: ...


@_C.compiled
def tree_flatten(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[T], PyTreeSpec]:
    """Return the leaves of a tree and the spec that rebuilds the tree from leaves.

    Leaves come depth first, from left to right; dictionaries are visited in the order of their
    sorted keys, see :func:`optree.dict_insertion_ordered`.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of leaves and a :class:`optree.PyTreeSpec`.

    Raises:
        RecursionError: If the tree is deeper than :data:`optree.MAX_RECURSION_DEPTH`.
        RuntimeError: If the flatten function of a registered class does not return children,
            metadata and, optionally, one path entry per child.
        TypeError: If ``is_leaf`` is neither callable nor ``None``, or ``namespace`` not a string.

    Examples:
        >>> leaves, spec = tree_flatten({'b': (2, [3, 4]), 'a': 1, 'c': None})
        >>> leaves
        [1, 2, 3, 4]
        >>> spec
        PyTreeSpec({'a': *, 'b': (*, [*, *]), 'c': None})
        >>> spec.unflatten('wxyz')
        {'b': ('x', ['y', 'z']), 'a': 'w', 'c': None}
        >>> tree_flatten([1, None], none_is_leaf=True)
        ([1, None], PyTreeSpec([*, *], NoneIsLeaf))
    """
    return _C.flatten(tree, is_leaf, none_is_leaf, namespace)


@overload
def tree_flatten_with_path(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[tuple[Any, ...]], list[T], PyTreeSpec]: ...


@overload
def tree_flatten_with_path(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[tuple[Any, ...]], list[T], PyTreeSpec]: ...


def tree_flatten_with_path(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[tuple[Any, ...]], list[T], PyTreeSpec]:
    """Return the path of each leaf, the leaves, and the spec of a tree.

    A path is a tuple of indices, keys, and entries of custom nodes. It does not say which of these
    an item is; the entries of :func:`tree_flatten_with_accessor` do.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of paths, a list of leaves, and a :class:`optree.PyTreeSpec`.

    Raises:
        RecursionError: See :func:`tree_flatten`.
        RuntimeError: See :func:`tree_flatten`.
        TypeError: See :func:`tree_flatten`.

    Examples:
        >>> paths, leaves, spec = tree_flatten_with_path({'b': (2, [3, 4]), 'a': 1})
        >>> list(zip(paths, leaves))
        [(('a',), 1), (('b', 0), 2), (('b', 1, 0), 3), (('b', 1, 1), 4)]
    """
    return _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)


@overload
def tree_flatten_with_accessor(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[PyTreeAccessor], list[T], PyTreeSpec]: ...


@overload
def tree_flatten_with_accessor(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[PyTreeAccessor], list[T], PyTreeSpec]: ...


def tree_flatten_with_accessor(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[PyTreeAccessor], list[T], PyTreeSpec]:
    """Return the accessor of each leaf, the leaves, and the spec of a tree.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of accessors, a list of leaves, and a :class:`optree.PyTreeSpec`.

    Raises:
        RecursionError: See :func:`tree_flatten`.
        RuntimeError: See :func:`tree_flatten`.
        TypeError: See :func:`tree_flatten`.

    Examples:
        >>> tree = {'b': (2, [3, 4]), 'a': 1}
        >>> accessors, leaves, spec = tree_flatten_with_accessor(tree)
        >>> [accessor.codify('tree') for accessor in accessors]
        ["tree['a']", "tree['b'][0]", "tree['b'][1][0]", "tree['b'][1][1]"]
        >>> [accessor(tree) for accessor in accessors] == leaves
        True
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    return treespec.accessors(), leaves, treespec


@_C.compiled
def tree_unflatten(treespec: PyTreeSpec, leaves: Iterable[T]) -> PyTree[T]:
    """Return the tree with the structure of a spec and the given leaves.

    Args:
        treespec: The spec, see :func:`tree_flatten`.
        leaves: As many objects as the spec has leaves.

    Returns:
        A new tree.

    Raises:
        ValueError: If there are too few or too many leaves.
        AttributeError: If ``treespec`` is not a :class:`PyTreeSpec`.

    Examples:
        >>> leaves, spec = tree_flatten({'b': 2, 'a': (1, None)})
        >>> tree_unflatten(spec, [10 * leaf for leaf in leaves])
        {'b': 20, 'a': (10, None)}
    """
    try:
        unflatten = treespec.unflatten
    except AttributeError as error:
        add_note = getattr(error, "add_note", None)  # Python 3.11 and newer
        if add_note is not None:
            swapped = type(leaves).__name__ == "PyTreeSpec"
            remedy = "swap the arguments" if swapped else "pass the spec that tree_flatten returned"
            add_note(f"Expected a PyTreeSpec first; {remedy}: tree_unflatten(treespec, leaves).")
        raise
    return unflatten(leaves)


@overload
def tree_iter(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> Iterator[T]: ...


@overload
def tree_iter(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> Iterator[T]: ...


def tree_iter(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> Iterator[T]:
    """Return an iterator over the leaves of a tree, which descends only as far as it is read.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        An iterator. Several threads may share it; each leaf is then returned to one of them.

    Raises:
        RecursionError: While iterating, see :func:`tree_flatten`.
        RuntimeError: While iterating, see :func:`tree_flatten`. Also if ``is_leaf`` or a flatten
            function asks this iterator for a leaf.
        TypeError: See :func:`tree_flatten`.

    Examples:
        >>> leaves = tree_iter({'b': (2, [3, 4]), 'a': 1})
        >>> next(leaves), list(leaves)
        (1, [2, 3, 4])
    """
    return _C.PyTreeIter(tree, is_leaf, none_is_leaf, namespace)


@overload
def tree_leaves(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[T]: ...


@overload
def tree_leaves(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[T]: ...


@_C.compiled
def tree_leaves(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[T]:
    """Return the leaves of a tree.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new list.

    Raises:
        RecursionError: See :func:`tree_flatten`.
        RuntimeError: See :func:`tree_flatten`.
        TypeError: See :func:`tree_flatten`.

    Examples:
        >>> tree_leaves({'b': (2, [3, 4]), 'a': 1, 'c': None})
        [1, 2, 3, 4]
        >>> tree_leaves({'b': (2, [3, 4]), 'a': 1}, is_leaf=lambda x: isinstance(x, tuple))
        [1, (2, [3, 4])]
    """
    return _C.leaves(tree, is_leaf, none_is_leaf, namespace)


@_C.compiled
def tree_structure(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTreeSpec:
    """Return the spec of a tree.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A :class:`optree.PyTreeSpec`.

    Raises:
        RecursionError: See :func:`tree_flatten`.
        RuntimeError: See :func:`tree_flatten`.
        TypeError: See :func:`tree_flatten`.

    Examples:
        >>> tree_structure({'b': (2, [3, 4]), 'a': 1, 'c': None})
        PyTreeSpec({'a': *, 'b': (*, [*, *]), 'c': None})
        >>> tree_structure([1, (2, 3)]) == tree_structure(['x', ('y', 'z')])
        True
    """
    return _C.structure(tree, is_leaf, none_is_leaf, namespace)


def tree_paths(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[tuple[Any, ...]]:
    """Return the path of each leaf of a tree, see :func:`tree_flatten_with_path`.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of tuples.

    Raises:
        Exception: The errors of :func:`tree_flatten`.

    Examples:
        >>> tree_paths({'b': (2, [3, 4]), 'a': 1})
        [('a',), ('b', 0), ('b', 1, 0), ('b', 1, 1)]
    """
    return _C.structure(tree, is_leaf, none_is_leaf, namespace).paths()


def tree_accessors(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[PyTreeAccessor]:
    """Return the accessor of each leaf of a tree, see :func:`tree_flatten_with_accessor`.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of accessors.

    Raises:
        Exception: The errors of :func:`tree_flatten`.

    Examples:
        >>> [accessor.codify('tree') for accessor in tree_accessors({'b': (2, [3]), 'a': 1})]
        ["tree['a']", "tree['b'][0]", "tree['b'][1][0]"]
    """
    return _C.structure(tree, is_leaf, none_is_leaf, namespace).accessors()


def tree_is_leaf(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether an object is a leaf.

    Args:
        tree: An object.
        is_leaf: Called with the object. If it returns true, the object is a leaf.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if ``is_leaf`` returns true for it, or if its class is not that of a node.

    Raises:
        TypeError: If ``is_leaf`` is neither callable nor ``None``, or ``namespace`` not a string.

    Examples:
        >>> tree_is_leaf(1), tree_is_leaf([1]), tree_is_leaf(None)
        (True, False, False)
        >>> tree_is_leaf(None, none_is_leaf=True)
        True
        >>> tree_is_leaf([1], is_leaf=lambda x: isinstance(x, list))
        True
    """
    return _C.is_leaf(tree, is_leaf, none_is_leaf, namespace)


def all_leaves(
    iterable: Iterable[PyTree[T]],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether all items of an iterable are leaves.

    Args:
        iterable: The objects. Reading stops at the first that is not a leaf.
        is_leaf: Called with each item that is read. If it returns true, the item is a leaf.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        True if :func:`tree_is_leaf` is true for each item, and also if there are no items.

    Raises:
        TypeError: If ``iterable`` is not iterable, ``is_leaf`` is neither callable nor ``None``, or
            ``namespace`` is not a string.

    Examples:
        >>> all_leaves([1, 'a', {2, 3}])
        True
        >>> all_leaves([1, 'a', [2, 3]])
        False
    """
    return _C.all_leaves(iterable, is_leaf, none_is_leaf, namespace)


@overload
def tree_leaves_with_path(
    tree: PyTreeNode[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[tuple[tuple[Any, ...], T]]: ...


@overload
def tree_leaves_with_path(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[tuple[tuple[Any, ...], T]]: ...


def tree_leaves_with_path(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[tuple[tuple[Any, ...], T]]:
    """Return pairs of the path and the leaf, for each leaf of a tree.

    Args:
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list of pairs.

    Raises:
        Exception: The errors of :func:`tree_flatten`.

    Examples:
        >>> tree_leaves_with_path({'b': (2, [3]), 'a': 1})
        [(('a',), 1), (('b', 0), 2), (('b', 1, 0), 3)]
    """
    paths, leaves, _ = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    return [(path, leaves[i]) for i, path in enumerate(paths)]
