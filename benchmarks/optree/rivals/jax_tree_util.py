# SPDX-License-Identifier: Apache-2.0
"""jax.tree_util."""

from __future__ import annotations

import importlib
import os
from typing import Any, Callable

from benchmarks.optree.trees import Pair, Record, flatten_pair, unflatten_pair

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # trees need no accelerator

DISTRIBUTIONS = ("jax", "jaxlib")
NONE_IS_LEAF = False
SORTS_DICT = True
SORTS_ORDERED_DICT = False
HAS_SPECS = True
COMPARABLE = False

library: Any = importlib.import_module("jax")
tree_util: Any = importlib.import_module("jax.tree_util")

flatten: Callable[..., Any] = tree_util.tree_flatten
unflatten: Callable[..., Any] = tree_util.tree_unflatten
map_: Callable[..., Any] = tree_util.tree_map
parts = flatten
rebuild = unflatten

tree_util.register_pytree_node(Pair, flatten_pair, unflatten_pair)
tree_util.register_dataclass(Record, data_fields=["left", "right"], meta_fields=[])

_TRANSPOSE = """
outer = spec
inner = tree_util.tree_structure((0, 0))
pairs = map_(lambda leaf: (leaf, leaf), tree)
"""

STATEMENTS: dict[str, str | tuple[str, str]] = {
    "leaves": "tree_util.tree_leaves(tree)",
    "structure": "tree_util.tree_structure(tree)",
    "map_two": "map_(operator.is_, tree, other)",
    "with_path": "tree_util.tree_flatten_with_path(tree)",
    "map_with_path": "tree_util.tree_map_with_path(second, tree)",
    "flatten_up_to": "spec.flatten_up_to(other)",
    "broadcast_prefix": "library.tree.leaves(library.tree.broadcast(prefix, tree))",
    "transpose": (_TRANSPOSE, "tree_util.tree_transpose(outer, inner, pairs)"),
    "reduce": "tree_util.tree_reduce(operator.add, numbers)",
    "sum": "tree_util.tree_reduce(operator.add, numbers, 0)",
    "all": "tree_util.tree_all(numbers)",
    "spec_equal": "spec == other_spec",
    "spec_hash": "hash(spec)",
    "spec_compose": ("inner = tree_util.tree_structure((0, 0))", "spec.compose(inner)"),
    "spec_repr": "repr(spec)",
    "pickle_dump": "pickle.dumps(spec)",
    "pickle_load": ("text = pickle.dumps(spec)", "pickle.loads(text)"),
    "one_level": "tree_util.default_registry.flatten_one_level(tree)",
    "is_leaf_c": "flatten(tree, is_leaf=never_c)",
    "is_leaf_python": "flatten(tree, is_leaf=never)",
    "custom_flatten": "flatten(tree)",
    "custom_unflatten": "unflatten(spec, leaves)",
    "custom_map": "map_(callable, tree)",
}
