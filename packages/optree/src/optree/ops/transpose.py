# SPDX-License-Identifier: Apache-2.0
"""Turn trees of trees inside out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import optree._C as _C
from optree.typing import S, T, U

if TYPE_CHECKING:
    from optree.accessors import PyTreeAccessor
    from optree.typing import PyTree, PyTreeSpec


def tree_transpose(
    outer_treespec: PyTreeSpec,
    inner_treespec: PyTreeSpec | None,
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree[T]:
    """Return an inner tree of outer trees, from an outer tree of inner trees.

    Args:
        outer_treespec: The spec of the outer structure of ``tree``.
        inner_treespec: The spec of the structure that ``tree`` has at each leaf of the outer one.
            If it is ``None``, it is the structure at the first leaf.
        tree: A tree with ``outer_treespec.num_leaves * inner_treespec.num_leaves`` leaves.
        is_leaf: See :func:`optree.tree_flatten`.

    Returns:
        A new tree.

    Raises:
        ValueError: If a spec has no leaves, if the specs have different values of
            ``none_is_leaf`` or different namespaces, or if the inner structure is inferred and
            is not the same everywhere.
        TypeError: If the number of leaves of ``tree`` is not that of the composed specs.
        AttributeError: If a spec is not a :class:`PyTreeSpec`.

    Examples:
        >>> import optree
        >>> tree = [(1, 'a'), (2, 'b'), (3, 'c')]
        >>> outer, inner = optree.tree_structure([0, 0, 0]), optree.tree_structure((0, 0))
        >>> tree_transpose(outer, inner, tree)
        ([1, 2, 3], ['a', 'b', 'c'])
        >>> tree_transpose(outer, None, tree)
        ([1, 2, 3], ['a', 'b', 'c'])
    """
    if inner_treespec is None:
        none_is_leaf, namespace = outer_treespec.none_is_leaf, outer_treespec.namespace
        subtrees = outer_treespec.flatten_up_to(tree)
        _check_outer(outer_treespec, None)
        return _transpose_outputs(subtrees, outer_treespec, None, is_leaf, none_is_leaf, namespace)
    if outer_treespec.none_is_leaf != inner_treespec.none_is_leaf:
        raise ValueError("Tree structures must have the same none_is_leaf value.")
    outer_size = outer_treespec.num_leaves
    inner_size = inner_treespec.num_leaves
    if outer_size == 0 or inner_size == 0:
        raise ValueError("Tree structures must have at least one leaf.")
    outer_namespace = outer_treespec.namespace
    inner_namespace = inner_treespec.namespace
    if outer_namespace and inner_namespace and outer_namespace != inner_namespace:
        raise ValueError(
            f"Tree structures must have the same namespace, "
            f"got {outer_namespace!r} vs. {inner_namespace!r}.",
        )

    leaves, treespec = _C.flatten(
        tree,
        is_leaf,
        outer_treespec.none_is_leaf,
        outer_namespace or inner_namespace,
    )
    if treespec.num_leaves != outer_size * inner_size:
        expected = outer_treespec.compose(inner_treespec)
        raise TypeError(f"Tree structure mismatch; expected: {expected}, got: {treespec}.")

    subtrees = [outer_treespec.unflatten(leaves[i::inner_size]) for i in range(inner_size)]
    return inner_treespec.unflatten(subtrees)


def _transpose_outputs(
    outputs: list[Any],
    outer_treespec: PyTreeSpec,
    inner_treespec: PyTreeSpec | None,
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
) -> PyTree[Any]:
    if inner_treespec is None:
        inner_treespec = _C.structure(outputs[0], is_leaf, none_is_leaf, namespace)
    inner_size = inner_treespec.num_leaves
    if inner_size == 0:
        raise ValueError(
            f"The inner structure must have at least one leaf. Got: {inner_treespec}.",
        )
    rows = [inner_treespec.flatten_up_to(output) for output in outputs]
    return inner_treespec.unflatten(
        [outer_treespec.unflatten([row[i] for row in rows]) for i in range(inner_size)],
    )


def _check_outer(outer_treespec: PyTreeSpec, inner_treespec: PyTreeSpec | None) -> None:
    if inner_treespec is None and outer_treespec.num_leaves == 0:
        raise ValueError(
            f"The outer structure must have at least one leaf. Got: {outer_treespec}.",
        )


def tree_transpose_map(
    func: Callable[..., PyTree[U]],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    inner_treespec: PyTreeSpec | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Map a function that returns trees, and return an inner tree of outer trees.

    :func:`optree.tree_map` returns a tree of results. This function returns a tree with the
    structure of one result, in which each leaf is a tree with the structure of ``tree``.

    Args:
        func: Called with ``(x, *xs)``; all results have the same structure.
        tree: The tree that determines the outer structure.
        *rests: Trees that ``tree`` is a prefix of.
        inner_treespec: The structure of the results, by default that of the first result.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the inner structure whose leaves are trees with the outer structure.

    Raises:
        ValueError: If the inner structure has no leaves, if it has to be inferred and ``tree`` has
            no leaves, or if a result does not have the inner structure.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_transpose_map(lambda x: {'id': x, 'square': x * x}, [1, (2, 3)])
        {'id': [1, (2, 3)], 'square': [1, (4, 9)]}
    """
    leaves, outer_treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    _check_outer(outer_treespec, inner_treespec)
    flat_args = [leaves] + [outer_treespec.flatten_up_to(rest) for rest in rests]
    outputs = _C.call_rows(func, flat_args)
    return _transpose_outputs(
        outputs,
        outer_treespec,
        inner_treespec,
        is_leaf,
        none_is_leaf,
        namespace,
    )


