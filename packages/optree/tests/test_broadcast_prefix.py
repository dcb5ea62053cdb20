# SPDX-License-Identifier: Apache-2.0
"""Broadcasting a prefix over a tree, and two trees to a common shape."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict, deque
from random import Random
from typing import Any

import pytest
from trees import NAMESPACE, Box, Pair, Point, Ring

import optree


def test_broadcast_prefix() -> None:
    full = {"a": [1, 2], "b": (3, {"c": 4, "d": 5}), "e": None}
    prefix = {"a": "x", "b": ("y", "z"), "e": "w"}
    assert optree.broadcast_prefix(prefix, full) == ["x", "x", "y", "z", "z"]
    assert optree.tree_broadcast_prefix(prefix, full) == {
        'a': ['x', 'x'], 'b': ('y', {'c': 'z', 'd': 'z'}), 'e': None,
    }  # fmt: skip
    assert optree.broadcast_prefix(prefix, full, none_is_leaf=True) == list("xxyzzw")
    assert optree.broadcast_prefix(1, [2, 3, [4]]) == [1, 1, 1]
    assert optree.tree_broadcast_prefix(1, [2, 3, [4]]) == [1, 1, [1]]
    assert optree.broadcast_prefix([1, 2], [3, []]) == [1]
    assert optree.broadcast_prefix(1, []) == []
    assert optree.tree_broadcast_prefix(1, []) == []
    assert optree.broadcast_prefix(1, None) == []
    assert optree.tree_broadcast_prefix(1, None) is None
    assert optree.broadcast_prefix(None, None) == []


def test_broadcast_prefix_with_a_predicate() -> None:
    is_pair = lambda x: type(x) is tuple  # noqa: E731
    assert optree.broadcast_prefix(1, [(2, 3), 4], is_leaf=is_pair) == [1, 1]
    assert optree.broadcast_prefix([(1, 2), 3], [[4, 5], 6], is_leaf=is_pair) == [(1, 2), (1, 2), 3]


def test_prefix_mismatches() -> None:
    cases: list[tuple[Any, Any, str]] = [
        ([1, 2], [1], 'list arity mismatch; expected: 2, got: 1; list: [1].'),
        ((1,), [1], 'Expected an instance of tuple, got [1].'),
        ([[1]], [1], 'Expected an instance of list, got 1.'),
        ({'a': 1}, {'b': 1}, "dictionary key mismatch; expected key(s): ['a'], got key(s): ['b'], "
         "missing key(s): ['a'], extra key(s): ['b']; dict: {'b': 1}."),
        (None, 1, 'Expected None, got 1.'),
    ]  # fmt: skip
    for prefix, full, message in cases:
        for function in (optree.broadcast_prefix, optree.tree_broadcast_prefix):
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                function(prefix, full)


def test_kinds_come_from_the_full_tree_or_are_compatible() -> None:
    prefix = OrderedDict([("b", 1), ("a", 2)])
    full = {"a": [0, 0], "b": 0}
    assert sorted(optree.broadcast_prefix(prefix, full)) == [1, 2, 2]
    result = optree.tree_broadcast_prefix(deque([1], maxlen=4), deque([[0, 0]]))
    assert result[0] == [1, 1]


def test_broadcast_common() -> None:
    left = [1, {"a": (2, 3), "b": 4}]
    right = [[5, 6], {"a": 7, "b": [8]}]
    assert optree.tree_broadcast_common(left, right) == (
        [[1, 1], {"a": (2, 3), "b": [4]}],
        [[5, 6], {"a": (7, 7), "b": [8]}],
    )
    assert optree.broadcast_common(left, right) == ([1, 1, 2, 3, 4], [5, 6, 7, 7, 8])
    assert optree.tree_broadcast_common(1, [2, 3]) == ([1, 1], [2, 3])
    assert optree.tree_broadcast_common([], []) == ([], [])
    assert optree.tree_broadcast_common(None, None) == (None, None)
    for empty in ([], (), {}, None):
        assert optree.broadcast_common(0, empty) == ([], [])
        assert optree.tree_broadcast_common([0], [empty]) == ([empty], [empty])
        assert optree.tree_broadcast_common([empty], [0]) == ([empty], [empty])


def test_each_tree_keeps_its_own_node_types() -> None:
    left = OrderedDict([("b", 1), ("a", 2)])
    right = {"a": [3], "b": 4}
    one, two = optree.tree_broadcast_common(left, right)
    assert type(one) is OrderedDict
    assert list(one.items()) == [("b", 1), ("a", [2])]
    assert type(two) is dict
    assert two == right
    one, two = optree.tree_broadcast_common(defaultdict(int, a=1), {"a": (2,)})
    assert type(one) is defaultdict
    assert one == {"a": (1,)}


def test_common_mismatches() -> None:
    cases: list[tuple[Any, Any, str]] = [
        ([1], (1,), 'PyTreeSpecs have incompatible node types; expected type: list, got: tuple.'),
        ([1], [1, 2], 'list arity mismatch; expected: 1, got: 2.'),
        ({'a': 1}, {'b': 1}, "dictionary key mismatch; expected key(s): ['a'], got key(s): ['b'], "
         "missing key(s): ['a'], extra key(s): ['b']."),
        ([None], [[1]], 'PyTreeSpecs have incompatible node types; expected type: NoneType, got: list.'),  # noqa: E501
    ]  # fmt: skip
    for left, right, message in cases:
        for function in (
            optree.broadcast_common,
            optree.tree_broadcast_common,
            lambda a, b: optree.tree_broadcast_map(lambda *x: x, a, b),
        ):
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                function(left, right)


def test_broadcast_map() -> None:
    add = lambda *xs: sum(xs)  # noqa: E731
    assert optree.tree_broadcast_map(add, [1, 2], 10) == [11, 12]
    assert optree.tree_broadcast_map(add, 10, [1, {"a": 2}]) == [11, {"a": 12}]
    assert optree.tree_broadcast_map(add, [1, [2, 3]], [[10, 20], 30]) == [[11, 21], [32, 33]]
    assert optree.tree_broadcast_map(add, [1, 2], 10, [100, (200, 300)]) == [111, (212, 312)]
    assert optree.tree_broadcast_map(add, [1, None]) == [1, None]
    assert optree.tree_broadcast_map(lambda *xs: xs, [None, 1], 2, none_is_leaf=True) == [
        (None, 2), (1, 2),
    ]  # fmt: skip
    result = optree.tree_broadcast_map(lambda a, b: (a, b), Pair(1, [2]), Pair([3], 4))
    assert result == Pair([(1, 3)], [(2, 4)])
    box = optree.tree_broadcast_map(add, Box("p", p=[1, 2]), Box("p", p=5), namespace=NAMESPACE)
    assert box == Box("p", p=[6, 7])


def test_broadcast_map_with_paths() -> None:
    result = optree.tree_broadcast_map_with_path(lambda p, a, b: (p, a, b), {"k": 1}, {"k": [2, 3]})
    assert result == {"k": [(("k", 0), 1, 2), (("k", 1), 1, 3)]}
    codes = optree.tree_broadcast_map_with_accessor(
        lambda p, a, b: p.codify("t"), {"k": 1}, {"k": Point(2, 3)}
    )
    assert codes == {"k": Point("t['k'].x", "t['k'].y")}


def test_predicates_apply_to_inputs_only() -> None:
    seen: list[Any] = []

    def is_leaf(x: Any) -> bool:
        seen.append(x)
        return isinstance(x, tuple)

    left, right = optree.tree_broadcast_common([1, (2, 3)], [[4], (5,)], is_leaf=is_leaf)
    assert left == [[1], (2, 3)]
    assert right == [[4], (5,)]
    assert all(any(x is y or x == y for y in ([1, (2, 3)], [[4], (5,)], 1, (2, 3), [4], 4, (5,)))
               for x in seen)  # fmt: skip


def test_metadata_mismatch_of_customs() -> None:
    with pytest.raises(ValueError, match=r"^Custom type arity mismatch; expected: 1, got: 2\.$"):
        optree.tree_broadcast_common(Ring(1), Ring(1, 2), namespace=NAMESPACE)


@pytest.mark.parametrize("seed", range(20))
def test_leaves_are_paired_by_key_whatever_the_order_of_the_keys(seed: int) -> None:
    """Each leaf holds its own path, so a wrong pairing is seen in every tree and operand."""
    random = Random(seed)

    def tree(depth: int, path: str, deepest: int) -> Any:
        if depth == deepest:
            return path
        keys = list("abcd")
        random.shuffle(keys)
        kind = random.choice([dict, OrderedDict, lambda items: defaultdict(None, items)])
        return kind([(key, tree(depth + 1, path + key, deepest)) for key in keys])

    operands = [tree(0, "", deepest) for deepest in (2, 3, 1)]

    def check(path: tuple[str, ...], *leaves: str) -> tuple[str, ...]:
        longest = "".join(path)
        assert all(longest.startswith(leaf) for leaf in leaves)
        assert [len(leaf) for leaf in leaves] == [2, 3, 1]
        return leaves

    mapped = optree.tree_broadcast_map_with_path(check, *operands)
    assert len(optree.tree_leaves(mapped, is_leaf=lambda x: type(x) is tuple)) == 64
    for first in operands:
        for second in operands:
            pairs = list(zip(*optree.broadcast_common(first, second)))
            assert all(a.startswith(b) or b.startswith(a) for a, b in pairs)
            left, right = optree.tree_broadcast_common(first, second)
            assert all(
                optree.tree_leaves(
                    optree.tree_map(lambda a, b: a.startswith(b) or b.startswith(a), left, right)
                )
            )
