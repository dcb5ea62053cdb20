# SPDX-License-Identifier: Apache-2.0
"""Functions applied to the leaves of trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import optree._C as _C
from optree.typing import S, T, U

if TYPE_CHECKING:
    from optree.typing import PyTree


def tree_map(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Return the tree of ``func(x, *xs)`` for the leaves ``x`` of a tree and subtrees of others.

    Args:
        func: Called once per leaf ``x`` of ``tree``, with ``x`` and with what each of ``rests`` has
            at the same place, be it a leaf or a subtree.
        tree: The tree that determines the structure of the result.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the structure of ``tree``. The inputs are untouched.

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``. ``func`` is not called then.

    Examples:
        >>> tree_map(lambda x: 10 * x, {'x': 7, 'y': (42, None)})
        {'x': 70, 'y': (420, None)}
        >>> tree_map(lambda x, y: (x, y), {'a': 1, 'b': [2]}, {'b': ['two'], 'a': {'c': 'one'}})
        {'a': (1, {'c': 'one'}), 'b': [(2, 'two')]}
        >>> tree_map(lambda x: x is None, [1, None], none_is_leaf=True)
        [False, True]
    """
    return _C.map(func, tree, rests, is_leaf, none_is_leaf, namespace)


def tree_map_(
    func: Callable[..., Any],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[T]:
    """Call ``func`` like :func:`tree_map` for its side effects and return the original tree.

    Args:
        func: Called once per leaf. Its results are dropped.
        tree: A tree.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        ``tree`` itself.

    Examples:
        >>> seen = []
        >>> tree = {'b': [2], 'a': 1}
        >>> tree_map_(seen.append, tree) is tree
        True
        >>> seen
        [1, 2]
    """
    return _C.map_(func, tree, rests, is_leaf, none_is_leaf, namespace)


def tree_map_with_path(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_map`, but ``func`` gets the path of the leaf as its first argument.

    Args:
        func: Called with ``(path, x, *xs)``.
        tree: The tree that determines the structure of the result.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the structure of ``tree``.

    Examples:
        >>> tree_map_with_path(lambda path, x: (*path, x), {'b': [2, 3], 'a': 1})
        {'b': [('b', 0, 2), ('b', 1, 3)], 'a': ('a', 1)}
    """
    paths, leaves, treespec = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    flat_args = [paths, leaves] + [treespec.flatten_up_to(rest) for rest in rests]
    return treespec.unflatten([func(*args) for args in zip(*flat_args)])


def tree_map_with_path_(
    func: Callable[..., Any],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[T]:
    """Like :func:`tree_map_`, but ``func`` gets the path of the leaf as its first argument.

    Args:
        func: Called with ``(path, x, *xs)``. Its results are dropped.
        tree: A tree.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        ``tree`` itself.

    Examples:
        >>> seen = {}
        >>> _ = tree_map_with_path_(seen.__setitem__, {'b': [2, 3], 'a': 1})
        >>> seen
        {('a',): 1, ('b', 0): 2, ('b', 1): 3}
    """
    paths, leaves, treespec = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    flat_args = [paths, leaves] + [treespec.flatten_up_to(rest) for rest in rests]
    for args in zip(*flat_args):
        func(*args)
    return tree


def tree_map_with_accessor(
    func: Callable[..., U],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[U]:
    """Like :func:`tree_map`, but ``func`` gets the accessor of the leaf as its first argument.

    Args:
        func: Called with ``(accessor, x, *xs)``.
        tree: The tree that determines the structure of the result.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree with the structure of ``tree``.

    Examples:
        >>> tree_map_with_accessor(lambda a, x: f'{a.codify("t")} = {x}', {'b': [2, 3], 'a': 1})
        {'b': ["t['b'][0] = 2", "t['b'][1] = 3"], 'a': "t['a'] = 1"}
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    flat_args: list[list[Any]] = [treespec.accessors(), leaves]
    flat_args += [treespec.flatten_up_to(rest) for rest in rests]
    return treespec.unflatten([func(*args) for args in zip(*flat_args)])


def tree_map_with_accessor_(
    func: Callable[..., Any],
    tree: PyTree[T],
    /,
    *rests: PyTree[S],
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[T]:
    """Like :func:`tree_map_`, but ``func`` gets the accessor of the leaf as its first argument.

    Args:
        func: Called with ``(accessor, x, *xs)``. Its results are dropped.
        tree: A tree.
        *rests: Trees that ``tree`` is a prefix of.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        ``tree`` itself.

    Examples:
        >>> seen = []
        >>> _ = tree_map_with_accessor_(lambda a, x: seen.append((a.codify('t'), x)), [5, (6,)])
        >>> seen
        [('t[0]', 5), ('t[1][0]', 6)]
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    flat_args: list[list[Any]] = [treespec.accessors(), leaves]
    flat_args += [treespec.flatten_up_to(rest) for rest in rests]
    for args in zip(*flat_args):
        func(*args)
    return tree


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
        leaf_type: A class or tuple of classes: applies to its instances. Or a predicate.
        func: Called with each leaf of that type.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A new tree; the other leaves are taken over unchanged.

    Examples:
        >>> tree_map_only(int, lambda x: -x, {'a': 1, 'b': ['two', 3.0, 4]})
        {'a': -1, 'b': ['two', 3.0, -4]}
        >>> tree_map_only(lambda x: x > 2, lambda x: 0, [1, 2, 3, 4])
        [1, 2, 0, 0]
    """
    if isinstance(leaf_type, (type, tuple)):
        types = leaf_type

        def transform(x: Any, /) -> Any:
            return func(x) if isinstance(x, types) else x

    else:
        predicate = leaf_type

        def transform(x: Any, /) -> Any:
            return func(x) if predicate(x) else x

    return _C.map(transform, tree, (), is_leaf, none_is_leaf, namespace)


def tree_replace_nones(
    sentinel: S,
    tree: PyTree[T | None],
    /,
    namespace: str = "",
) -> PyTree[T | S]:
    """Return the tree with each ``None`` replaced.

    Args:
        sentinel: What to put in the place of ``None``.
        tree: A tree.
        namespace: The namespace whose registered node types are used besides the global ones.

    Returns:
        A new tree, or ``sentinel`` if ``tree`` is ``None``.

    Examples:
        >>> tree_replace_nones(0, {'a': 1, 'b': [None, 2]})
        {'a': 1, 'b': [0, 2]}
        >>> tree_replace_nones(0, None)
        0
    """
    if tree is None:
        return sentinel

    def replace(x: Any, /) -> Any:
        return sentinel if x is None else x

    nullable_tree: PyTree[Any] = tree
    return _C.map(replace, nullable_tree, (), None, True, namespace)


def tree_partition(
    predicate: Callable[[T], bool],
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    fillvalue: S = None,  # type: ignore[assignment]
    none_is_leaf: bool = False,
    namespace: str = "",
) -> tuple[PyTree[T | S], PyTree[T | S]]:
    """Return two trees: one with the leaves that satisfy a predicate, and one with the others.

    :func:`optree.tree_combine` undoes it.

    Args:
        predicate: Called with each leaf.
        tree: A tree.
        is_leaf: Called with each visited object, from the root downwards; if it returns true, the
            object is a leaf and is not descended into.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).
        fillvalue: Stands for the leaves that are in the other tree.

    Returns:
        Two new trees with the structure of ``tree``.

    Examples:
        >>> tree_partition(lambda x: x > 1, {'a': 1, 'b': [2, 3]})
        ({'a': None, 'b': [2, 3]}, {'a': 1, 'b': [None, None]})
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    satisfying: list[T | S] = []
    others: list[T | S] = []
    for leaf in leaves:
        if predicate(leaf):
            satisfying.append(leaf)
            others.append(fillvalue)
        else:
            satisfying.append(fillvalue)
            others.append(leaf)
    return treespec.unflatten(satisfying), treespec.unflatten(others)


def tree_combine(
    tree: PyTree[T],
    other_tree: PyTree[T],
    /,
    *other_trees: PyTree[T],
    is_leaf: Callable[[Any], bool] | None = None,
    fillvalue: Any = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> PyTree[T]:
    """Return the tree with, at each place, the leaf of the first tree that has one there.

    It undoes :func:`optree.tree_partition`, called with the same ``fillvalue``.

    Args:
        tree: A tree.
        other_tree: A tree with the same structure, but for places with ``fillvalue``.
        *other_trees: More such trees.
        is_leaf: See :func:`optree.tree_flatten`; an object that is ``fillvalue`` is always a leaf.
        fillvalue: The object that marks a place without a leaf, compared by identity.
        none_is_leaf: Whether ``None`` is a leaf (if it is not ``fillvalue``).
        namespace: The namespace whose registered node types are used besides the global ones.

    Returns:
        A new tree. It has ``fillvalue`` where no tree has a leaf.

    Raises:
        ValueError: If the structures differ.

    Examples:
        >>> import optree
        >>> even, odd = optree.tree_partition(lambda x: x % 2 == 0, {'a': 1, 'b': [2, 3]})
        >>> even, odd
        ({'a': None, 'b': [2, None]}, {'a': 1, 'b': [None, 3]})
        >>> tree_combine(even, odd)
        {'a': 1, 'b': [2, 3]}
    """

    def is_leaf_or_fillvalue(x: Any, /) -> bool:
        return x is fillvalue or (is_leaf is not None and bool(is_leaf(x)))

    def first(*leaves: Any) -> Any:
        for leaf in leaves:
            if leaf is not fillvalue:
                return leaf
        return fillvalue

    rests = (other_tree, *other_trees)
    return _C.map(first, tree, rests, is_leaf_or_fillvalue, none_is_leaf, namespace)
