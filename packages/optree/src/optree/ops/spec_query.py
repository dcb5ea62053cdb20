# SPDX-License-Identifier: Apache-2.0
"""Query a spec. Each function is also a method of :class:`optree.PyTreeSpec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, SupportsIndex, SupportsInt

if TYPE_CHECKING:
    from optree.accessors import PyTreeAccessor
    from optree.typing import PyTreeSpec


def treespec_paths(treespec: PyTreeSpec, /) -> list[tuple[Any, ...]]:
    """Return the path of each leaf of a spec.

    Raises:
        RecursionError: If the spec is deeper than :data:`optree.MAX_RECURSION_DEPTH`.

    Examples:
        >>> import optree
        >>> treespec_paths(optree.tree_structure({'b': (2, [3]), 'a': 1}))
        [('a',), ('b', 0), ('b', 1, 0)]
    """
    return treespec.paths()


def treespec_accessors(treespec: PyTreeSpec, /) -> list[PyTreeAccessor]:
    """Return the accessor of each leaf of a spec.

    Raises:
        RecursionError: If the spec is deeper than :data:`optree.MAX_RECURSION_DEPTH`.

    Examples:
        >>> import optree
        >>> spec = optree.tree_structure({'b': (2, [3]), 'a': 1})
        >>> [accessor.codify('tree') for accessor in treespec_accessors(spec)]
        ["tree['a']", "tree['b'][0]", "tree['b'][1][0]"]
    """
    return treespec.accessors()


def treespec_entries(treespec: PyTreeSpec, /) -> list[Any]:
    """Return the path entry of each child of the root of a spec.

    Examples:
        >>> import optree
        >>> treespec_entries(optree.tree_structure({'b': (2, [3]), 'a': 1}))
        ['a', 'b']
    """
    return treespec.entries()


def treespec_entry(treespec: PyTreeSpec, index: SupportsInt | SupportsIndex, /) -> Any:
    """Return the path entry of one child of the root of a spec.

    Args:
        treespec: The spec.
        index: The position of the child; negative positions count from the end.

    Raises:
        IndexError: If there is no such child.
        TypeError: If ``index`` is not an integer.

    Examples:
        >>> import optree
        >>> treespec_entry(optree.tree_structure({'b': (2, [3]), 'a': 1}), -1)
        'b'
    """
    return treespec.entry(index)


def treespec_children(treespec: PyTreeSpec, /) -> list[PyTreeSpec]:
    """Return the specs of the children of the root of a spec.

    Examples:
        >>> import optree
        >>> treespec_children(optree.tree_structure({'b': (2, [3]), 'a': 1}))
        [PyTreeSpec(*), PyTreeSpec((*, [*]))]
    """
    return treespec.children()


def treespec_child(treespec: PyTreeSpec, index: SupportsInt | SupportsIndex, /) -> PyTreeSpec:
    """Return the spec of one child of the root of a spec.

    Args:
        treespec: The spec.
        index: The position of the child; negative positions count from the end.

    Raises:
        IndexError: If there is no such child.
        TypeError: If ``index`` is not an integer.

    Examples:
        >>> import optree
        >>> treespec_child(optree.tree_structure({'b': (2, [3]), 'a': 1}), -1)
        PyTreeSpec((*, [*]))
    """
    return treespec.child(index)


def treespec_one_level(treespec: PyTreeSpec, /) -> PyTreeSpec | None:
    """Return the spec of the root alone, with leaves as children, or ``None`` for a leaf.

    Examples:
        >>> import optree
        >>> treespec_one_level(optree.tree_structure({'b': (2, [3]), 'a': 1}))
        PyTreeSpec({'a': *, 'b': *})
        >>> treespec_one_level(optree.tree_structure(1)) is None
        True
    """
    return treespec.one_level()


def treespec_transform(
    treespec: PyTreeSpec,
    /,
    f_node: Callable[[PyTreeSpec], PyTreeSpec] | None = None,
    f_leaf: Callable[[PyTreeSpec], PyTreeSpec] | None = None,
) -> PyTreeSpec:
    """Return the spec with nodes and leaves replaced.

    Args:
        treespec: The spec.
        f_node: Called with the one-level spec of each node, children before parents; returns a
            one-level spec with as many children.
        f_leaf: Called with the spec of each leaf; returns any spec.

    Raises:
        TypeError: If a function does not return a spec.
        ValueError: If ``f_node`` returns a spec with another number of children or levels, or a
            function returns a spec with another ``none_is_leaf`` or namespace.

    Examples:
        >>> import optree
        >>> spec = optree.tree_structure({'b': (2, [3]), 'a': 1})
        >>> treespec_transform(spec, f_leaf=lambda _: optree.tree_structure((0, 0)))
        PyTreeSpec({'a': (*, *), 'b': ((*, *), [(*, *)])})
        >>> treespec_transform(
        ...     spec,
        ...     f_node=lambda node: optree.treespec_list(node.children()),
        ... )
        PyTreeSpec([*, [*, [*]]])
    """
    return treespec.transform(f_node, f_leaf)


def treespec_is_leaf(treespec: PyTreeSpec, /, *, strict: bool = True) -> bool:
    """Return whether a spec has only one node.

    Args:
        treespec: The spec.
        strict: Whether the node must be a leaf; otherwise it may be a node without children.

    Examples:
        >>> import optree
        >>> treespec_is_leaf(optree.tree_structure(1))
        True
        >>> treespec_is_leaf(optree.tree_structure([]))
        False
        >>> treespec_is_leaf(optree.tree_structure([]), strict=False)
        True
    """
    if strict:
        return treespec.num_nodes == 1 and treespec.num_leaves == 1
    return treespec.num_nodes == 1


def treespec_is_strict_leaf(treespec: PyTreeSpec, /) -> bool:
    """Return whether a spec is that of a leaf.

    Examples:
        >>> import optree
        >>> treespec_is_strict_leaf(optree.tree_structure(1))
        True
        >>> treespec_is_strict_leaf(optree.tree_structure(None))
        False
    """
    return treespec.num_nodes == 1 and treespec.num_leaves == 1


def treespec_is_one_level(treespec: PyTreeSpec, /) -> bool:
    """Return whether a spec is that of a node whose children are leaves.

    Examples:
        >>> import optree
        >>> [treespec_is_one_level(optree.tree_structure(x)) for x in ([1, 2], [], [[1]], 1)]
        [True, True, False, False]
    """
    num_nodes, num_children = treespec.num_nodes, treespec.num_children
    return num_nodes == num_children + 1 and treespec.num_leaves == num_children


def treespec_is_prefix(
    treespec: PyTreeSpec,
    other_treespec: PyTreeSpec,
    /,
    *,
    strict: bool = False,
) -> bool:
    """Return whether a spec is a prefix of another, which may have subtrees at its leaves.

    Args:
        treespec: The spec.
        other_treespec: The other spec.
        strict: Whether at least one leaf must match a subtree that is not a leaf.

    Raises:
        TypeError: If ``other_treespec`` is not a spec.

    Examples:
        >>> import optree
        >>> spec, other = optree.tree_structure([1, 2]), optree.tree_structure([1, (2, 3)])
        >>> treespec_is_prefix(spec, other), treespec_is_prefix(other, spec)
        (True, False)
        >>> treespec_is_prefix(spec, spec), treespec_is_prefix(spec, spec, strict=True)
        (True, False)
    """
    return treespec.is_prefix(other_treespec, strict=strict)


def treespec_is_suffix(
    treespec: PyTreeSpec,
    other_treespec: PyTreeSpec,
    /,
    *,
    strict: bool = False,
) -> bool:
    """Return whether another spec is a prefix of a spec, see :func:`treespec_is_prefix`.

    Args:
        treespec: The spec.
        other_treespec: The other spec.
        strict: Whether at least one leaf of the other spec must match a subtree that is not a leaf.

    Raises:
        TypeError: If ``other_treespec`` is not a spec.

    Examples:
        >>> import optree
        >>> spec, other = optree.tree_structure([1, (2, 3)]), optree.tree_structure([1, 2])
        >>> treespec_is_suffix(spec, other), treespec_is_suffix(other, spec)
        (True, False)
    """
    return treespec.is_suffix(other_treespec, strict=strict)
