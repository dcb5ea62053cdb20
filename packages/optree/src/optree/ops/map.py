# SPDX-License-Identifier: Apache-2.0
"""Apply functions to the leaves of trees."""

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
    """Return the tree of the results ``func(x, *xs)`` for each leaf ``x`` of a tree.

    Args:
        func: Called once per leaf ``x`` of ``tree``, with ``x`` and with the leaf or subtree that
            each of ``rests`` has at the same place.
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
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

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

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

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

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_map_with_path(lambda path, x: (*path, x), {'b': [2, 3], 'a': 1})
        {'b': [('b', 0, 2), ('b', 1, 3)], 'a': ('a', 1)}
    """
    paths, leaves, treespec = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    flat_args = [paths, leaves] + [treespec.flatten_up_to(rest) for rest in rests]
    return treespec.unflatten(_C.call_rows(func, flat_args))


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

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> seen = {}
        >>> _ = tree_map_with_path_(seen.__setitem__, {'b': [2, 3], 'a': 1})
        >>> seen
        {('a',): 1, ('b', 0): 2, ('b', 1): 3}
    """
    paths, leaves, treespec = _C.flatten_with_path(tree, is_leaf, none_is_leaf, namespace)
    flat_args = [paths, leaves] + [treespec.flatten_up_to(rest) for rest in rests]
    _C.call_rows(func, flat_args)
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

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> tree_map_with_accessor(lambda a, x: f'{a.codify("t")} = {x}', {'b': [2, 3], 'a': 1})
        {'b': ["t['b'][0] = 2", "t['b'][1] = 3"], 'a': "t['a'] = 1"}
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    flat_args: list[list[Any]] = [treespec.accessors(), leaves]
    flat_args += [treespec.flatten_up_to(rest) for rest in rests]
    return treespec.unflatten(_C.call_rows(func, flat_args))


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

    Raises:
        ValueError: If ``tree`` is not a prefix of one of ``rests``; ``func`` is then not called.
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``func`` raises.

    Examples:
        >>> seen = []
        >>> _ = tree_map_with_accessor_(lambda a, x: seen.append((a.codify('t'), x)), [5, (6,)])
        >>> seen
        [('t[0]', 5), ('t[1][0]', 6)]
    """
    leaves, treespec = _C.flatten(tree, is_leaf, none_is_leaf, namespace)
    flat_args: list[list[Any]] = [treespec.accessors(), leaves]
    flat_args += [treespec.flatten_up_to(rest) for rest in rests]
    _C.call_rows(func, flat_args)
    return tree


def tree_replace_nones(
    sentinel: S,
    tree: PyTree[T | None],
    /,
    namespace: str = "",
) -> PyTree[T | S]:
    """Return the tree with each ``None`` replaced.

    Args:
        sentinel: The object to put in place of ``None``.
        tree: A tree.
        namespace: The namespace whose registered node types are used besides the global ones.

    Returns:
        A new tree, or ``sentinel`` if ``tree`` is ``None``.

    Raises:
        Exception: The errors of :func:`optree.tree_flatten`.

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
        fillvalue: The object in place of the leaves that are in the other tree.

    Returns:
        Two new trees with the structure of ``tree``.

    Raises:
        Exception: The errors of :func:`optree.tree_flatten`, and whatever ``predicate`` raises.

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
    """Return the tree that has at each place the leaf of the first tree with a leaf there.

    This function undoes :func:`optree.tree_partition` if both have the same ``fillvalue``.

    Args:
        tree: A tree.
        other_tree: A tree with the same structure, except that each tree may have ``fillvalue``
            where the other has a leaf or a whole subtree.
        *other_trees: More such trees.
        is_leaf: See :func:`optree.tree_flatten`. The object ``fillvalue`` is a leaf in any case.
        fillvalue: The object that marks a place without a leaf. It is compared by identity.
        none_is_leaf: Whether ``None`` is a leaf. If it is ``fillvalue``, this does not matter.
        namespace: The namespace whose registered node types are used besides the global ones.

    Returns:
        A new tree. It has ``fillvalue`` where no tree has a leaf.

    Raises:
        ValueError: If the structures differ where both trees have a leaf or a subtree.
        Exception: The errors of :func:`optree.tree_flatten`.

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

    def combine(*found: Any) -> Any:
        there = [x for x in found if x is not fillvalue]
        if not there:
            return fillvalue
        root = there[0]
        if len(there) == 1:
            return root
        if _C.is_leaf(root, is_leaf, none_is_leaf, namespace):
            if not _C.all_leaves(there[1:], is_leaf, none_is_leaf, namespace):
                types = [type(x).__name__ for x in there]
                raise ValueError(f"Expected a leaf of each tree at one place, got {types}.")
            return root
        top = _C.structure(root, lambda x: x is not root, none_is_leaf, namespace)
        children = [top.flatten_up_to(x) for x in there]
        return top.unflatten(_C.call_rows(combine, children))

    rests = (other_tree, *other_trees)
    try:
        return _C.map(combine, tree, rests, is_leaf_or_fillvalue, none_is_leaf, namespace)
    except ValueError:  # the first tree has a subtree where another has `fillvalue`, or they differ
        combined: PyTree[T] = combine(tree, *rests)
        return combined
