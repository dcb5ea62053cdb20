# SPDX-License-Identifier: Apache-2.0
"""What torch's two pytree modules have in common: their names."""

from __future__ import annotations

from typing import Any

from benchmarks.optree.trees import Pair, Record, flatten_pair


def register(pytree: Any) -> None:
    """Make the custom containers of the benchmark known to a pytree module."""
    pytree.register_pytree_node(Pair, flatten_pair, lambda children, _: Pair(*children))
    pytree.register_pytree_node(
        Record,
        lambda record: ((record.left, record.right), None),
        lambda children, _: Record(*children),
    )


STATEMENTS: dict[str, str | tuple[str, str]] = {
    "unflatten": "unflatten(leaves, spec)",
    "leaves": "pytree.tree_leaves(tree)",
    "structure": "pytree.tree_structure(tree)",
    "iterate": "deque(pytree.tree_iter(tree), maxlen=0)",
    "map_two": "map_(operator.is_, tree, other)",
    "map_in_place": "pytree.tree_map_(callable, tree)",
    "with_path": "pytree.tree_flatten_with_path(tree)",
    "map_with_path": "pytree.tree_map_with_path(second, tree)",
    "flatten_up_to": "spec.flatten_up_to(other)",
    "broadcast_prefix": "pytree._broadcast_to_and_flatten(prefix, spec)",
    # bool would stop at the first None, which is a leaf here.
    "all": "pytree.tree_all(always_c, numbers)",
    "any": "pytree.tree_any(never_c, zeros)",
    "spec_equal": "spec == other_spec",
    "spec_hash": "hash(spec)",
    "spec_repr": "repr(spec)",
    "pickle_dump": "pickle.dumps(spec)",
    "pickle_load": ("text = pickle.dumps(spec)", "pickle.loads(text)"),
    "is_leaf_c": "flatten(tree, is_leaf=never_c)",
    "is_leaf_python": "flatten(tree, is_leaf=never)",
    "torch_mode": "flatten(tree)",
    "custom_flatten": "flatten(tree)",
    "custom_unflatten": "unflatten(leaves, spec)",
    "custom_map": "map_(callable, tree)",
}
