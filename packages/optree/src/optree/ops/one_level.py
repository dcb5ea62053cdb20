# SPDX-License-Identifier: Apache-2.0
"""Take one node apart."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, Callable, Generic

import optree._C as _C
from optree._C import PyTreeKind
from optree.builtin_nodes import (
    _INSERTION_ORDERED_REGISTRY,
    _NODETYPE_REGISTRY,
    DictMetaData,
    PyTreeNodeRegistryEntry,
)
from optree.registry import register_pytree_node
from optree.typing import NamedTuple, T

if TYPE_CHECKING:
    from collections.abc import Collection

    from optree.accessors import PyTreeEntry
    from optree.typing import MetaData, PyTree, UnflattenFunc


class FlattenOneLevelOutput(NamedTuple, Generic[T]):
    """A node taken apart; ``unflatten_func(metadata, children)`` rebuilds it."""

    children: list[PyTree[T]]
    """The children, from left to right."""
    metadata: MetaData
    """What is needed to rebuild the node besides its children."""
    entries: tuple[Any, ...]
    """The path entry of each child."""
    unflatten_func: UnflattenFunc[PyTree[T]]
    """The function that rebuilds the node."""


class FlattenOneLevelOutputEx(FlattenOneLevelOutput[T]):
    """A node taken apart, with its class, path entry type and kind."""

    type: builtins.type[Collection[T]]
    """The class of the node."""
    path_entry_type: builtins.type[PyTreeEntry]
    """The class of the steps from the node to its children."""
    kind: PyTreeKind
    """The kind of the node."""


def _handlers(registry: dict[Any, PyTreeNodeRegistryEntry[Any]], /) -> tuple[Any, ...]:
    """Return the row of each kind for ``_C.set_one_level()``."""
    handlers: dict[PyTreeKind, tuple[Any, dict[str, Any]]] = {
        entry.kind: (
            entry.unflatten_func,
            {"type": entry.type, "path_entry_type": entry.path_entry_type, "kind": entry.kind},
        )
        for entry in registry.values()
    }
    handlers[PyTreeKind.CUSTOM] = (
        None,
        {"type": None, "path_entry_type": None, "kind": PyTreeKind.CUSTOM},
    )
    return tuple(map(handlers.get, PyTreeKind))


_C.set_one_level(
    FlattenOneLevelOutputEx,
    DictMetaData,
    _handlers(_NODETYPE_REGISTRY),
    _handlers({**_NODETYPE_REGISTRY, **_INSERTION_ORDERED_REGISTRY}),
)


@_C.compiled
def tree_flatten_one_level(
    tree: PyTree[T],
    /,
    is_leaf: Callable[[Any], bool] | None = None,
    *,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> FlattenOneLevelOutputEx[T]:
    """Return the children of the root of a tree, and what is needed to rebuild the root.

    Args:
        tree: A tree that is not a leaf.
        is_leaf: Called with the root. If it returns true, the root is a leaf.
        none_is_leaf: Whether ``None`` is a leaf. By default it is a node without children.
        namespace: The namespace whose registered node types are used besides the global ones
            (default: :const:`''`, i.e., the global namespace).

    Returns:
        A namedtuple of the children, the metadata, the path entries, and a function that rebuilds
        the root. It has the further attributes ``type``, ``path_entry_type`` and ``kind``.

    Raises:
        ValueError: If the root is a leaf.
        RuntimeError: If the flatten function of a custom node does not return children, metadata
            and, optionally, one path entry per child.
        TypeError: If ``is_leaf`` is neither callable nor ``None``, or ``namespace`` not a string.

    Examples:
        >>> node = tree_flatten_one_level({'b': (2, 3), 'a': 1})
        >>> node.children, node.entries, node.type
        ([1, (2, 3)], ('a', 'b'), <class 'dict'>)
        >>> node.unflatten_func(node.metadata, ['A', 'B'])
        {'b': 'B', 'a': 'A'}
    """
    # The builtin does the same. This definition serves unusual arguments and TorchDynamo.
    if is_leaf is not None and not callable(is_leaf):
        raise TypeError(f"expected a callable or None for 'is_leaf', got {is_leaf!r}")
    node_type: Any = type(tree)
    if (tree is None and none_is_leaf) or (is_leaf is not None and is_leaf(tree)):
        handler = None
    else:
        handler = register_pytree_node.get(node_type, namespace=namespace)  # type: ignore[attr-defined]
    if handler is None:
        raise ValueError(f"Cannot flatten leaf-type: {node_type} (node: {tree!r}).")

    flattened = tuple(handler.flatten_func(tree))
    if len(flattened) == 2:
        children, metadata = flattened
        entries = None
    elif len(flattened) == 3:
        children, metadata, entries = flattened
    else:
        raise RuntimeError(
            f"PyTree custom flatten function for type {node_type} should return a 2- or 3-tuple, "
            f"got {len(flattened)}.",
        )
    children = list(children)
    entries = tuple(range(len(children)) if entries is None else entries)
    if len(children) != len(entries):
        raise RuntimeError(
            f"PyTree custom flatten function for type {node_type} returned inconsistent "
            f"number of children ({len(children)}) and number of entries ({len(entries)}).",
        )

    output: FlattenOneLevelOutputEx[T] = FlattenOneLevelOutputEx(
        children=children,
        metadata=metadata,
        entries=entries,
        unflatten_func=handler.unflatten_func,
    )
    output.type = node_type
    output.path_entry_type = handler.path_entry_type
    output.kind = handler.kind
    return output
