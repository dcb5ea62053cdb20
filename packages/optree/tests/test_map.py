# SPDX-License-Identifier: Apache-2.0
"""Mapping, partitioning, transposing and reducing trees."""

from __future__ import annotations

import inspect
import re
import sys
from collections import OrderedDict, defaultdict, deque
from typing import Any, Optional, Union

import pytest
from trees import NAMESPACE, TREES, Pair, Point, Ring, every_tree, is_same

import optree

TREE = {"b": (2, [3, 4]), "a": 1, "c": None}


def test_map_over_one_tree() -> None:
    assert optree.tree_map(lambda x: x * 10, TREE) == {"b": (20, [30, 40]), "a": 10, "c": None}
    assert list(optree.tree_map(lambda x: x, TREE)) == ["b", "a", "c"]
    assert optree.tree_map(lambda x: x is None, TREE, none_is_leaf=True)["c"] is True
    assert optree.tree_map(str, 5) == "5"
    assert optree.tree_map(str, None) is None
    assert optree.tree_map(len, [[1, 2], [3]], is_leaf=lambda x: x != [[1, 2], [3]]) == [2, 1]


def test_map_over_several_trees_takes_subtrees_of_the_rest() -> None:
    result = optree.tree_map(lambda *xs: xs, TREE, {"c": None, "a": [5], "b": ({}, [None, "z"])})
    assert result == {"b": ((2, {}), [(3, None), (4, "z")]), "a": (1, [5]), "c": None}


def test_calls_come_in_leaf_order() -> None:
    seen: list[Any] = []
    optree.tree_map(seen.append, TREE)
    assert seen == [1, 2, 3, 4]
    seen.clear()
    optree.tree_map(lambda *xs: seen.append(xs), [1, 2], [3, 4], (5, 6)[:0] or [5, 6])
    assert seen == [(1, 3, 5), (2, 4, 6)]


@every_tree
def test_map_keeps_the_tree_untouched(row: Any) -> None:
    tree, twin = row.make(), row.make()
    optree.tree_map(lambda x: object(), tree, namespace=row.namespace)
    optree.tree_map_(lambda x: object(), tree, namespace=row.namespace)
    assert is_same(tree, twin)


def test_every_mismatch_is_reported_before_the_first_call() -> None:
    calls: list[Any] = []
    with pytest.raises(ValueError, match="arity mismatch"):
        optree.tree_map(lambda *xs: calls.append(xs), [1, [2]], [1, [2]], [1, [2, 3]])
    with pytest.raises(ValueError, match="arity mismatch"):
        optree.tree_map_(lambda *xs: calls.append(xs), [1, [2]], [1, [2, 3]])
    with pytest.raises(ValueError, match="arity mismatch"):
        optree.tree_map_with_path(lambda *xs: calls.append(xs), [1, [2]], [1, [2, 3]])
    assert calls == []


@pytest.mark.parametrize(
    ("tree_map", "flatten_calls"),
    [
        (optree.tree_map, 2),
        (optree.tree_map_with_path, 2),
        (optree.tree_map_with_accessor, 2),
    ],
)
def test_every_container_is_rebuilt_after_the_last_call(tree_map: Any, flatten_calls: int) -> None:
    log: list[Any] = []

    class Node:
        def __init__(self, *items: Any) -> None:
            self.items = items

    def flatten(node: Node) -> Any:
        log.append("flatten")
        return node.items, None

    def unflatten(metadata: None, children: tuple[Any, ...]) -> Node:
        log.append(("unflatten", len(children)))
        return Node(*children)

    optree.register_pytree_node(Node, flatten, unflatten, namespace="order")
    try:
        tree_map(lambda *xs: log.append(xs[-1]), Node(1, Node(2, 3), 4), namespace="order")
        assert log[:flatten_calls] == ["flatten"] * flatten_calls
        # The inner container is rebuilt before the outer one.
        assert log[flatten_calls:] == [1, 2, 3, 4, ("unflatten", 2), ("unflatten", 3)]
        log.clear()

        def fail(*xs: Any) -> None:
            log.append(xs[-1])
            if xs[-1] == 3:
                raise KeyError

        with pytest.raises(KeyError):
            tree_map(fail, Node(Node(1, 2), 3, 4), namespace="order")
        assert log[flatten_calls:] == [1, 2, 3]
    finally:
        optree.unregister_pytree_node(Node, namespace="order")


