# SPDX-License-Identifier: Apache-2.0
"""Maps return trees whose leaves have the return type of the function."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

import optree
from optree import PyTree, PyTreeSpec


def text(x: float) -> str:
    return str(x)


def add(x: float, y: float) -> float:
    return x + y


def named(path: tuple[Any, ...], x: float) -> bytes:
    return repr((path, x)).encode()


def maps(params: dict[str, list[float]], tree: PyTree[float]) -> None:
    assert_type(optree.tree_map(text, params), PyTree[str])
    assert_type(optree.tree_map(text, tree), PyTree[str])
    assert_type(optree.tree_map(add, params, params), PyTree[float])
    assert_type(optree.tree_map(lambda x: [x], params), PyTree[list[Any]])
    assert_type(optree.tree_map_with_path(named, params), PyTree[bytes])
    assert_type(optree.tree_map_with_accessor(lambda a, x: a.codify(), params), PyTree[Any])
    assert_type(optree.tree_broadcast_map(add, params, 1.0), PyTree[float])
    assert_type(optree.tree_map_(print, tree), PyTree[float])
    # Nested maps preserve the leaf type.
    assert_type(optree.tree_leaves(optree.tree_map(text, params)), list[str])


def other_maps(tree: PyTree[float]) -> None:
    assert_type(optree.tree_replace_nones(0.0, tree), PyTree[float])
    assert_type(optree.tree_combine(tree, tree), PyTree[float])
    assert_type(optree.broadcast_prefix(tree, tree), list[float])
    assert_type(optree.tree_broadcast_prefix(tree, tree), PyTree[float])
    assert_type(optree.tree_broadcast_common(tree, tree), tuple[PyTree[float], PyTree[float]])


def transpose(outer: PyTreeSpec, inner: PyTreeSpec, tree: PyTree[float]) -> None:
    assert_type(optree.tree_transpose(outer, inner, tree), PyTree[float])


def wrong_arguments(params: dict[str, list[float]]) -> None:
    optree.tree_map(3, params)  # type: ignore[arg-type]
    optree.tree_map(text)  # type: ignore[call-arg]
    optree.tree_map(text, params, is_leaf=True)  # type: ignore[arg-type]
