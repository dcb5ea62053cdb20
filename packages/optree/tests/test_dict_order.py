# SPDX-License-Identifier: Apache-2.0
"""The order of dictionary keys: sorted, as inserted, and the switch between them."""

from __future__ import annotations

import itertools
import random
import re
from collections import OrderedDict, defaultdict
from typing import Any, Callable

import pytest
from trees import Unsortable

import optree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL

TREE = {"b": {"d": 1, "c": 2}, "a": 3}


def test_keys_are_sorted_and_rebuilt_as_inserted() -> None:
    leaves, treespec = optree.tree_flatten(TREE)
    assert leaves == [3, 2, 1]
    rebuilt = treespec.unflatten(leaves)
    assert list(rebuilt) == ["b", "a"]
    assert list(rebuilt["b"]) == ["d", "c"]


def test_order_of_insertion_does_not_affect_equality() -> None:
    a, b = optree.tree_structure({"a": 1, "b": 2}), optree.tree_structure({"b": 1, "a": 2})
    assert a == b
    assert hash(a) == hash(b)
    assert list(a.unflatten([1, 2])) == ["a", "b"]
    assert list(b.unflatten([1, 2])) == ["b", "a"]


def test_ordered_dict_is_never_sorted() -> None:
    tree = OrderedDict([("b", 1), ("a", 2)])
    assert optree.tree_leaves(tree) == [1, 2]
    assert list(optree.tree_map(str, tree)) == ["b", "a"]


@pytest.mark.differs_from_published
def test_ordered_dict_follows_its_own_order_after_moves() -> None:
    tree = OrderedDict([("a", 1), ("b", 2), ("c", 3)])
    tree.move_to_end("a")
    tree.move_to_end("c", last=False)
    assert list(tree) == ["c", "b", "a"]
    leaves, treespec = optree.tree_flatten(tree)
    assert leaves == [3, 2, 1]
    assert repr(treespec) == "PyTreeSpec(OrderedDict({'c': *, 'b': *, 'a': *}))"
    assert list(treespec.unflatten(leaves).items()) == list(tree.items())
    assert list(optree.tree_iter(tree)) == [3, 2, 1]
    assert optree.tree_paths(tree) == [("c",), ("b",), ("a",)]
    assert optree.tree_flatten_one_level(tree).children == [3, 2, 1]
    assert list(optree.tree_map(str, tree).items()) == [("c", "3"), ("b", "2"), ("a", "1")]


@pytest.mark.differs_from_published
@pytest.mark.parametrize("seed", range(20))
def test_ordered_dict_follows_its_own_order_whatever_was_done_to_it(seed: int) -> None:
    choice = random.Random(seed)
    keys = [f"key{i}" for i in range(12)]
    # The package has remembered the keys in this order: the answer must come from the dict's order.
    for size in range(len(keys) + 1):
        for _ in range(3):
            optree.tree_leaves(OrderedDict.fromkeys(keys[:size], 0))
    tree: OrderedDict[str, int] = OrderedDict()
    changes: list[Callable[[], object]] = [
        lambda: tree.update({key: choice.random() for key in choice.choices(keys, k=3)}),
        lambda: [tree.setdefault(key, 0) for key in keys if key not in tree][:1],
        lambda: tree.move_to_end(choice.choice([*tree]), last=choice.random() < 0.5),
        lambda: tree.pop(choice.choice([*tree])),
        lambda: tree.popitem(last=choice.random() < 0.5),
        lambda: [tree.move_to_end(key) for key in keys if key in tree],
        lambda: tree.clear() if choice.random() < 0.2 else None,
    ]
    for _ in range(200):
        change = choice.choice(changes)
        if tree or change in changes[:2]:
            change()
        for mapping in (tree, tree.copy()):
            leaves, treespec = optree.tree_flatten(mapping)
            assert leaves == list(tree.values())
            assert treespec.entries() == list(tree)
            assert treespec.flatten_up_to(mapping) == leaves