def test_functions_that_map_raise_what_the_function_raises() -> None:
    def stop(*xs: Any) -> None:
        raise StopIteration

    for function in (
        optree.tree_map,
        optree.tree_map_,
        optree.tree_map_with_path,
        optree.tree_map_with_path_,
        optree.tree_map_with_accessor,
        optree.tree_map_with_accessor_,
        optree.tree_transpose_map,
        optree.tree_transpose_map_with_path,
        optree.tree_transpose_map_with_accessor,
    ):
        with pytest.raises(StopIteration):
            function(stop, [1, 2])
    for function in (
        optree.tree_broadcast_map,
        optree.tree_broadcast_map_with_path,
        optree.tree_broadcast_map_with_accessor,
    ):
        with pytest.raises(StopIteration):
            function(stop, [1, 2], [1, 2])


@pytest.mark.parametrize(
    "function",
    [getattr(optree, name) for name in optree.__all__ if name.startswith("tree_")],
    ids=lambda function: function.__name__,
)
def test_messages_call_the_predicate_is_leaf(function: Any) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        pytest.skip("no signature")
    if "is_leaf" not in parameters:
        pytest.skip("no predicate")
    spec = optree.tree_structure([0])
    arguments = {"tree_transpose": (spec, spec, [[0]]), "tree_partition": (bool, [1])}
    takes_two = ("broadcast_prefix", "broadcast_common", "prefix_errors")
    if function.__name__.endswith(takes_two):
        given: Any = ([1], [1])
    elif "func" in parameters:
        given = (len, [1])
    else:
        given = arguments.get(function.__name__, ([1],))
    with pytest.raises(TypeError, match="'is_leaf'"):
        list(function(*given, is_leaf=5))


def test_the_mapped_function_may_change_the_tree() -> None:
    tree: dict[str, Any] = {"a": [1, 2], "b": [3, 4]}

    def spoil(x: int) -> int:
        tree.clear()
        tree["new"] = x
        return -x

    assert optree.tree_map(spoil, tree) == {"a": [-1, -2], "b": [-3, -4]}
    items = [1, [2, 3], 4]

    def drain(x: int) -> int:
        del items[:]
        return -x

    assert optree.tree_map(drain, items) == [-1, [-2, -3], -4]


@pytest.mark.parametrize(
    'function',
    [
        optree.tree_map,
        optree.tree_map_,
        lambda f, t: optree.tree_map_with_path(lambda p, x: f(x), t),
        lambda f, t: optree.tree_map_with_path_(lambda p, x: f(x), t),
        lambda f, t: optree.tree_map_with_accessor(lambda p, x: f(x), t),
        lambda f, t: optree.tree_map_with_accessor_(lambda p, x: f(x), t),
        optree.tree_broadcast_map,
        lambda f, t: optree.tree_broadcast_map(lambda x, y: f(x), t, t),
        lambda f, t: optree.tree_broadcast_map_with_path(lambda p, x: f(x), t),
        lambda f, t: optree.tree_transpose_map(lambda x: [f(x)], t),
        lambda f, t: optree.tree_partition(f, t),
        lambda f, t: optree.tree_reduce(lambda a, x: f(x), t, 0),
    ],
    ids=[
        'map', 'map_', 'map_with_path', 'map_with_path_', 'map_with_accessor',
        'map_with_accessor_', 'broadcast_map', 'broadcast_map_2', 'broadcast_map_with_path',
        'transpose_map', 'partition', 'reduce',
    ],
)  # fmt: skip
class TestExceptionsOfTheFunction:
    @pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, GeneratorExit])
    def test_propagate(self, function: Any, error: type[BaseException]) -> None:
        calls: list[int] = []

        def raising(x: int) -> int:
            calls.append(x)
            if x == 2:
                raise error("mine")
            return x

        with pytest.raises(error, match="^mine$"):
            function(raising, [1, [2, 3]])
        assert calls == [1, 2]

    @pytest.mark.differs_from_published
    def test_stop_iteration_propagates(self, function: Any) -> None:
        calls: list[int] = []

        def stopping(x: int) -> int:
            calls.append(x)
            if x == 2:
                raise StopIteration("mine")
            return x

        with pytest.raises(StopIteration, match="^mine$"):
            function(stopping, [1, [2, 3]])
        assert calls == [1, 2]


