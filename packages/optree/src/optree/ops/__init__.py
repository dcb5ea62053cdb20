# SPDX-License-Identifier: Apache-2.0
"""Functions of trees (``tree_*``) and of their specs (``treespec_*``)."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from typing import Any, Final

from optree._C import MAX_RECURSION_DEPTH
from optree.ops.broadcast import (
    broadcast_common,
    broadcast_prefix,
    tree_broadcast_common,
    tree_broadcast_map,
    tree_broadcast_map_with_accessor,
    tree_broadcast_map_with_path,
    tree_broadcast_prefix,
)
from optree.ops.flatten import (
    all_leaves,
    tree_accessors,
    tree_flatten,
    tree_flatten_with_accessor,
    tree_flatten_with_path,
    tree_is_leaf,
    tree_iter,
    tree_leaves,
    tree_paths,
    tree_structure,
    tree_unflatten,
)
from optree.ops.flatten import tree_leaves_with_path as tree_leaves_with_path
from optree.ops.map import tree_combine as tree_combine
from optree.ops.map import (
    tree_map,
    tree_map_,
    tree_map_with_accessor,
    tree_map_with_accessor_,
    tree_map_with_path,
    tree_map_with_path_,
    tree_partition,
    tree_replace_nones,
)
from optree.ops.mismatch import prefix_errors
from optree.ops.one_level import (
    FlattenOneLevelOutput,
    FlattenOneLevelOutputEx,
    tree_flatten_one_level,
)
from optree.ops.reduce import tree_all, tree_any, tree_max, tree_min, tree_reduce, tree_sum
from optree.ops.select import tree_all_only as tree_all_only
from optree.ops.select import tree_any_only as tree_any_only
from optree.ops.select import tree_map_only as tree_map_only
from optree.ops.select import tree_replace_at as tree_replace_at
from optree.ops.spec_build import (
    treespec_defaultdict,
    treespec_deque,
    treespec_dict,
    treespec_from_collection,
    treespec_frozendict,
    treespec_leaf,
    treespec_list,
    treespec_namedtuple,
    treespec_none,
    treespec_ordereddict,
    treespec_structseq,
    treespec_tuple,
)
from optree.ops.spec_query import (
    treespec_accessors,
    treespec_child,
    treespec_children,
    treespec_entries,
    treespec_entry,
    treespec_is_leaf,
    treespec_is_one_level,
    treespec_is_prefix,
    treespec_is_strict_leaf,
    treespec_is_suffix,
    treespec_one_level,
    treespec_paths,
    treespec_transform,
)
from optree.ops.text import keystr as keystr
from optree.ops.text import treespec_dumps as treespec_dumps
from optree.ops.text import treespec_loads as treespec_loads
from optree.ops.transpose import (
    tree_transpose,
    tree_transpose_map,
    tree_transpose_map_with_accessor,
    tree_transpose_map_with_path,
)

__all__ = [  # noqa: RUF022 # grouped
    "MAX_RECURSION_DEPTH",
    "NONE_IS_NODE",
    "NONE_IS_LEAF",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_flatten_with_accessor",
    "tree_unflatten",
    "tree_iter",
    "tree_leaves",
    "tree_structure",
    "tree_paths",
    "tree_accessors",
    "tree_is_leaf",
    "all_leaves",
    "tree_map",
    "tree_map_",
    "tree_map_with_path",
    "tree_map_with_path_",
    "tree_map_with_accessor",
    "tree_map_with_accessor_",
    "tree_replace_nones",
    "tree_partition",
    "tree_transpose",
    "tree_transpose_map",
    "tree_transpose_map_with_path",
    "tree_transpose_map_with_accessor",
    "tree_broadcast_prefix",
    "broadcast_prefix",
    "tree_broadcast_common",
    "broadcast_common",
    "tree_broadcast_map",
    "tree_broadcast_map_with_path",
    "tree_broadcast_map_with_accessor",
    "tree_reduce",
    "tree_sum",
    "tree_max",
    "tree_min",
    "tree_all",
    "tree_any",
    "tree_flatten_one_level",
    "treespec_paths",
    "treespec_accessors",
    "treespec_entries",
    "treespec_entry",
    "treespec_children",
    "treespec_child",
    "treespec_one_level",
    "treespec_transform",
    "treespec_is_leaf",
    "treespec_is_strict_leaf",
    "treespec_is_one_level",
    "treespec_is_prefix",
    "treespec_is_suffix",
    "treespec_leaf",
    "treespec_none",
    "treespec_tuple",
    "treespec_list",
    "treespec_dict",
    "treespec_namedtuple",
    "treespec_ordereddict",
    "treespec_defaultdict",
    "treespec_deque",
    "treespec_structseq",
    "treespec_frozendict",
    "treespec_from_collection",
    "prefix_errors",
]


NONE_IS_NODE: bool = False
"""A value of ``none_is_leaf``: ``None`` is a node without children."""
NONE_IS_LEAF: bool = True
"""A value of ``none_is_leaf``: ``None`` is a leaf."""


STANDARD_DICT_TYPES: Final[frozenset[type[dict[Any, Any]]]] = frozenset(
    {dict, OrderedDict, defaultdict},
)
"""The dictionary classes that are nodes and that match each other when trees are compared."""


# Clients such as TorchDynamo expect the functions to be members of this module.
for _name, _member in list(globals().items()):
    if getattr(_member, "__module__", "").startswith("optree.ops.") and isinstance(
        _member,
        (types.FunctionType, type),
    ):
        _member.__module__ = "optree.ops"
del _name, _member
