# SPDX-License-Identifier: Apache-2.0
"""Keras with this optree: its own tree tests, and the functions that it builds on optree.

The tests run with ``--keras`` and need Keras and JAX.  ``nox -s clients`` installs both in a
separate environment.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import optree

pytestmark = pytest.mark.keras

Point = collections.namedtuple("Point", ["x", "y"])

NESTED: list[Any] = [
    1,
    [],
    {"b": [2, (3,)], "a": None},
    collections.OrderedDict([("b", 1), ("a", [2])]),
    collections.defaultdict(int, {"b": 1, "a": 2}),
    collections.deque([1, [2]]),
    Point(1, [Point(2, 3)]),
]


@pytest.fixture
def tree() -> Any:
    """Return the tree functions of Keras."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    return keras.tree


def test_keras_uses_this_optree(tree: Any) -> None:
    from keras.src.tree import optree_impl, tree_api

    assert tree_api.tree_impl is optree_impl
    assert optree_impl.optree is optree
    assert hasattr(optree, "GLOBAL_NAMESPACE"), "expected this optree, not the published one"


def test_the_tree_tests_of_keras_pass(tmp_path: Path) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--pyargs", "keras.src.tree.tree_test"),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,  # outside the pytest settings of this repository
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    passed = re.search(r"(\d+) passed", finished.stdout)
    # Ten others need TensorFlow.
    assert passed is not None, finished.stdout
    assert int(passed[1]) >= 13, finished.stdout


@pytest.mark.parametrize("nested", NESTED, ids=repr)
def test_flatten_and_pack(tree: Any, nested: Any) -> None:
    flat = tree.flatten(nested)
    assert flat == optree.tree_leaves(nested, none_is_leaf=True)
    packed = tree.pack_sequence_as(nested, [(leaf, "packed") for leaf in flat])
    assert tree.map_structure(lambda leaf: (leaf, "packed"), nested) == packed
    assert tree.is_nested(nested) == (nested != 1)


@pytest.mark.parametrize("nested", NESTED, ids=repr)
def test_assert_same_structure(tree: Any, nested: Any) -> None:
    tree.assert_same_structure(nested, tree.map_structure(lambda _: 0, nested))
    with pytest.raises(ValueError, match="Expected|mismatch"):
        tree.assert_same_structure([nested], nested)


def test_paths_name_the_leaves(tree: Any) -> None:
    nested = {"b": [2, (3,)], "a": Point(0, 1)}
    assert tree.flatten_with_path(nested) == [
        (("a", 0), 0),
        (("a", 1), 1),
        (("b", 0), 2),
        (("b", 1, 0), 3),
    ]


def test_traverse_goes_top_down(tree: Any) -> None:
    seen: list[Any] = []
    tree.traverse(seen.append, [(1, 2), {"a": 3}])
    assert seen == [[(1, 2), {"a": 3}], (1, 2), 1, 2, {"a": 3}, 3]


def test_registered_classes_are_nodes(tree: Any) -> None:
    from keras.src.tree import tree_api

    @tree_api.register_tree_node_class
    class Box:
        def __init__(self, content: Any) -> None:
            self.content = content

        def tree_flatten(self) -> tuple[tuple[Any], None]:
            return (self.content,), None

        @classmethod
        def tree_unflatten(cls, _: None, children: tuple[Any]) -> Box:
            return cls(*children)

    mapped = tree.map_structure(lambda leaf: -leaf, [Box(1), Box([2, 3])])
    assert [box.content for box in mapped] == [-1, [-2, -3]]
    assert optree.tree_leaves(Box(1), namespace="keras") == [1]
