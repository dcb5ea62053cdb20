# SPDX-License-Identifier: Apache-2.0
"""optree: this one and the published ones, through the same public functions."""

from __future__ import annotations

import importlib
from typing import Any, Callable

from benchmarks.optree.trees import Pair, Record, flatten_pair, unflatten_pair

DISTRIBUTIONS = ("optree",)
NONE_IS_LEAF = False
SORTS_DICT = True
SORTS_ORDERED_DICT = False
HAS_SPECS = True

library: Any = importlib.import_module("optree")
optree = library

# Before 0.13 reprs and one-level results had other forms.
COMPARABLE = tuple(map(int, library.__version__.split(".")[:2])) >= (0, 13)

flatten: Callable[..., Any] = library.tree_flatten
unflatten: Callable[..., Any] = library.tree_unflatten
map_: Callable[..., Any] = library.tree_map
parts = flatten
rebuild = unflatten

library.register_pytree_node(Pair, flatten_pair, unflatten_pair, namespace="bench")
if hasattr(library, "dataclasses"):
    library.dataclasses.register_node(Record, namespace="bench")
else:  # before 0.13
    library.register_pytree_node(
        Record,
        lambda record: ((record.left, record.right), None, ("left", "right")),
        lambda _, children: Record(*children),
        namespace="bench",
    )

_TORCH_MODE = """
mode = optree.dict_insertion_ordered(True, namespace="torchlike")
mode.__enter__()
"""
_TRANSPOSE = """
outer = spec
inner = optree.tree_structure((0, 0))
pairs = optree.tree_map(lambda leaf: (leaf, leaf), tree)
"""

STATEMENTS: dict[str, str | tuple[str, str]] = {
    "leaves": "optree.tree_leaves(tree)",
    "structure": "optree.tree_structure(tree)",
    "iterate": "deque(optree.tree_iter(tree), maxlen=0)",
    "map_two": "optree.tree_map(operator.is_, tree, other)",
    "map_in_place": "optree.tree_map_(callable, tree)",
    "with_path": "optree.tree_flatten_with_path(tree)",
    "with_accessor": "optree.tree_flatten_with_accessor(tree)",
    "map_with_path": "optree.tree_map_with_path(second, tree)",
    "paths": "optree.treespec_paths(spec)",
    "accessors": "optree.treespec_accessors(spec)",
    "flatten_up_to": "spec.flatten_up_to(other)",
    "broadcast_prefix": "optree.broadcast_prefix(prefix, tree)",
    "transpose": (_TRANSPOSE, "optree.tree_transpose(outer, inner, pairs)"),
    "reduce": "optree.tree_reduce(operator.add, numbers)",
    "sum": "optree.tree_sum(numbers)",
    "max": "optree.tree_max(numbers)",
    "all": "optree.tree_all(numbers)",
    "any": "optree.tree_any(zeros)",
    "spec_equal": "spec == other_spec",
    "spec_hash": ("", "hash(spec)"),
    "spec_prefix": "spec.is_prefix(other_spec)",
    "spec_compose": ("inner = optree.tree_structure((0, 0))", "spec.compose(inner)"),
    "spec_repr": "repr(spec)",
    "pickle_dump": "pickle.dumps(spec)",
    "pickle_load": ("text = pickle.dumps(spec)", "pickle.loads(text)"),
    "one_level": "optree.tree_flatten_one_level(tree)",
    "replace_nones": "optree.tree_replace_nones(0, tree)",
    "partition": "optree.tree_partition(callable, tree)",
    "is_leaf_c": "optree.tree_flatten(tree, is_leaf=never_c)",
    "is_leaf_python": "optree.tree_flatten(tree, is_leaf=never)",
    "torch_mode": (
        _TORCH_MODE,
        "optree.tree_flatten(tree, none_is_leaf=True, namespace='torchlike')",
    ),
    "custom_flatten": "optree.tree_flatten(tree, namespace='bench')",
    "custom_unflatten": (
        "leaves, spec = optree.tree_flatten(tree, namespace='bench')",
        "optree.tree_unflatten(spec, leaves)",
    ),
    "custom_map": "optree.tree_map(callable, tree, namespace='bench')",
}
