# SPDX-License-Identifier: Apache-2.0
"""Repeat leaves until trees have the same structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import optree._C as _C
from optree.ops.map import tree_map, tree_map_with_accessor, tree_map_with_path
from optree.typing import S, T, U

if TYPE_CHECKING:
    from optree.typing import PyTree, PyTreeSpec


def tree_broadcast_prefix(
    prefix_tree: PyTree[T],
    full_tree: PyTree[S],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[T]:
    """Return a prefix tree with each leaf repeated for all leaves of the subtree at its place.

    Args:
        prefix_tree: A tree.
        full_tree: A tree that ``prefix_tree`` is a prefix of.
        is_leaf: Called with each visited object of ``prefix_tree``, and with each object of
            ``full_tree`` at or below a leaf of ``prefix_tree``. If it returns true, the object is a
            leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the structure of ``full_tree``.

    Raises:
        ValueError: If ``prefix_tree`` is not a prefix of ``full_tree``.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> tree_broadcast_prefix({'a': 1, 'b': 2}, {'a': [3, (4, 5)], 'b': 6})
        {'a': [1, (1, 1)], 'b': 2}
        >>> tree_broadcast_prefix([1, 2], [1, 2, 3])
        Traceback (most recent call last):
            ...
        ValueError: list arity mismatch; expected: 2, got: 3; list: [1, 2, 3]...
    """
    leaves, treespec = _C.flatten(prefix_tree, is_leaf, none_is_leaf, namespace)
    subtrees: list[Any] = treespec.flatten_up_to(full_tree)
    for i, leaf in enumerate(leaves):
        subtree = subtrees[i]
        subtreespec = _C.structure(subtree, is_leaf, none_is_leaf, namespace)
        subtrees[i] = subtreespec.unflatten([leaf] * subtreespec.num_leaves)
    return treespec.unflatten(subtrees)


def broadcast_prefix(
    prefix_tree: PyTree[T],
    full_tree: PyTree[S],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[T]:
    """Return the leaves of a prefix tree, each repeated for all leaves of the subtree at its place.

    Args:
        prefix_tree: A tree.
        full_tree: A tree that ``prefix_tree`` is a prefix of.
        is_leaf: Called with each visited object of ``prefix_tree``, and with each object of
            ``full_tree`` at or below a leaf of ``prefix_tree``. If it returns true, the object is a
            leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list with one item per leaf of ``full_tree``.

    Raises:
        ValueError: If ``prefix_tree`` is not a prefix of ``full_tree``.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> broadcast_prefix({'a': 1, 'b': 2}, {'a': [3, (4, 5)], 'b': 6})
        [1, 1, 1, 2]
    """
    leaves, treespec = _C.flatten(prefix_tree, is_leaf, none_is_leaf, namespace)
    repeated: list[T] = []
    subtrees = treespec.flatten_up_to(full_tree)
    for i, leaf in enumerate(leaves):
        size = _C.structure(subtrees[i], is_leaf, none_is_leaf, namespace).num_leaves
        repeated.extend([leaf] * size)
    return repeated


def _sizes_below(prefix: PyTreeSpec, full: PyTreeSpec, /) -> list[int]:
    """Return the number of leaves of ``full`` below each leaf of ``prefix``.

    Both specs have the same order of children at each node of ``prefix``.
    """
    if (prefix.num_nodes, prefix.num_leaves) == (full.num_nodes, full.num_leaves):
        return [1] * prefix.num_leaves
    sizes: list[int] = []
    pending = [(prefix, full)]
    while pending:
        prefix, full = pending.pop()
        if prefix.is_leaf():
            sizes.append(full.num_leaves)
        else:
            children, full_children = prefix.children(), full.children()
            while children:
                pending.append((children.pop(), full_children.pop()))
    return sizes


def _repeat(leaves: list[Any], prefix: PyTreeSpec, full: PyTreeSpec, /) -> list[Any]:
    """Return ``leaves`` with each repeated for the leaves of ``full`` below it."""
    sizes = _sizes_below(prefix, full)
    return [leaf for i, leaf in enumerate(leaves) for _ in range(sizes[i])]


def _broadcast_common(
    trees: tuple[Any, ...],
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> tuple[PyTreeSpec, list[list[Any]], list[Any]]:
    """Broadcast trees to their common suffix.

    Returns:
        The spec of the common suffix with the node types of the first tree, the leaves of each
        tree in the order of that spec, and the trees with their own node types.
    """
    flattened = [_C.flatten(tree, is_leaf, none_is_leaf, namespace) for tree in trees]
    common = flattened[0][1]
    for _, treespec in flattened[1:]:
        common = common.broadcast_to_common_suffix(treespec)

    flat: list[list[Any]] = []
    broadcast: list[Any] = []
    for i, (leaves, treespec) in enumerate(flattened):
        # It has the leaves of `common`, perhaps in another order: that of the keys of this tree.
        own = treespec.broadcast_to_common_suffix(common)
        repeated = _repeat(leaves, treespec, own)
        tree = own.unflatten(repeated)
        broadcast.append(tree)
        flat.append(repeated if i == 0 else common.flatten_up_to(tree))
    return common, flat, broadcast


def tree_broadcast_common(
    tree: PyTree[T],
    other_tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[PyTree[T], PyTree[T]]:
    """Return both trees, with leaves repeated where the other tree has a subtree.

    Args:
        tree: A tree.
        other_tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        Two new trees of the same structure, each with its own node types.

    Raises:
        ValueError: If the trees have different nodes at the same place.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> tree_broadcast_common([1, {'a': 2, 'b': 3}], [(4, 5), 6])
        ([(1, 1), {'a': 2, 'b': 3}], [(4, 5), {'a': 6, 'b': 6}])
    """
    _, _, (broadcast, other_broadcast) = _broadcast_common(
        (tree, other_tree),
        is_leaf,
        none_is_leaf,
        namespace,
    )
    return broadcast, other_broadcast


def broadcast_common(
    tree: PyTree[T],
    other_tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[list[T], list[T]]:
    """Return the leaves of both trees, repeated where the other tree has a subtree.

    Args:
        tree: A tree.
        other_tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        Two lists of the same length.

    Raises:
        ValueError: If the trees have different nodes at the same place.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> broadcast_common([1, {'a': 2, 'b': 3}], [(4, 5), 6])
        ([1, 1, 2, 3], [4, 5, 6, 6])
    """
    _, (leaves, other_leaves), _ = _broadcast_common(
        (tree, other_tree),
        is_leaf,
        none_is_leaf,
        namespace,
    )
    return leaves, other_leaves


def tree_broadcast_map(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[T],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`optree.tree_map`, but broadcast the trees to a common structure first.

    Args:
        func: Called with one leaf of each tree.
        tree: A tree.
        *rests: Trees. Where one tree has a leaf and another a subtree, the leaf is repeated.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the common structure and the node types of the first tree.

    Raises:
        ValueError: If trees have different nodes at the same place.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_broadcast_map(lambda x, y: x * y, [2, {'a': 3, 'b': 4}], [(5, 6), 7])
        [(10, 12), {'a': 21, 'b': 28}]
        >>> tree_broadcast_map(lambda x, y, z: x + y + z, 1, [2, 3], 4)
        [7, 8]
    """
    if not rests:
        return tree_map(func, tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf, namespace=namespace)
    treespec, flat, _ = _broadcast_common((tree, *rests), is_leaf, none_is_leaf, namespace)
    return treespec.unflatten(_C.call_rows(func, flat))


