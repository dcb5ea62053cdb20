# SPDX-License-Identifier: Apache-2.0
"""Write paths as text, and specs as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import optree._C as _C
from optree.accessors import PyTreeAccessor
from optree.typing import PyTreeKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from optree.typing import PyTreeSpec


def keystr(path: PyTreeAccessor | Iterable[Any], /) -> str:
    """Return a path as text, to name a leaf in messages and tables.

    The texts of the leaves of a tree differ, unless two keys of one dictionary have the same
    ``repr``, as two NaNs have.

    Args:
        path: An accessor, shown as code without a root, or a tuple of path entries, shown as
            indices in brackets.

    Returns:
        The text, empty for the root.

    Examples:
        >>> import optree
        >>> tree = {'layers': [{'bias': 0}]}
        >>> keystr(optree.tree_accessors(tree)[0])
        "['layers'][0]['bias']"
        >>> keystr(optree.tree_paths(tree)[0])
        "['layers'][0]['bias']"
    """
    if isinstance(path, PyTreeAccessor):
        return path.codify("")
    return "".join([f"[{entry!r}]" for entry in path])


_JSON_VERSION = 1
_JSON_KINDS: Final[dict[str, PyTreeKind]] = {
    kind.name.lower(): kind
    for kind in (
        PyTreeKind.NONE,
        PyTreeKind.TUPLE,
        PyTreeKind.LIST,
        PyTreeKind.DICT,
        PyTreeKind.ORDEREDDICT,
        PyTreeKind.DEFAULTDICT,
        PyTreeKind.DEQUE,
        PyTreeKind.FROZENDICT,
    )
}


def treespec_dumps(treespec: PyTreeSpec, /) -> str:
    """Return a spec as JSON text, readable without executing code.

    Unlike a pickle, the text can come from an untrusted source. It can describe ``None``, tuples,
    lists, deques, and dictionaries. These have no default factory, and their keys are strings,
    integers, floats other than NaN, booleans or ``None``.

    Args:
        treespec: The spec.

    Returns:
        The text, for :func:`treespec_loads`.

    Raises:
        ValueError: If the spec has another node or another dictionary key.

    Examples:
        >>> import json
        >>> import optree
        >>> spec = optree.tree_structure({'b': (2, [3, None]), 'a': 1})
        >>> treespec_loads(treespec_dumps(spec)) == spec
        True
        >>> json.loads(treespec_dumps(optree.tree_structure((1, [2]))))['nodes']
        ['*', '*', ['list', 1], ['tuple', 2]]
    """
    import json  # here, to keep `import optree` fast

    node_states, none_is_leaf, namespace = treespec.__getstate__()
    nodes = [_node_to_json(*state) for state in node_states]
    return json.dumps(
        {
            "version": _JSON_VERSION,
            "none_is_leaf": none_is_leaf,
            "namespace": namespace,
            "nodes": nodes,
        },
    )


def _check_json_keys(keys: Iterable[Any], /) -> list[Any]:
    checked = list(keys)
    for key in checked:
        if key is not None and type(key) not in (str, int, float, bool):
            raise ValueError(
                f"Expected dictionary keys that are strings, numbers, booleans or None "
                f"to write a PyTreeSpec as JSON, got {key!r}.",
            )
        if key != key:  # a NaN that is read again is not the same key
            raise ValueError(f"Cannot write a PyTreeSpec with the dictionary key {key!r} as JSON.")
    return checked


def _node_to_json(
    kind_value: int,
    arity: int,
    node_data: Any,
    node_entries: Any,
    custom_type: type | None,
    num_leaves: int,
    num_nodes: int,
    original_keys: Any,
    /,
) -> Any:
    kind = PyTreeKind(kind_value)
    if kind == PyTreeKind.LEAF:
        return "*"
    if kind in (PyTreeKind.NONE, PyTreeKind.TUPLE, PyTreeKind.LIST):
        return [kind.name.lower(), arity]
    if kind == PyTreeKind.DEQUE:
        return ["deque", arity, node_data]
    if kind == PyTreeKind.ORDEREDDICT:
        return ["ordereddict", _check_json_keys(node_data)]
    if kind in (PyTreeKind.DICT, PyTreeKind.FROZENDICT):
        return [kind.name.lower(), _check_json_keys(node_data), list(original_keys)]
    if kind == PyTreeKind.DEFAULTDICT and node_data[0] is None:
        return ["defaultdict", _check_json_keys(node_data[1]), list(original_keys)]
    described = node_data if custom_type is None else custom_type
    raise ValueError(
        f"Cannot write a PyTreeSpec node of kind {kind.name} as JSON: {described!r}. "
        "Use pickle, or a tree of plain containers."
    )


def treespec_loads(text: str, /) -> PyTreeSpec:
    """Return the spec that :func:`treespec_dumps` wrote as text.

    Args:
        text: The text.

    Returns:
        The spec.

    Raises:
        ValueError: If the text was not written by :func:`treespec_dumps`.

    Examples:
        >>> treespec_loads(
        ...     '{"version": 1, "none_is_leaf": false, "namespace": "", '
        ...     '"nodes": ["*", "*", ["list", 1], ["tuple", 2]]}'
        ... )
        PyTreeSpec((*, [*]))
    """
    import json  # here, to keep `import optree` fast

    try:
        document = json.loads(text)
        if document["version"] != _JSON_VERSION:
            raise ValueError(f"expected version {_JSON_VERSION}, got {document['version']!r}")
        none_is_leaf, namespace = document["none_is_leaf"], document["namespace"]
        if not isinstance(none_is_leaf, bool) or not isinstance(namespace, str):
            raise ValueError("expected a boolean `none_is_leaf` and a string `namespace`")
        states: list[tuple[Any, ...]] = []
        sizes: list[tuple[int, int]] = []
        for node in document["nodes"]:
            _append_state_from_json(node, states, sizes)
        treespec = _C.PyTreeSpec.__new__(_C.PyTreeSpec)
        treespec.__setstate__((tuple(states), none_is_leaf, namespace))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as ex:
        raise ValueError(f"Expected a PyTreeSpec written by `treespec_dumps()`: {ex}") from ex
    return treespec


def _append_state_from_json(
    node: Any,
    states: list[tuple[Any, ...]],
    sizes: list[tuple[int, int]],
    /,
) -> None:
    if node == "*":
        states.append((int(PyTreeKind.LEAF), 0, None, None, None, 1, 1, None))
        sizes.append((1, 1))
        return
    kind = _JSON_KINDS.get(node[0])
    if kind is None:
        raise ValueError(f"expected one of the kinds {sorted(_JSON_KINDS)}, got {node[0]!r}")
    node_data: Any = None
    original_keys: dict[Any, None] | None = None
    if kind in (PyTreeKind.NONE, PyTreeKind.TUPLE, PyTreeKind.LIST):
        arity = node[1]
    elif kind == PyTreeKind.DEQUE:
        _, arity, node_data = node
    else:
        node_data = list(node[1])
        arity = len(node_data)
        if kind != PyTreeKind.ORDEREDDICT:
            original_keys = dict.fromkeys(node[2])
        if kind == PyTreeKind.DEFAULTDICT:
            node_data = (None, node_data)
    if not isinstance(arity, int) or not 0 <= arity <= len(sizes):
        raise ValueError(f"node {node!r} has an impossible number of children")
    children = sizes[len(sizes) - arity :]
    del sizes[len(sizes) - arity :]
    num_leaves = sum(leaves for leaves, _ in children)
    num_nodes = 1 + sum(nodes for _, nodes in children)
    sizes.append((num_leaves, num_nodes))
    states.append(
        (int(kind), arity, node_data, None, None, num_leaves, num_nodes, original_keys),
    )
