# SPDX-License-Identifier: Apache-2.0
"""Which objects are a ``PyTree[T]`` and which are not."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from typing_extensions import assert_type

import optree
from optree import PyTree


class Losses(NamedTuple):
    train: float
    test: float


def double(tree: PyTree[float]) -> PyTree[float]:
    return optree.tree_map(lambda x: 2 * x, tree)


def trees_are_accepted(by_name: dict[str, list[float]], ordered: OrderedDict[str, float]) -> None:
    assert_type(double(1.0), PyTree[float])
    double([1.0, (2.0, {"a": 3.0})])
    double(by_name)
    double(ordered)
    double(deque([1.0]))
    double(Losses(1.0, 2.0))
    # The containers are covariant: integers are floats for type checkers.
    integers: list[int] = [1, 2]
    double(integers)


def other_objects_are_rejected() -> None:
    double("text")  # type: ignore[arg-type]
    double(["text"])  # type: ignore[list-item]
    double({"a": (1.0, "text")})  # type: ignore[dict-item]
    double(None)  # type: ignore[arg-type]
    double({1.0, 2.0})  # type: ignore[arg-type] # a set is a leaf


def trees_of_optional_leaves(tree: PyTree[float | None]) -> None:
    assert_type(optree.tree_leaves(tree, none_is_leaf=True), list["float | None"])
