# SPDX-License-Identifier: Apache-2.0
"""Paths and structures written as text and read back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from trees import TREES, Point3, TreeRow

import optree

NAN = float("nan")


@pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
def test_a_structure_survives_its_text_or_is_refused(row: TreeRow) -> None:
    treespec = optree.tree_structure(row.make(), namespace=row.namespace)
    try:
        text = optree.treespec_dumps(treespec)
    except ValueError:
        with pytest.raises(ValueError, match="JSON"):
            optree.treespec_dumps(treespec)
    else:
        assert optree.treespec_loads(text) == treespec


def test_a_node_that_has_no_text_is_answered_with_what_does() -> None:
    with pytest.raises(ValueError, match=r"kind NAMEDTUPLE as JSON: .*Point3.*\. Use pickle"):
        optree.treespec_dumps(optree.tree_structure([Point3(1, 2)]))


def test_text_of_version_1_stays_readable() -> None:
    text = (
        '{"version": 1, "none_is_leaf": false, "namespace": "", "nodes": '
        '["*", ["list", 1], "*", ["none", 0], ["tuple", 2], ["dict", ["a", "b"], ["b", "a"]]]}'
    )
    treespec = optree.tree_structure({"b": (1, None), "a": [2]})
    assert optree.treespec_loads(text) == treespec
    assert list(optree.treespec_loads(text).unflatten([1, 2])) == ["b", "a"]
    assert optree.treespec_dumps(treespec) == text


@pytest.mark.parametrize(
    "tree", [{NAN: 1}, {NAN: 1, 2.0: 2}, {1: {float("nan"): 1, float("-nan"): 2}}, {(NAN,): 1}]
)
def test_structures_with_keys_that_equal_nothing_are_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        optree.treespec_dumps(optree.tree_structure(tree))


def test_other_numbers_are_written() -> None:
    keys = [float("inf"), float("-inf"), -0.0, 2**70, -1, True, 1.5, "1", None]
    for size in (1, 2, len(keys)):
        for chosen in itertools.combinations(keys, size):
            treespec = optree.tree_structure(dict.fromkeys(chosen, 0))
            assert optree.treespec_loads(optree.treespec_dumps(treespec)) == treespec


def test_paths_with_keys_of_different_text_differ_in_theirs() -> None:
    tree = {"a.b": [1, {"c": 2}], "a": {"b": 3, 1: 4, "1": 5}, ("a", "b"): 6, None: 7}
    for paths in (optree.tree_paths(tree), optree.tree_accessors(tree)):
        texts = [optree.keystr(path) for path in paths]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("code", [*range(0x81), 0xE9, 0x2028, 0x1F600, 0xD800])
def test_keys_and_names_are_shown_as_python_shows_them(code: int) -> None:
    character = chr(code)
    for key in (character, f"a{character}", f"'{character}\"", f"{character} b"):
        shown = repr(optree.tree_structure({key: 0}))
        assert shown == f"PyTreeSpec({{{key!r}: *}})"


def test_keys_of_a_subclass_of_str_are_shown_by_their_own_repr() -> None:
    class Name(str):
        __slots__ = ()

        def __repr__(self) -> str:
            return "<name>"

    assert repr(optree.tree_structure({Name("a"): 0, "": 1})) == "PyTreeSpec({'': *, <name>: *})"
