# SPDX-License-Identifier: Apache-2.0
"""The operations that are timed, and the inputs their statements may name.

A statement is a Python expression over the public functions of a rival module and the inputs
below. Every rival module gives its own statements in `STATEMENTS`; for the four operations
of the matrix the ones here apply unless it does. A pair (setup, statement) runs the setup
once, untimed.
"""

from __future__ import annotations

import functools
import operator
import pickle
from collections import deque
from typing import Any, ClassVar

from benchmarks.optree.trees import flatten_pair, make_tree, number_leaf, numbered_leaf

# name in results: name in tables
MATRIX = {
    "flatten": "flatten",
    "unflatten": "unflatten",
    "map_c": "map, C function",
    "map_python": "map, Python function",
}
OTHER = {
    "leaves": "leaves",
    "structure": "structure",
    "iterate": "iterate",
    "map_two": "map over two trees, C function",
    "map_in_place": "map in place, C function",
    "with_path": "flatten with path",
    "with_accessor": "flatten with accessor",
    "map_with_path": "map with path",
    "paths": "paths of a spec",
    "accessors": "accessors of a spec",
    "flatten_up_to": "flatten up to",
    "broadcast_prefix": "broadcast prefix",
    "transpose": "transpose",
    "reduce": "reduce",
    "sum": "sum",
    "max": "max",
    "all": "all",
    "any": "any",
    "spec_equal": "spec equality",
    "spec_hash": "spec hash",
    "spec_prefix": "spec is prefix",
    "spec_compose": "spec compose",
    "spec_repr": "spec repr",
    "pickle_dump": "spec pickle dump",
    "pickle_load": "spec pickle load",
    "one_level": "flatten one level",
    "replace_nones": "replace None",
    "partition": "partition",
    "is_leaf_c": "flatten, C predicate",
    "is_leaf_python": "flatten, Python predicate",
    "torch_mode": "flatten, None is a leaf, insertion order",
}
CUSTOM = {
    "custom_flatten": "flatten",
    "custom_unflatten": "unflatten",
    "custom_map": "map, C function",
}
COLD = {"cold_flatten": "flatten"}
# Answers that may differ between versions of one library.
NOT_COMPARED = {"spec_hash"}
LABELS = {**OTHER, **CUSTOM, **COLD, **MATRIX}

STATEMENTS = {
    "flatten": "flatten(tree)",
    "unflatten": "unflatten(spec, leaves)",
    "map_c": "map_(callable, tree)",
    "map_python": "map_(identity, tree)",
    "cold_flatten": "for tree in trees: flatten(tree)",
}


def identity(leaf: Any) -> Any:
    """Return the leaf: the cheapest Python function."""
    return leaf


def with_path(_: Any, leaf: Any) -> Any:
    """Return the leaf; for maps that also pass the path."""
    return leaf


def never(_: Any) -> bool:
    """Return False: a Python predicate for which nothing is a leaf."""
    return False


class Inputs:
    """The inputs that statements may name; built when first used, because some are large."""

    def __init__(self, rival: Any, tree_name: str) -> None:
        self._rival = rival
        self._tree_name = tree_name

    @functools.cached_property
    def tree(self) -> Any:
        return make_tree(self._tree_name, numbered_leaf())

    @functools.cached_property
    def other(self) -> Any:
        """An equal tree of other objects."""
        return make_tree(self._tree_name, numbered_leaf())

    @functools.cached_property
    def numbers(self) -> Any:
        """The tree with the leaves 1, 2, 3, ..."""
        return make_tree(self._tree_name, number_leaf())

    @functools.cached_property
    def zeros(self) -> Any:
        """The tree with 0 for every leaf."""
        return make_tree(self._tree_name, lambda: 0)

    @functools.cached_property
    def parts(self) -> tuple[Any, Any]:
        leaves, spec = self._rival.parts(self.tree)
        return list(leaves), spec

    @functools.cached_property
    def leaves(self) -> Any:
        return self.parts[0]

    @functools.cached_property
    def spec(self) -> Any:
        return self.parts[1]

    @functools.cached_property
    def other_spec(self) -> Any:
        """An equal spec that is another object."""
        return self._rival.parts(self.other)[1]

    @functools.cached_property
    def prefix(self) -> Any:
        """The root with a number for every child."""
        tree = self.tree
        if isinstance(tree, dict):
            return type(tree)((key, index) for index, key in enumerate(tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)(range(len(tree)))
        return 0

    constants: ClassVar[dict[str, Any]] = {
        "identity": identity,
        "second": with_path,
        "never": never,
        "never_c": complex.__instancecheck__,  # False for every leaf and container
        "always_c": object.__instancecheck__,  # True for everything, without a Python frame
        "flatten_pair": flatten_pair,
        "operator": operator,
        "pickle": pickle,
        "deque": deque,
    }

    def names(self, rival: Any, used: set[str]) -> dict[str, Any]:
        """Return the names that a statement uses."""
        names = {**vars(rival), **self.constants}
        for name in used & {"tree", "other", "numbers", "zeros", "leaves", "spec"}:
            names[name] = getattr(self, name)
        for name in used & {"other_spec", "prefix"}:
            names[name] = getattr(self, name)
        return names


def statement_of(rival: Any, operation: str) -> tuple[str, str] | None:
    """Return (setup, statement), or None if the rival has no such operation."""
    found = rival.STATEMENTS.get(operation, STATEMENTS.get(operation))
    if found is None:
        return None
    return found if isinstance(found, tuple) else ("", found)
