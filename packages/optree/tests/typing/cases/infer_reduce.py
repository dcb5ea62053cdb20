# SPDX-License-Identifier: Apache-2.0
"""Reductions give the type of the leaves, or that of the initial value."""

from __future__ import annotations

from typing_extensions import assert_type

import optree
from optree import PyTree


def add(x: float, y: float) -> float:
    return x + y


def count(n: int, x: float) -> int:
    return n + 1


def reductions(params: dict[str, list[float]], tree: PyTree[float]) -> None:
    assert_type(optree.tree_reduce(add, params), float)
    assert_type(optree.tree_reduce(add, tree), float)
    assert_type(optree.tree_reduce(add, params, 0.0), float)
    assert_type(optree.tree_reduce(count, params, 0), int)
    assert_type(optree.tree_reduce(count, tree, initial=0), int)
    assert_type(optree.tree_sum(params), float)
    assert_type(optree.tree_max(params), float)
    assert_type(optree.tree_min(params, default=0.0), float)
    assert_type(optree.tree_all(params), bool)
    assert_type(optree.tree_any(params), bool)
    assert_type(optree.functools.reduce(count, params, 0), int)


def wrong_arguments(params: dict[str, list[float]]) -> None:
    optree.tree_reduce(count, params, "0")  # type: ignore[arg-type]
    optree.tree_all(params, bool)  # type: ignore[call-arg]