def tree_broadcast_map_with_path(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[T],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_broadcast_map`, but ``func`` gets the path of the leaf first.

    Args:
        func: Called with ``(path, x, *xs)``: a path and one leaf of each tree.
        tree: A tree.
        *rests: Trees. Where one tree has a leaf and another a subtree, the leaf is repeated.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the common structure and the node types of the first tree.

    Raises:
        ValueError: If trees have different nodes at the same place.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_broadcast_map_with_path(lambda path, x, y: (path, x * y), [2, 3], [4, (5, 6)])
        [((0,), 8), (((1, 0), 15), ((1, 1), 18))]
    """
    if not rests:
        return tree_map_with_path(
            func,
            tree,
            is_leaf=is_leaf,
            none_is_leaf=none_is_leaf,
            namespace=namespace,
        )
    treespec, flat, _ = _broadcast_common((tree, *rests), is_leaf, none_is_leaf, namespace)
    return treespec.unflatten(_C.call_rows(func, [treespec.paths(), *flat]))


def tree_broadcast_map_with_accessor(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[T],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_broadcast_map`, but ``func`` gets the accessor of the leaf first.

    Args:
        func: Called with ``(accessor, x, *xs)``: an accessor and one leaf of each tree.
        tree: A tree.
        *rests: Trees. Where one tree has a leaf and another a subtree, the leaf is repeated.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the common structure and the node types of the first tree.

    Raises:
        ValueError: If trees have different nodes at the same place.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_broadcast_map_with_accessor(lambda a, x, y: (a.codify('t'), x * y), [2], [(4, 5)])
        [(('t[0][0]', 8), ('t[0][1]', 10))]
    """
    if not rests:
        return tree_map_with_accessor(
            func,
            tree,
            is_leaf=is_leaf,
            none_is_leaf=none_is_leaf,
            namespace=namespace,
        )
    treespec, flat, _ = _broadcast_common((tree, *rests), is_leaf, none_is_leaf, namespace)
    return treespec.unflatten(_C.call_rows(func, [treespec.accessors(), *flat]))