def tree_transpose_map_with_path(
    func: Callable[..., PyTree[U]],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    inner_treespec: PyTreeSpec | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_transpose_map`, but ``func`` gets the path of the leaf first.

    Args:
        func: Called with ``(path, x, *xs)``; all results have the same structure.
        tree: The tree that determines the outer structure.
        *rests: Trees that ``tree`` is a prefix of.
        inner_treespec: The structure of the results, by default that of the first result.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the inner structure whose leaves are trees with the outer structure.

    Raises:
        ValueError: See :func:`tree_transpose_map`.

    Examples:
        >>> tree_transpose_map_with_path(lambda p, x: {'depth': len(p), 'value': x}, [1, (2, 3)])
        {'depth': [1, (2, 2)], 'value': [1, (2, 3)]}
    """
    paths, leaves, outer_treespec = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    _check_outer(outer_treespec, inner_treespec)
    flat_args = [paths, leaves] + [outer_treespec.flatten_up_to(rest) for rest in rests]
    outputs = _C.call_rows(func, flat_args)
    return _transpose_outputs(
        outputs,
        outer_treespec,
        inner_treespec,
        is_leaf,
        none_is_leaf,
        namespace,
    )


def tree_transpose_map_with_accessor(
    func: Callable[..., PyTree[U]],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    inner_treespec: PyTreeSpec | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_transpose_map`, but ``func`` gets the accessor of the leaf first.

    Args:
        func: Called with ``(accessor, x, *xs)``; all results have the same structure.
        tree: The tree that determines the outer structure.
        *rests: Trees that ``tree`` is a prefix of.
        inner_treespec: The structure of the results, by default that of the first result.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the inner structure whose leaves are trees with the outer structure.

    Raises:
        ValueError: See :func:`tree_transpose_map`.

    Examples:
        >>> tree_transpose_map_with_accessor(lambda a, x: (a.codify('t'), x), {'k': 1, 'l': 2})
        ({'k': "t['k']", 'l': "t['l']"}, {'k': 1, 'l': 2})
    """
    leaves, outer_treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    _check_outer(outer_treespec, inner_treespec)
    accessors: list[PyTreeAccessor] = outer_treespec.accessors()
    flat_args: list[list[Any]] = [accessors, leaves]
    flat_args += [outer_treespec.flatten_up_to(rest) for rest in rests]
    outputs = _C.call_rows(func, flat_args)
    return _transpose_outputs(
        outputs,
        outer_treespec,
        inner_treespec,
        is_leaf,
        none_is_leaf,
        namespace,
    )
