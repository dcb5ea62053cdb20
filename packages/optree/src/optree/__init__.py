# SPDX-License-Identifier: Apache-2.0
"""Trees of Python containers: flatten them to lists of leaves, rebuild them, map over them.

A tree is a leaf or a container of trees. Containers are tuples, lists, dictionaries, deques, named
tuples, struct sequences, ``None``, and instances of classes that were registered. Everything else
is a leaf.

Examples:
    >>> import optree
    >>> tree = {'b': (2, [3, 4]), 'a': 1, 'c': None}
    >>> optree.tree_map(lambda x: x * x, tree)
    {'b': (4, [9, 16]), 'a': 1, 'c': None}
    >>> leaves, spec = optree.tree_flatten(tree)
    >>> leaves
    [1, 2, 3, 4]
    >>> optree.tree_unflatten(spec, leaves) == tree
    True
"""

from __future__ import annotations

from optree import accessors as accessors
from optree import dataclasses as dataclasses
from optree import functools as functools
from optree import integrations as integrations
from optree import pytree as pytree
from optree import treespec as treespec
from optree import typing as typing
from optree.accessors import (
    AutoEntry,
    DataclassEntry,
    FlattenedEntry,
    GetAttrEntry,
    GetItemEntry,
    MappingEntry,
    NamedTupleEntry,
    PyTreeAccessor,
    PyTreeEntry,
    SequenceEntry,
    StructSequenceEntry,
)
from optree.dataclasses import register_dataclass as register_dataclass
from optree.ops import (
    MAX_RECURSION_DEPTH,
    NONE_IS_LEAF,
    NONE_IS_NODE,
    all_leaves,
    broadcast_common,
    broadcast_prefix,
    prefix_errors,
    tree_accessors,
    tree_all,
    tree_any,
    tree_broadcast_common,
    tree_broadcast_map,
    tree_broadcast_map_with_accessor,
    tree_broadcast_map_with_path,
    tree_broadcast_prefix,
    tree_flatten,
    tree_flatten_one_level,
    tree_flatten_with_accessor,
    tree_flatten_with_path,
    tree_is_leaf,
    tree_iter,
    tree_leaves,
    tree_map,
    tree_map_,
    tree_map_with_accessor,
    tree_map_with_accessor_,
    tree_map_with_path,
    tree_map_with_path_,
    tree_max,
    tree_min,
    tree_partition,
    tree_paths,
    tree_reduce,
    tree_replace_nones,
    tree_structure,
    tree_sum,
    tree_transpose,
    tree_transpose_map,
    tree_transpose_map_with_accessor,
    tree_transpose_map_with_path,
    tree_unflatten,
    treespec_accessors,
    treespec_child,
    treespec_children,
    treespec_defaultdict,
    treespec_deque,
    treespec_dict,
    treespec_entries,
    treespec_entry,
    treespec_from_collection,
    treespec_frozendict,
    treespec_is_leaf,
    treespec_is_one_level,
    treespec_is_prefix,
    treespec_is_strict_leaf,
    treespec_is_suffix,
    treespec_leaf,
    treespec_list,
    treespec_namedtuple,
    treespec_none,
    treespec_one_level,
    treespec_ordereddict,
    treespec_paths,
    treespec_structseq,
    treespec_transform,
    treespec_tuple,
)
from optree.ops import keystr as keystr
from optree.ops import tree_all_only as tree_all_only
from optree.ops import tree_any_only as tree_any_only
from optree.ops import tree_combine as tree_combine
from optree.ops import tree_leaves_with_path as tree_leaves_with_path
from optree.ops import tree_map_only as tree_map_only
from optree.ops import tree_replace_at as tree_replace_at
from optree.ops import treespec_dumps as treespec_dumps
from optree.ops import treespec_loads as treespec_loads
from optree.registry import GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from optree.registry import clear_caches as clear_caches
from optree.registry import (
    dict_insertion_ordered,
    register_pytree_node,
    register_pytree_node_class,
    unregister_pytree_node,
)
from optree.registry import register_static as register_static
from optree.summary import tree_summary as tree_summary
from optree.typing import (
    CustomTreeNode,
    FlattenFunc,
    PyTree,
    PyTreeDef,
    PyTreeKind,
    PyTreeSpec,
    PyTreeTypeVar,
    UnflattenFunc,
    is_namedtuple,
    is_namedtuple_class,
    is_namedtuple_instance,
    is_structseq,
    is_structseq_class,
    is_structseq_instance,
    namedtuple_fields,
    structseq_fields,
)
from optree.version import __version__ as __version__

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
    "prefix_errors",
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
    "PyTreeEntry",
    "GetAttrEntry",
    "GetItemEntry",
    "FlattenedEntry",
    "AutoEntry",
    "SequenceEntry",
    "MappingEntry",
    "NamedTupleEntry",
    "StructSequenceEntry",
    "DataclassEntry",
    "PyTreeAccessor",
    "register_pytree_node",
    "register_pytree_node_class",
    "unregister_pytree_node",
    "dict_insertion_ordered",
    "PyTreeSpec",
    "PyTreeDef",
    "PyTreeKind",
    "PyTree",
    "PyTreeTypeVar",
    "CustomTreeNode",
    "FlattenFunc",
    "UnflattenFunc",
    "is_namedtuple",
    "is_namedtuple_class",
    "is_namedtuple_instance",
    "namedtuple_fields",
    "is_structseq",
    "is_structseq_class",
    "is_structseq_instance",
    "structseq_fields",
]
