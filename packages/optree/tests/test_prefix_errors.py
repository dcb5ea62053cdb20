# SPDX-License-Identifier: Apache-2.0
"""Explanations of why one tree is not a prefix of another."""

from __future__ import annotations

import textwrap
import time
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees import NAMESPACE, Layer, Pair, Point, Ring

import optree


def explain(prefix: Any, full: Any, **options: Any) -> list[str]:
    errors = optree.prefix_errors(prefix, full, **options)
    built = [error("in_axes") for error in errors]
    assert all(type(error) is ValueError for error in built)
    return [str(error) for error in built]


def types(where: str, left: type, right: type) -> str:
    return textwrap.dedent(f"""\
        pytree structure error: different types at key path
            {where}
        At that key path, the prefix pytree in_axes has a subtree of type
            {left!r}
        but at the same key path the full pytree has a subtree of different type
            {right!r}.""")


@pytest.mark.parametrize(
    ("prefix", "full"),
    [
        (1, [1, 2]),
        ([1, 2], [3, (4, 5)]),
        ({"a": 1, "b": 2}, OrderedDict([("b", [1]), ("a", 2)])),
        (defaultdict(int, a=1), {"a": 1}),
        (deque([1], maxlen=3), deque([1])),
        (Pair(1, 2), Pair(1, [2])),
        (None, None),
        ([], []),
    ],
)
def test_no_errors_for_prefixes(prefix: Any, full: Any) -> None:
    assert optree.prefix_errors(prefix, full) == []


@pytest.mark.parametrize(
    ("prefix", "full", "where", "left", "right"),
    [
        ((1, 2), [1, 2], "in_axes tree root", tuple, list),
        ([1, (2,)], [1, [2]], "in_axes[1]", list, list),
        ({"a": [1]}, {"a": 1}, "in_axes['a']", list, int),
        (Point(1, [2]), Point(1, (2,)), "in_axes.y", list, tuple),
        (Point(1, 2), (1, 2), "in_axes tree root", Point, tuple),
        (Point(1, 2), Layer(1, 2), "in_axes tree root", Point, Layer),
        (None, 1, "in_axes tree root", type(None), int),
        ([None], [[1]], "in_axes[0]", type(None), list),
        (time.gmtime(0), [1], "in_axes tree root", time.struct_time, list),
        ({"a": 1}, [1], "in_axes tree root", dict, list),
    ],
)
def test_different_types(prefix: Any, full: Any, where: str, left: type, right: type) -> None:
    if left is right:
        left, right = tuple, list
    assert explain(prefix, full) == [types(where, left, right)]


def test_different_keys() -> None:
    assert explain({"a": 1, "b": [2]}, {"a": 1, "c": [2]}) == [
        textwrap.dedent("""\
        pytree structure error: different pytree keys at key path
            in_axes tree root
        At that key path, the prefix pytree in_axes has a subtree of type
            <class 'dict'>
        with 2 key(s)
            ['a', 'b']
        but at the same key path the full pytree has a subtree of type
            <class 'dict'>
        but with 2 key(s)
            ['a', 'c']
        missing key(s):
            ['b']
        extra key(s):
            ['c']""")
    ]
    only_missing = explain([{"a": 1, "b": 2}], [OrderedDict(a=1)])
    assert len(only_missing) == 1
    assert "in_axes[0]" in only_missing[0]
    assert only_missing[0].endswith("missing key(s):\n    ['b']")


def test_different_numbers_of_children() -> None:
    assert explain([1, [2, 3]], [1, [2, 3, 4]]) == [
        textwrap.dedent("""\
        pytree structure error: different numbers of pytree children at key path
            in_axes[1]
        At that key path, the prefix pytree in_axes has a subtree of type
            <class 'list'>
        with 2 children, but at the same key path the full pytree has a subtree of the same type \
but with 3 children.""")
    ]
    assert len(explain(deque([1]), deque([1, 2]))) == 1


def test_different_metadata() -> None:
    (message,) = explain(Ring(1), Ring(1, 2), namespace=NAMESPACE)
    assert message.startswith("pytree structure error: different numbers of pytree children") or (  # noqa: PIE810
        message.startswith("pytree structure error: different pytree metadata at key path")
    )

    class Node:
        def __init__(self, metadata: str) -> None:
            self.metadata = metadata

    optree.register_pytree_node(
        Node, lambda n: ((1,), n.metadata), lambda m, c: Node(m), namespace="explained"
    )
    try:
        (message,) = explain([Node("one")], [Node("two")], namespace="explained")
    finally:
        optree.unregister_pytree_node(Node, namespace="explained")
    assert message.startswith(
        "pytree structure error: different pytree metadata at key path\n    in_axes[0]\n"
    )
    assert "one" in message
    assert "two" in message


def test_every_error_is_reported() -> None:
    messages = explain([(1, 2), {"a": [3]}, 4], [[1, 2], {"a": (3,)}, 5])
    assert messages == [types("in_axes[0]", tuple, list), types("in_axes['a']", list, tuple)] or (
        messages == [types("in_axes[0]", tuple, list), types("in_axes[1]['a']", list, tuple)]
    )


def test_predicate_and_none_mode() -> None:
    assert explain([(1, 2)], [[1, 2]], is_leaf=lambda x: isinstance(x, tuple)) == []
    assert explain([None], [[1]], none_is_leaf=True) == []
    assert len(explain([None], [[1]])) == 1


def test_name_of_the_tree() -> None:
    (error,) = optree.prefix_errors([(1,)], [[1]])
    assert "\n    out_axes[0]\n" in str(error("out_axes"))


def test_trees_that_contain_themselves_end() -> None:
    loops: list[Any] = [[], {}, OrderedDict()]
    loops[0].append(loops[0])
    loops[1]["self"] = loops[1]
    loops[2]["self"] = [loops[2]]
    for loop in loops:
        for left, right in ((loop, loop), ([loop], [loop])):
            with pytest.raises(RecursionError):
                optree.prefix_errors(left, right)
        assert len(optree.prefix_errors(loop, 1)) == 1
        assert optree.prefix_errors(1, loop) == []