def test_ordered_dict_follows_its_own_order_when_dict_methods_bypass_it() -> None:
    for extra in (0, 50):  # enough that the underlying dict is reallocated
        for _ in range(3):
            optree.tree_leaves(OrderedDict(b=0, c=0, a=0))  # fills the cache of keys
        tree = OrderedDict(a=1, b=2, c=3)
        dict.__delitem__(tree, "a")
        for key in map(str, range(extra)):
            dict.__setitem__(tree, key, 0)
        dict.__setitem__(tree, "a", 4)
        for key in map(str, range(extra)):
            dict.__delitem__(tree, key)
        assert list(dict.__iter__(tree)) == ["b", "c", "a"]
        if extra:
            assert list(tree) == ["a", "b", "c"]
            assert optree.tree_leaves(tree) == [4, 2, 3]
        else:  # its item is gone
            for read in (list, optree.tree_leaves):
                with pytest.raises(KeyError):
                    read(tree)


class Quarrelsome:
    """A key whose comparison raises something other than TypeError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __lt__(self, other: object) -> bool:
        raise ZeroDivisionError("compare")


class Stepwise:
    """Raises TypeError after some comparisons, leaving a half-sorted list if sorted in place."""

    count = 0

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __repr__(self) -> str:
        return f"Stepwise({self.rank})"

    def __lt__(self, other: Stepwise) -> bool:
        Stepwise.count += 1
        if Stepwise.count % 4 == 0:
            raise TypeError("tired")
        return self.rank < other.rank


def test_other_exceptions_of_comparisons_propagate() -> None:
    tree = {Quarrelsome("a"): 1, Quarrelsome("b"): 2}
    for function in (
        optree.tree_flatten,
        optree.tree_leaves,
        optree.tree_structure,
        lambda t: list(optree.tree_iter(t)),
        optree.tree_flatten_one_level,
        lambda t: optree.tree_map(str, t),
        optree.tree_flatten_with_path,
    ):
        with pytest.raises(ZeroDivisionError, match="^compare$"):
            function(tree)
    with optree.dict_insertion_ordered(True, namespace="quarrel"):
        assert optree.tree_leaves(tree, namespace="quarrel") == [1, 2]
    assert optree.tree_leaves(OrderedDict(tree)) == [1, 2]


def test_a_failed_sort_leaves_the_insertion_order() -> None:
    keys = [Stepwise(rank) for rank in (5, 3, 4, 1, 2, 0)]
    tree = dict(zip(keys, range(6)))
    Stepwise.count = 0
    leaves, treespec = optree.tree_flatten(tree)
    assert leaves == list(range(6))
    assert treespec.entries() == keys
    Stepwise.count = 0
    assert optree.utils.total_order_sorted(keys) == keys


def test_second_attempt_sorts_by_class_name() -> None:
    assert optree.tree_paths({"a": 1, 2: 2, 3.0: 3}) == [(3.0,), (2,), ("a",)]
    assert optree.tree_paths({None: 1, "a": 2, 1: 3}) == [(None,), (1,), ("a",)]
    assert optree.tree_paths({2: 1, 3.0: 2}) == [(2,), (3.0,)]
    u = Unsortable("u")
    tree = {u: 1, "b": 2, 3: 3, "a": 4}
    assert optree.tree_leaves(tree) == [3, 4, 2, 1]
    assert optree.tree_leaves({Unsortable("v"): 0, u: 1, "b": 2, "a": 4}) == [0, 1, 2, 4]


def test_sort_is_stable_for_equal_keys() -> None:
    class Equal:
        def __init__(self, name: str) -> None:
            self.name = name

        def __lt__(self, other: Equal) -> bool:
            return False

    keys = [Equal("c"), Equal("a"), Equal("b")]
    assert optree.tree_structure(dict.fromkeys(keys)).entries() == keys


@pytest.mark.parametrize(
    "keys",
    [
        [3, 1, 2],
        ["b", "a"],
        [3, "a", 1.0, None, (1, 2)],
        [float("nan"), 1.0, 0.5],
        [True, 2, 0],
        [10**30, -(10**30), 5],
        ["\ud800", "a", "\U0010ffff", "é"],
        [(1, "a"), (1, 2), (0,)],
        [b"b", "a", b"a"],
        [frozenset({1}), frozenset({1, 2}), frozenset()],
        [int, str],
    ],
)
def test_flatten_sorts_as_the_utility_does(keys: list[Any]) -> None:
    mapping = {key: index for index, key in enumerate(keys)}
    expected = optree.utils.total_order_sorted(list(mapping))
    for tree in (mapping, defaultdict(int, mapping)):
        treespec = optree.tree_structure(tree)
        assert all(a is b or a == b for a, b in zip(treespec.entries(), expected))
        assert optree.tree_leaves(tree) == [mapping[key] for key in expected]
        assert list(treespec.unflatten(optree.tree_leaves(tree))) == list(tree)


# the switch ---------------------------------------------------------------------------------------


def is_insertion_ordered(namespace: str = "") -> bool:
    return optree.tree_leaves(TREE, namespace=namespace) == [1, 2, 3]


def test_insertion_mode_is_per_namespace() -> None:
    with optree.dict_insertion_ordered(True, namespace="one"):
        assert is_insertion_ordered("one")
        assert not is_insertion_ordered("two")
        assert not is_insertion_ordered()
    assert not is_insertion_ordered("one")


def test_global_insertion_mode_applies_everywhere() -> None:
    with optree.dict_insertion_ordered(True, namespace=GLOBAL):
        assert is_insertion_ordered()
        assert is_insertion_ordered("any")
        with optree.dict_insertion_ordered(False, namespace="any"):
            assert is_insertion_ordered("any")
    assert not is_insertion_ordered()


@pytest.mark.parametrize(
    "modes",
    list(itertools.product([True, False], repeat=4)),
    ids=lambda m: "".join("ft"[x] for x in m),
)
def test_nested_contexts(modes: tuple[bool, ...]) -> None:
    outer_global, outer, inner_global, inner = modes

    def check(global_mode: bool, mode: bool) -> None:
        assert is_insertion_ordered() is global_mode
        assert is_insertion_ordered("n") is (global_mode or mode)
        assert is_insertion_ordered("other") is global_mode

    with optree.dict_insertion_ordered(outer_global, namespace=GLOBAL):
        with optree.dict_insertion_ordered(outer, namespace="n"):
            check(outer_global, outer)
            with optree.dict_insertion_ordered(inner_global, namespace=GLOBAL):
                with optree.dict_insertion_ordered(inner, namespace="n"):
                    check(inner_global, inner)
                check(inner_global, outer)
            check(outer_global, outer)
        check(outer_global, False)
    check(False, False)


def test_mode_is_restored_after_an_exception() -> None:
    with pytest.raises(LookupError), optree.dict_insertion_ordered(True, namespace="raise"):
        raise LookupError
    assert not is_insertion_ordered("raise")


def test_arguments_of_the_switch() -> None:
    for namespace in (None, 3, b"x"):
        with pytest.raises(TypeError, match=r"^The namespace must be a string, got "):  # noqa: SIM117
            with optree.dict_insertion_ordered(True, namespace=namespace):
                raise AssertionError("unreachable")
    with pytest.raises(ValueError, match=r"^The namespace cannot be an empty string\.$"):  # noqa: SIM117
        with optree.dict_insertion_ordered(True, namespace=""):
            raise AssertionError("unreachable")
    with pytest.raises(TypeError, match="'namespace'"):
        optree.dict_insertion_ordered(True)


def test_private_switch_functions() -> None:
    is_ordered = optree._C.is_dict_insertion_ordered
    set_ordered = optree._C.set_dict_insertion_ordered
    assert is_ordered() is False
    set_ordered(True, "private")
    try:
        assert is_ordered("private") is True
        assert is_ordered(namespace="private", inherit_global_namespace=False) is True
        assert is_ordered("other") is False
    finally:
        set_ordered(False, namespace="private")
    assert is_ordered("private") is False
    set_ordered(True)
    try:
        assert is_ordered() is True
        assert is_ordered("other") is True
        assert is_ordered("other", False) is False
        assert is_ordered("other", inherit_global_namespace=False) is False
    finally:
        set_ordered(False, "")
    assert is_ordered() is False


def test_mode_is_read_once_per_call() -> None:
    def predicate(x: Any) -> bool:
        optree._C.set_dict_insertion_ordered(not isinstance(x, int), "flip")
        return False

    try:
        leaves = optree.tree_leaves(TREE, is_leaf=predicate, namespace="flip")
    finally:
        optree._C.set_dict_insertion_ordered(False, "flip")
    assert leaves == [3, 2, 1]


def test_structures_of_both_modes() -> None:
    with optree.dict_insertion_ordered(True, namespace="modes"):
        inserted = optree.tree_structure(TREE, namespace="modes")
    ordered = optree.tree_structure(TREE, namespace="modes")
    assert repr(inserted) == ("PyTreeSpec({'b': {'d': *, 'c': *}, 'a': *}, namespace='modes')")
    assert repr(ordered) == "PyTreeSpec({'a': *, 'b': {'c': *, 'd': *}})"
    assert inserted != ordered
    assert inserted.unflatten([1, 2, 3]) == TREE
    assert inserted <= ordered <= inserted
    assert inserted.flatten_up_to({"a": 7, "b": {"c": 8, "d": 9}}) == [9, 8, 7]


def test_one_level_flatten_follows_the_mode() -> None:
    tree = {"b": 1, "a": 2}
    for make in (dict, lambda t: defaultdict(int, t)):
        with optree.dict_insertion_ordered(True, namespace="level"):
            assert optree.tree_flatten_one_level(make(tree), namespace="level").children == [1, 2]
        assert optree.tree_flatten_one_level(make(tree), namespace="level").children == [2, 1]


# utilities ----------------------------------------------------------------------------------------


def test_total_order_sorted() -> None:
    total_order_sorted = optree.utils.total_order_sorted
    assert total_order_sorted([3, 1, 2]) == [1, 2, 3]
    assert total_order_sorted(["a", 1, "b", 0]) == [0, 1, "a", "b"]
    assert total_order_sorted([3, 1, 2], reverse=True) == [3, 2, 1]
    assert total_order_sorted([("b", 1), ("a", 2)], key=lambda item: item[0]) == [
        ("a", 2),
        ("b", 1),
    ]
    assert total_order_sorted([]) == []
    u, v = Unsortable("u"), Unsortable("v")
    assert total_order_sorted([v, u]) == [v, u]
    with pytest.raises(ZeroDivisionError):
        total_order_sorted([Quarrelsome("a"), Quarrelsome("b")])


def test_safe_zip_and_unzip2() -> None:
    assert list(optree.utils.safe_zip([1, 2], "ab")) == [(1, "a"), (2, "b")]
    with pytest.raises(ValueError, match=re.escape("length mismatch")):
        list(optree.utils.safe_zip([1, 2], "a"))
    first, second = optree.utils.unzip2([(1, "a"), (2, "b")])
    assert (list(first), list(second)) == ([1, 2], ["a", "b"])


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyboardInterrupt])
def test_an_error_of_the_key_function_comes_out(error: type[BaseException]) -> None:
    def key(item: Any) -> Any:
        if item == "b":
            raise error("of the key")
        return item

    for items in (["a", "b", "c"], [1, "b", 2.0], ["b"]):
        with pytest.raises(error, match="of the key"):
            optree.utils.total_order_sorted(items, key=key)


def test_total_order_sorted_is_stable_and_calls_the_key_once_an_item() -> None:
    calls: list[Any] = []

    def key(item: tuple[int, str]) -> int:
        calls.append(item)
        return item[0]

    items = [(2, "a"), (1, "b"), (2, "c"), (1, "d")]
    assert optree.utils.total_order_sorted(items, key=key) == [items[i] for i in (1, 3, 0, 2)]
    assert calls == items
    ordered = optree.utils.total_order_sorted(items, key=key, reverse=True)
    assert ordered == sorted(items, key=lambda item: item[0], reverse=True)


@pytest.mark.parametrize(
    "alphabet", ["ab\xe9\xff", "ab\u0101\u0102\u4e01\u4e02", "a\u4e01\U0001f600\U0001f601"]
)
@pytest.mark.parametrize("size", [2, 5, 30])
def test_texts_of_any_width_are_sorted_by_code_points(alphabet: str, size: int) -> None:
    draw = random.Random(size)
    for _ in range(50):
        keys = {"".join(draw.choices(alphabet, k=draw.randrange(5))) for _ in range(size)}
        mapping = dict.fromkeys(keys, 0)
        assert optree.tree_structure(mapping).entries() == sorted(keys)
