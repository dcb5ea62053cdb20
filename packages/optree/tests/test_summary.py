# SPDX-License-Identifier: Apache-2.0
"""Summaries of trees."""

from __future__ import annotations

from typing import Any

import pytest
from trees import TREES, TreeRow

import optree


class Array:
    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, "float64"
        self.nbytes = 8 * (shape[0] if shape else 1)


def cells(summary: Any) -> list[list[str]]:
    return [line.split() for line in repr(summary).splitlines()[1:]]


@pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
def test_the_root_counts_the_leaves_of_the_tree(row: TreeRow) -> None:
    tree = row.make()
    leaves = len(optree.tree_leaves(tree, namespace=row.namespace))
    summary = optree.tree_summary(tree, namespace=row.namespace)
    assert cells(summary)[0][-2] == f"{leaves:,}"


def test_totals_do_not_depend_on_the_depth_that_is_shown() -> None:
    tree = {"a": [Array(3), {"b": Array(5)}], "c": Array()}
    whole = optree.tree_summary(tree)
    assert cells(whole)[0] == ["*", "dict", "3", "72"]
    assert cells(whole)[1] == ["['a']", "list", "2", "64"]
    assert cells(whole)[2] == ["[0]", "Array", "float64[3]", "1", "24"]
    for depth in range(4):
        shown = cells(optree.tree_summary(tree, depth=depth))
        assert [line for line in shown if line in cells(whole)] == shown
    assert len(cells(optree.tree_summary(tree, depth=1))) == 3


def test_a_notebook_shows_a_table_without_markup_of_the_tree() -> None:
    text = optree.tree_summary({"<b>": 1})._repr_html_()
    assert text.startswith("<table>")
    assert "<b>" not in text


def test_a_predicate_and_none_decide_what_a_leaf_is() -> None:
    tree = [(1, 2), None]
    assert cells(optree.tree_summary(tree, is_leaf=lambda x: type(x) is tuple))[0][-2] == "1"
    assert cells(optree.tree_summary(tree, none_is_leaf=True))[0][-2] == "3"


def test_a_tree_within_itself_and_a_negative_depth_are_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(RecursionError):
        optree.tree_summary(tree)
    with pytest.raises(ValueError, match="depth"):
        optree.tree_summary([], depth=-1)


def test_a_leaf_whose_size_is_not_defined_counts_no_bytes() -> None:
    """As a sparse tensor of PyTorch, or a nested one, which has no shape either."""

    class Sparse:
        dtype = "float32"
        shape = (4,)

        @property
        def nbytes(self) -> int:
            raise RuntimeError("nbytes is not defined for sparse tensors")

    class Nested:
        @property
        def shape(self) -> Any:
            raise RuntimeError("a nested tensor has no shape")

    shown = cells(optree.tree_summary([Sparse(), Nested(), Array(3)]))
    assert shown[0] == ["*", "list", "3", "24"]
    assert shown[1] == ["[0]", "Sparse", "float32[4]", "1", "0"]
    assert shown[2] == ["[1]", "Nested", "1", "0"]
