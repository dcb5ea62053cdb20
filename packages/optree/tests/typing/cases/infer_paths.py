# SPDX-License-Identifier: Apache-2.0
"""Types of paths, of accessors, and of the attributes and methods of a spec."""

from __future__ import annotations

from typing import Any, Optional

from typing_extensions import assert_type

import optree
from optree import MappingEntry, PyTreeAccessor, PyTreeEntry, PyTreeKind, PyTreeSpec, SequenceEntry


def accessors(params: dict[str, list[float]]) -> None:
    assert_type(optree.tree_paths(params), list[tuple[Any, ...]])
    assert_type(optree.tree_accessors(params), list[PyTreeAccessor])
    accessor = optree.tree_accessors(params)[0]
    assert_type(accessor[0], PyTreeEntry)
    assert_type(accessor[:1], PyTreeAccessor)
    assert_type(accessor + accessor, PyTreeAccessor)
    assert_type(accessor + accessor[0], PyTreeAccessor)
    assert_type(accessor[0] + accessor[1], PyTreeAccessor)
    assert_type(2 * accessor, PyTreeAccessor)
    assert_type(accessor.path, tuple[Any, ...])
    assert_type(accessor.codify("params"), str)
    assert_type(optree.keystr(accessor), str)
    for entry in accessor:
        assert_type(entry, PyTreeEntry)


def entries() -> None:
    position: SequenceEntry[float] = SequenceEntry(0, list, PyTreeKind.LIST)
    assert_type(position.index, int)
    assert_type(position([1.0]), float)
    key: MappingEntry[str, float] = MappingEntry("a", dict, PyTreeKind.DICT)
    assert_type(key.key, str)
    assert_type(key({"a": 1.0}), float)


def specs(spec: PyTreeSpec) -> None:
    assert_type(spec.kind, PyTreeKind)
    assert_type(spec.type, Optional[type])
    assert_type(spec.num_leaves, int)
    assert_type(spec.children(), list[PyTreeSpec])
    assert_type(spec.one_level(), Optional[PyTreeSpec])
    assert_type(spec.paths(), list[tuple[Any, ...]])
    assert_type(spec.accessors(), list[PyTreeAccessor])
    assert_type(spec <= spec, bool)
    assert_type(optree.treespec_dict({"a": spec}, b=spec), PyTreeSpec)
    assert_type(optree.treespec_tuple([spec, spec]), PyTreeSpec)
    assert_type(optree.treespec_loads(optree.treespec_dumps(spec)), PyTreeSpec)
    assert_type(spec.transform(lambda node: node, lambda leaf: leaf), PyTreeSpec)


def wrong_arguments(spec: PyTreeSpec) -> None:
    assert spec < 3  # type: ignore[operator]
    spec.num_leaves = 3  # type: ignore[misc]
    spec.flatten(3)  # type: ignore[attr-defined]
    spec.compose(inner=spec)  # type: ignore[call-arg]
