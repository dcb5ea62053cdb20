# SPDX-License-Identifier: Apache-2.0
"""Explain why a tree is not a prefix of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import optree._C as _C
from optree.accessors import PyTreeAccessor
from optree.ops.one_level import FlattenOneLevelOutputEx, tree_flatten_one_level
from optree.typing import PyTreeKind, S, T
from optree.utils import total_order_sorted

if TYPE_CHECKING:
    from optree.typing import PyTree


_DICT_KINDS = frozenset(
    (PyTreeKind.DICT, PyTreeKind.ORDEREDDICT, PyTreeKind.DEFAULTDICT, PyTreeKind.FROZENDICT),
)


def prefix_errors(
    prefix_tree: PyTree[T],
    full_tree: PyTree[S],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> list[Callable[[str], ValueError]]:
    """Return the reasons why a tree is not a prefix of another.

    Args:
        prefix_tree: The tree that should be a prefix.
        full_tree: The tree that it should be a prefix of.
        is_leaf: Called with each visited object of ``prefix_tree``, from the root downwards. If it
            returns true, the object is a leaf, which any subtree of ``full_tree`` may face.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A list with one function for each reason. It is empty if the tree is a prefix. Each function
        takes the name of the argument that ``prefix_tree`` was passed as, and returns the exception
        to raise.

    Raises:
        RecursionError: If the trees are deeper than :data:`optree.MAX_RECURSION_DEPTH`. Trees that
            contain themselves are.
        Exception: The other errors of :func:`optree.tree_flatten`.

    Examples:
        >>> for error in prefix_errors({'a': (1, 2), 'b': [3]}, {'a': [1, 2], 'b': [3]}):
        ...     print(error('in_axes'))
        pytree structure error: different types at key path
            in_axes['a']
        At that key path, the prefix pytree in_axes has a subtree of type
            <class 'tuple'>
        but at the same key path the full pytree has a subtree of different type
            <class 'list'>.
    """
    errors: list[Callable[[str], ValueError]] = []
    pending: list[tuple[PyTreeAccessor, Any, Any]] = [(PyTreeAccessor(), prefix_tree, full_tree)]
    while pending:
        accessor, prefix, full = pending.pop()
        if len(accessor) > _C.MAX_RECURSION_DEPTH:
            raise RecursionError("Maximum recursion depth exceeded while comparing the trees.")
        if _C.is_leaf(prefix, is_leaf, none_is_leaf, namespace):
            continue
        node = tree_flatten_one_level(prefix, none_is_leaf=none_is_leaf, namespace=namespace)
        if _C.is_leaf(full, None, none_is_leaf, namespace):
            errors.append(_different_types(accessor, prefix, full))
            continue
        full_node = tree_flatten_one_level(full, none_is_leaf=none_is_leaf, namespace=namespace)
        error = _difference(accessor, prefix, node, full, full_node)
        if error is not None:
            errors.append(error)
            continue
        full_children = full_node.children
        if node.kind in _DICT_KINDS:
            children_by_key = {key: full_children[i] for i, key in enumerate(full_node.entries)}
            full_children = [children_by_key[key] for key in node.entries]
        steps = [
            (
                accessor + node.path_entry_type(entry, node.type, node.kind),
                node.children[i],
                full_children[i],
            )
            for i, entry in enumerate(node.entries)
        ]
        pending.extend(reversed(steps))
    return errors


def _difference(
    accessor: PyTreeAccessor,
    prefix: Any,
    node: FlattenOneLevelOutputEx[Any],
    full: Any,
    full_node: FlattenOneLevelOutputEx[Any],
    /,
) -> Callable[[str], ValueError] | None:
    if node.kind in _DICT_KINDS and full_node.kind in _DICT_KINDS:
        if set(node.entries) != set(full_node.entries):
            return _different_keys(accessor, node, full_node)
        return None
    if type(prefix) is not type(full):
        return _different_types(accessor, prefix, full)
    if len(node.children) != len(full_node.children):
        return _different_numbers(accessor, node, full_node)
    # pylint: disable-next=unneeded-not # metadata has to define `==` only
    if node.kind == PyTreeKind.CUSTOM and not node.metadata == full_node.metadata:  # noqa: SIM201
        return _different_metadata(accessor, node, full_node)
    return None


def _location(accessor: PyTreeAccessor, name: str, /) -> str:
    return accessor.codify(name) if accessor else f"{name} tree root"


def _different_types(
    accessor: PyTreeAccessor,
    prefix: Any,
    full: Any,
    /,
) -> Callable[[str], ValueError]:
    prefix_type, full_type = type(prefix), type(full)
    return lambda name: ValueError(
        f"pytree structure error: different types at key path\n"
        f"    {_location(accessor, name)}\n"
        f"At that key path, the prefix pytree {name} has a subtree of type\n"
        f"    {prefix_type}\n"
        f"but at the same key path the full pytree has a subtree of different type\n"
        f"    {full_type}.",
    )


def _different_keys(
    accessor: PyTreeAccessor,
    node: FlattenOneLevelOutputEx[Any],
    full_node: FlattenOneLevelOutputEx[Any],
    /,
) -> Callable[[str], ValueError]:
    keys, full_keys = list(node.entries), list(full_node.entries)
    missing = total_order_sorted(set(keys).difference(full_keys))
    extra = total_order_sorted(set(full_keys).difference(keys))
    missing_text = f"\nmissing key(s):\n    {missing}" if missing else ""
    extra_text = f"\nextra key(s):\n    {extra}" if extra else ""
    return lambda name: ValueError(
        f"pytree structure error: different pytree keys at key path\n"
        f"    {_location(accessor, name)}\n"
        f"At that key path, the prefix pytree {name} has a subtree of type\n"
        f"    {node.type}\n"
        f"with {len(keys)} key(s)\n"
        f"    {keys}\n"
        f"but at the same key path the full pytree has a subtree of type\n"
        f"    {full_node.type}\n"
        f"but with {len(full_keys)} key(s)\n"
        f"    {full_keys}{missing_text}{extra_text}",
    )


def _different_numbers(
    accessor: PyTreeAccessor,
    node: FlattenOneLevelOutputEx[Any],
    full_node: FlattenOneLevelOutputEx[Any],
    /,
) -> Callable[[str], ValueError]:
    number, full_number = len(node.children), len(full_node.children)
    return lambda name: ValueError(
        f"pytree structure error: different numbers of pytree children at key path\n"
        f"    {_location(accessor, name)}\n"
        f"At that key path, the prefix pytree {name} has a subtree of type\n"
        f"    {node.type}\n"
        f"with {number} children, but at the same key path the full pytree has a subtree "
        f"of the same type but with {full_number} children.",
    )


def _different_metadata(
    accessor: PyTreeAccessor,
    node: FlattenOneLevelOutputEx[Any],
    full_node: FlattenOneLevelOutputEx[Any],
    /,
) -> Callable[[str], ValueError]:
    import difflib  # here, to keep `import optree` fast
    import textwrap

    metadata, full_metadata = repr(node.metadata), repr(full_node.metadata)
    diff = "\n".join(difflib.ndiff(metadata.splitlines(), full_metadata.splitlines()))
    return lambda name: ValueError(
        f"pytree structure error: different pytree metadata at key path\n"
        f"    {_location(accessor, name)}\n"
        f"At that key path, the prefix pytree {name} has a subtree of type\n"
        f"    {node.type}\n"
        f"with metadata\n"
        f"    {metadata}\n"
        f"but at the same key path the full pytree has a subtree of the same type "
        f"but with metadata\n"
        f"    {full_metadata}\n"
        f"so the diff in the metadata at these pytree nodes is\n"
        f"{textwrap.indent(diff, prefix='    ')}",
    )