def test_map_in_place_returns_the_tree_itself() -> None:
    for function in (optree.tree_map_, optree.tree_map_with_path_, optree.tree_map_with_accessor_):
        seen: list[Any] = []
        assert function(lambda *xs: seen.append(xs[-1]), TREE) is TREE  # noqa: B023
        assert seen == [1, 2, 3, 4]


def test_map_with_path() -> None:
    result = optree.tree_map_with_path(lambda path, x, y: (path, x, y), TREE, TREE)
    assert result == {
        "b": ((("b", 0), 2, 2), [(("b", 1, 0), 3, 3), (("b", 1, 1), 4, 4)]),
        "a": (("a",), 1, 1),
        "c": None,
    }


def test_map_with_accessor() -> None:
    codes = optree.tree_map_with_accessor(lambda a, x: (a.codify("t"), a(TREE) == x), TREE)
    assert codes == {
        "b": (("t['b'][0]", True), [("t['b'][1][0]", True), ("t['b'][1][1]", True)]),
        "a": ("t['a']", True),
        "c": None,
    }


@pytest.mark.parametrize("function", [None, 3, "f"])
def test_function_must_be_callable(function: Any) -> None:
    with pytest.raises(TypeError, match="is not callable"):
        optree.tree_map(function, [1])


def test_map_needs_a_tree() -> None:
    with pytest.raises(TypeError):
        optree.tree_map(str)
    with pytest.raises(TypeError):
        optree.tree_map(func=str, tree=[1])


def test_partition() -> None:
    assert optree.tree_partition(lambda x: x > 1, [1, 2, None]) == (
        [None, 2, None],
        [1, None, None],
    )
    big, small = optree.tree_partition(lambda x: x > 2, TREE, fillvalue="-")
    assert big == {"b": ("-", [3, 4]), "a": "-", "c": None}
    assert small == {"b": (2, ["-", "-"]), "a": 1, "c": None}
    assert optree.tree_partition(bool, []) == ([], [])
    assert optree.tree_partition(bool, None) == (None, None)
    assert optree.tree_partition(lambda x: x is None, [None], none_is_leaf=True) == ([None], [None])
    lists = optree.tree_partition(lambda x: len(x) > 1, [[1], [1, 2]], lambda x: len(x) < 3 and x
                                  and isinstance(x[0], int))  # fmt: skip
    assert lists == ([None, [1, 2]], [[1], None])


def test_replace_nones() -> None:
    assert optree.tree_replace_nones(0, {"a": None, "b": [None, 1]}) == {"a": 0, "b": [0, 1]}
    assert optree.tree_replace_nones(0, None) == 0
    assert optree.tree_replace_nones([], [None]) == [[]]
    assert optree.tree_replace_nones(0, Ring(None), NAMESPACE) == Ring(0)
    ring = Ring(None)
    assert optree.tree_replace_nones(0, ring) is ring


# transpose ----------------------------------------------------------------------------------------


def test_transpose() -> None:
    outer, inner = optree.tree_structure([0, 0]), optree.tree_structure({"p": 0, "q": (0,)})
    tree = [{"p": 1, "q": (2,)}, {"p": 3, "q": (4,)}]
    assert optree.tree_transpose(outer, inner, tree) == {"p": [1, 3], "q": ([2, 4],)}


def test_transpose_checks() -> None:
    structure = optree.tree_structure
    two, pair = structure([0, 0]), structure((0, 0))
    message = (
        "Tree structure mismatch; expected: PyTreeSpec([(*, *), (*, *)]), got: PyTreeSpec([*])."
    )
    with pytest.raises(TypeError, match="^" + re.escape(message) + "$"):
        optree.tree_transpose(two, pair, [1])
    with pytest.raises(ValueError, match=r"^Tree structures must have at least one leaf\.$"):
        optree.tree_transpose(structure([]), pair, [1])
    with pytest.raises(ValueError, match=r"^Tree structures must have at least one leaf\.$"):
        optree.tree_transpose(two, structure(None), [1])
    none_leaf = optree.tree_structure([0], none_is_leaf=True)
    message = "Tree structures must have the same none_is_leaf value."
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        optree.tree_transpose(two, none_leaf, [1])
    in_a = structure(Pair(0, 0), namespace="a")
    in_b = structure(Pair(0, 0), namespace="b")
    with pytest.raises(ValueError, match="^Tree structures must have the same namespace, got "):
        optree.tree_transpose(in_a, in_b, [1])
    # Only the number of leaves is compared.
    assert optree.tree_transpose(two, pair, [1, 2, 3, 4]) == ([1, 3], [2, 4])


def test_transpose_takes_the_structure_of_the_first_subtree() -> None:
    outer = optree.tree_structure([0, 0])
    found = optree.tree_transpose(outer, None, [{"a": 1, "n": None}, {"n": None, "a": (2,)}])
    assert found == {"a": [1, (2,)], "n": None}
    outer = optree.tree_structure([0, 0], none_is_leaf=True)
    found = optree.tree_transpose(outer, None, [{"n": None}, {"n": 1}])
    assert found == {"n": [None, 1]}
    whole = optree.tree_transpose(outer, None, [(1, 2), (3, 4)], lambda x: isinstance(x, tuple))
    assert whole == [(1, 2), (3, 4)]
    with pytest.raises(ValueError, match="dictionary key mismatch"):
        optree.tree_transpose(outer, None, [{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match="Expected an instance of list"):
        optree.tree_transpose(outer, None, ({"a": 1}, {"a": 2}))
    with pytest.raises(ValueError, match="inner structure must have at least one leaf"):
        optree.tree_transpose(outer, None, [(), ()])
    with pytest.raises(ValueError, match="outer structure must have at least one leaf"):
        optree.tree_transpose(optree.tree_structure(()), None, ())


def test_transpose_map() -> None:
    tree = {"b": (2, [3, 4]), "a": 1}
    double, square = optree.tree_transpose_map(lambda x: (2 * x, x * x), tree)
    assert double == {"b": (4, [6, 8]), "a": 2}
    assert square == {"b": (4, [9, 16]), "a": 1}
    result = optree.tree_transpose_map(lambda x, y: {"s": x + y, "d": [x - y]}, tree, tree)
    assert result == {"s": {"b": (4, [6, 8]), "a": 2}, "d": [{"b": (0, [0, 0]), "a": 0}]}
    inner = optree.tree_structure([0, 0])
    assert optree.tree_transpose_map(lambda x: [x, (x, x)], [1, 2], inner_treespec=inner) == [
        [1, 2],
        [(1, 1), (2, 2)],
    ]
    paths = optree.tree_transpose_map_with_path(lambda path, x: (str(path), x), tree)
    assert paths[1] == tree
    assert paths[0] == {"b": ("('b', 0)", ["('b', 1, 0)", "('b', 1, 1)"]), "a": "('a',)"}
    codes = optree.tree_transpose_map_with_accessor(lambda a, x: {"c": a.codify("t"), "x": x}, tree)
    assert codes["c"] == {"b": ("t['b'][0]", ["t['b'][1][0]", "t['b'][1][1]"]), "a": "t['a']"}


def test_transpose_map_checks() -> None:
    with pytest.raises(
        ValueError, match=r"^The outer structure must have at least one leaf\. Got: "
    ):
        optree.tree_transpose_map(lambda x: [x], [])
    with pytest.raises(
        ValueError, match=r"^The inner structure must have at least one leaf\. Got: "
    ):
        optree.tree_transpose_map(lambda x: [], [1])
    inner = optree.tree_structure((0,))
    assert optree.tree_transpose_map(lambda x: [x], [], inner_treespec=inner) == ([],)
    with pytest.raises(ValueError, match=r"^Expected an instance of list, got \(1,\)"):
        optree.tree_transpose_map(lambda x: [x] if x == 0 else (x,), [0, 1])


def test_transpose_map_calls_everything_before_matching() -> None:
    calls: list[int] = []
    with pytest.raises(ValueError, match="arity mismatch"):
        optree.tree_transpose_map(lambda x: calls.append(x) or [x] * x, [1, 2, 3])
    assert calls == [1, 2, 3]


# reductions ---------------------------------------------------------------------------------------


def test_reduce() -> None:
    assert optree.tree_reduce(lambda a, b: a * 10 + b, TREE) == 1234
    assert optree.tree_reduce(lambda a, b: a * 10 + b, TREE, 9) == 91234
    assert optree.tree_reduce(lambda a, b: a, [], None) is None
    assert optree.tree_reduce(max, 5) == 5
    assert optree.functools.reduce is optree.tree_reduce
    # "sequence" before Python 3.10
    message = r"^reduce\(\) of empty (iterable|sequence) with no initial value$"
    with pytest.raises(TypeError, match=message):
        optree.tree_reduce(max, [])
    with pytest.raises(TypeError, match=message):
        optree.tree_reduce(max, None)


def test_sum() -> None:
    assert optree.tree_sum(TREE) == 10
    assert optree.tree_sum(TREE, 5) == 15
    assert optree.tree_sum([], 5) == 5
    assert optree.tree_sum(["a", ("b", {"c": "d"})], "") == "abd"
    assert optree.tree_sum([b"a", (b"b",)], b"") == b"ab"
    assert optree.tree_sum([b"a", (b"b",)], bytearray(b"-")) == bytearray(b"-ab")
    start = bytearray(b"-")
    summed = optree.tree_sum([b"a"], start)
    assert type(summed) is bytearray
    assert start == b"-"  # not added to in place
    assert optree.tree_sum(["b"], start="a") == "ab"
    assert optree.tree_sum([[1], [2]], [], is_leaf=lambda x: x in ([1], [2])) == [1, 2]
    with pytest.raises(TypeError):
        optree.tree_sum([1, "a"])


def test_max_and_min() -> None:
    assert optree.tree_max(TREE) == 4
    assert optree.tree_min(TREE) == 1
    assert optree.tree_max(TREE, key=lambda x: -x) == 1
    assert optree.tree_max([], default=None) is None
    assert optree.tree_min(None, default=7) == 7
    assert optree.tree_min({"a": [3, 1], "b": 2}, default=7) == 1
    for function in (optree.tree_max, optree.tree_min):
        with pytest.raises(ValueError, match="empty"):
            function([])
        with pytest.raises(TypeError):
            function([1], 3)


def test_all_and_any() -> None:
    assert optree.tree_all([]) is True
    assert optree.tree_any([]) is False
    assert optree.tree_all([1, (0, 2)]) is False
    assert optree.tree_any([0, ("", {"a": 1})]) is True
    assert optree.tree_all([None]) is True
    assert optree.tree_all([None], none_is_leaf=True) is False


def test_all_and_any_stop_early() -> None:
    class Loud:
        def __bool__(self) -> bool:
            raise AssertionError("asked")

    assert optree.tree_all([0, Loud()]) is False
    assert optree.tree_any([1, Loud()]) is True
    visited: list[Any] = []
    optree.tree_any([1, [2]], is_leaf=lambda x: visited.append(x))
    assert visited == [[1, [2]], 1]


def test_missing_default_has_a_readable_repr() -> None:
    import inspect

    parameter = inspect.signature(optree.tree_reduce).parameters["initial"]
    assert repr(parameter.default) == "<MISSING>"
    assert repr(inspect.signature(optree.tree_max).parameters["default"].default) == "<MISSING>"


def test_map_over_every_container_kind() -> None:
    tree = [
        (1,), [1], {'a': 1}, OrderedDict(a=1), defaultdict(int, a=1), deque([1], 2), Point(1, None),
        Pair(1, 2), Ring(1),
    ]  # fmt: skip
    result = optree.tree_map(lambda x: x + 1, tree, namespace=NAMESPACE)
    assert result == [
        (2,), [2], {'a': 2}, OrderedDict(a=2), defaultdict(int, a=2), deque([2], 2), Point(2, None),
        Pair(2, 3), Ring(2),
    ]  # fmt: skip
    assert [type(node) for node in result] == [type(node) for node in tree]


def test_map_only_takes_unions() -> None:
    tree = [1, "a", 2.0, None, b"x"]
    kinds: list[Any] = [
        (Union[int, str], [0, 0, 2.0, None, b"x"]),
        (Optional[int], [0, "a", 2.0, 0, b"x"]),
        ((Union[int, str], float), [0, 0, 0, None, b"x"]),
        ((int, (str, bytes)), [0, 0, 2.0, None, 0]),
    ]
    if sys.version_info >= (3, 10):
        kinds += [(int | str, [0, 0, 2.0, None, b"x"]), (int | None, [0, "a", 2.0, 0, b"x"])]
    for kind, expected in kinds:
        assert optree.tree_map_only(kind, lambda x: 0, tree, none_is_leaf=True) == expected
    for bad in (3, "int", [int], (int, 3), ("int",)):
        with pytest.raises(TypeError, match="^Expected a class, "):
            optree.tree_map_only(bad, lambda x: 0, tree)


@pytest.mark.parametrize("fillvalue", [None, "missing"])
def test_combine_finds_subtrees_on_either_side(fillvalue: Any) -> None:
    no = fillvalue

    def combine(*trees: Any) -> Any:
        return optree.tree_combine(*trees, fillvalue=fillvalue)

    assert combine([no], [[1, 2]]) == [[1, 2]]
    assert combine([[1, 2]], [no]) == [[1, 2]]
    assert combine(no, {"a": 1}) == combine({"a": 1}, no) == {"a": 1}
    assert combine(no, [1, no], [no, 2]) == [1, 2]
    assert combine([1, no], no, [no, 2]) == combine([1, no], [no, 2], no) == [1, 2]
    assert combine({"a": no, "b": [1, no]}, {"b": no, "a": (1, 2)}, {"a": no, "b": [no, 5]}) == {
        "a": (1, 2),
        "b": [1, 5],
    }
    assert combine(no, no) is no
    for mismatch, message in (
        (([1, 2], [1]), "list arity mismatch; expected: 2, got: 1"),
        (([[1], no], [(1,), 2]), "Expected an instance of list, got (1,)."),
        (({"a": [no]}, {"b": no}), "dictionary key mismatch; expected key(s): ['a']"),
        (([(1,), 2], [1, 2]), "Expected an instance of tuple, got 1."),
        (([1, 2], [(1,), 2]), "Expected a leaf of each tree at one place, got ['int', 'tuple']."),
        (([no, 1], [2, no], [2, {}]), "Expected a leaf of each tree at one place, got ['int', 'd"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            combine(*mismatch)


def test_combine_takes_the_first_of_several_leaves() -> None:
    assert optree.tree_combine({"a": 1, "b": [None, 2]}, {"a": 3, "b": [4, 5]}) == {
        "a": 1,
        "b": [4, 2],
    }
    assert optree.tree_combine([1], [2], [3]) == [1]
    lists = [[1], [2, 3]]
    assert optree.tree_combine([lists[0]], [lists[1]], is_leaf=lists.__contains__) == [[1]]


def test_none_is_no_leaf_for_combine_unless_it_is_chosen() -> None:
    trees = [None, "missing"], [None, 1]
    assert optree.tree_combine(*trees, fillvalue="missing") == [None, 1]
    with pytest.raises(ValueError, match=re.escape("Expected None, got 1.")):
        optree.tree_combine([None], [1], fillvalue="missing")
    found = optree.tree_combine([None], [1], fillvalue="missing", none_is_leaf=True)
    assert found == [None]


def test_combine_looks_for_the_fill_value_itself() -> None:
    class EqualToAll:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    leaf = EqualToAll()
    (found,) = optree.tree_combine([leaf], [None])
    assert found is leaf


@pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
def test_combine_undoes_partition(row: Any) -> None:
    options = {"namespace": row.namespace}
    parity = {"odd": False}

    def alternate(leaf: Any) -> bool:
        parity["odd"] = not parity["odd"]
        return parity["odd"]

    missing = object()
    parts = optree.tree_partition(alternate, row.make(), fillvalue=missing, **options)
    for trees in (parts, parts[::-1], (missing, *parts), (parts[0], missing, parts[1])):
        combined = optree.tree_combine(*trees, fillvalue=missing, **options)
        assert optree.tree_leaves(combined, **options) == optree.tree_leaves(row.make(), **options)
        assert optree.tree_structure(combined, **options) == optree.tree_structure(
            row.make(), **options
        )
