# SPDX-License-Identifier: Apache-2.0
"""Flattening: which objects are nodes and leaves, and when user code runs."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees import NAMESPACE, Box, DictSubclass, Layer, Opaque, Pair, Point, Ring, every_tree

import optree


class FalseOnly:
    """An object whose truth value may be asked for once and may raise."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked = 0

    def __bool__(self) -> bool:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return bool(self.answer)


FLATTENERS = [
    lambda tree, **kw: optree.tree_flatten(tree, **kw)[0],
    lambda tree, **kw: optree.tree_flatten_with_path(tree, **kw)[1],
    lambda tree, **kw: optree.tree_flatten_with_accessor(tree, **kw)[1],
    optree.tree_leaves,
    lambda tree, **kw: list(optree.tree_iter(tree, **kw)),
    lambda tree, **kw: optree.tree_structure(tree, **kw).flatten_up_to(tree),
]
every_flatten = pytest.mark.parametrize(
    "flatten",
    FLATTENERS,
    ids=["flatten", "with_path", "with_accessor", "leaves", "iter", "flatten_up_to"],
)
every_predicate_flatten = pytest.mark.parametrize(
    "flatten", FLATTENERS[:5], ids=["flatten", "with_path", "with_accessor", "leaves", "iter"]
)


def test_none_is_a_node_by_default() -> None:
    leaves, treespec = optree.tree_flatten([None, 1, (None,)])
    assert leaves == [1]
    assert repr(treespec) == "PyTreeSpec([None, *, (None,)])"
    assert treespec.num_nodes == 5


def test_none_is_a_leaf_on_request() -> None:
    leaves, treespec = optree.tree_flatten([None, 1, (None,)], none_is_leaf=True)
    assert leaves == [None, 1, None]
    assert repr(treespec) == "PyTreeSpec([*, *, (*,)], NoneIsLeaf)"
    assert treespec != optree.tree_structure([0, 1, (0,)])


def test_constants() -> None:
    assert optree.NONE_IS_NODE is False
    assert optree.NONE_IS_LEAF is True
    assert type(optree.MAX_RECURSION_DEPTH) is int


@pytest.mark.parametrize(
    ("tree", "kind", "cls"),
    [
        (None, "NONE", type(None)),
        ((1,), "TUPLE", tuple),
        ([1], "LIST", list),
        ({"a": 1}, "DICT", dict),
        (OrderedDict(a=1), "ORDEREDDICT", OrderedDict),
        (defaultdict(int, a=1), "DEFAULTDICT", defaultdict),
        (deque([1]), "DEQUE", deque),
        (Point(1, 2), "NAMEDTUPLE", Point),
        (Layer(1), "NAMEDTUPLE", Layer),
        (Pair(1, 2), "CUSTOM", Pair),
        (1, "LEAF", None),
        (DictSubclass(a=1), "LEAF", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_kind_and_type_of_the_root(tree: Any, kind: str, cls: Any) -> None:
    treespec = optree.tree_structure(tree)
    assert treespec.kind is optree.PyTreeKind[kind]
    assert treespec.type is cls


@every_flatten
def test_subclasses_of_builtins_are_leaves(flatten: Any) -> None:
    class MyList(list):  # type: ignore[type-arg]
        pass

    class MyOrdered(OrderedDict):  # type: ignore[type-arg]
        pass

    class MyDeque(deque):  # type: ignore[type-arg]
        pass

    class MyDefault(defaultdict):  # type: ignore[type-arg]
        pass

    tree = [MyList([1]), MyOrdered(a=1), MyDeque([1]), MyDefault(int, a=1)]
    assert all(a is b for a, b in zip(flatten(tree), tree))


@pytest.mark.parametrize(
    "fields",
    [("a", 1), ["a", "b"], "ab", None],
    ids=["not_all_str", "a_list", "a_str", "missing"],
)
def test_a_tuple_subclass_with_odd_fields_is_a_leaf(fields: Any) -> None:
    class Odd(tuple):  # type: ignore[type-arg]
        __slots__ = ()
        _make = classmethod(lambda cls, values: cls(values))

        def _asdict(self) -> dict[str, Any]:
            return {}

    if fields is not None:
        Odd._fields = fields  # type: ignore[attr-defined]
    tree = Odd((1, 2))
    assert optree.tree_leaves(tree) == [tree]
    assert optree.tree_leaves(tree)[0] is tree


def test_a_handmade_class_with_all_namedtuple_attributes_is_a_node() -> None:
    class Handmade(tuple):  # type: ignore[type-arg]
        __slots__ = ()
        _fields = ("a", "b")
        _make = classmethod(lambda cls, values: cls(values))

        def _asdict(self) -> dict[str, Any]:
            return {}

        def __new__(cls, *values: Any) -> Handmade:
            return super().__new__(cls, values[0] if len(values) == 1 else values)

    assert optree.tree_leaves(Handmade(1, 2)) == [1, 2]
    assert optree.tree_structure(Handmade(1, 2)).type is Handmade


def test_predicate_sees_every_object_once_in_preorder_including_the_root() -> None:
    tree = {"b": (1, None), "a": [2, {}]}
    seen: list[Any] = []
    optree.tree_flatten(tree, is_leaf=lambda x: seen.append(x))
    assert seen == [tree, [2, {}], 2, {}, (1, None), 1, None]


def test_predicate_on_the_root() -> None:
    tree = [1, 2]
    leaves, treespec = optree.tree_flatten(tree, is_leaf=bool)
    assert leaves == [[1, 2]]
    assert leaves[0] is tree
    assert treespec.is_leaf()


@every_predicate_flatten
def test_a_false_predicate_does_not_open_leaves(flatten: Any) -> None:
    assert flatten([{1}, "ab"], is_leaf=lambda x: False) == [{1}, "ab"]


@every_predicate_flatten
def test_predicate_may_stop_at_none_and_custom_nodes(flatten: Any) -> None:
    pair = Pair(1, 2)
    assert flatten([None, pair, 3], is_leaf=lambda x: x is None or x is pair) == [None, pair, 3]


@pytest.mark.parametrize("value", [0, 1, None, True, False])
def test_predicate_values_with_a_boolean_slot(value: Any) -> None:
    expected = [[1, 2]] if value else [1, 2]
    assert optree.tree_leaves([1, 2], is_leaf=lambda x: value) == expected


@pytest.mark.differs_from_published
@every_predicate_flatten
@pytest.mark.parametrize("value", ["", "yes", [], [0], {}, 0.0, object()])
def test_predicate_values_are_judged_by_truth(flatten: Any, value: Any) -> None:
    assert flatten([1, 2], is_leaf=lambda x: value) == ([[1, 2]] if value else [1, 2])


@pytest.mark.differs_from_published
@every_predicate_flatten
def test_an_exception_of_the_predicate_value_propagates(flatten: Any) -> None:
    answer = FalseOnly(ZeroDivisionError("truth"))
    with pytest.raises(ZeroDivisionError, match="^truth$"):
        flatten([1, 2], is_leaf=lambda x: answer)
    assert answer.asked == 1


@every_predicate_flatten
def test_exception_of_the_predicate_propagates(flatten: Any) -> None:
    class PredicateError(Exception):
        pass

    def predicate(x: Any) -> bool:
        if x == 2:
            raise PredicateError(x)
        return False

    with pytest.raises(PredicateError, match="^2$"):
        flatten([1, (2, 3)], is_leaf=predicate)


@every_predicate_flatten
def test_base_exception_of_the_predicate_propagates(flatten: Any) -> None:
    def predicate(x: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flatten([1, (2, 3)], is_leaf=predicate)


@pytest.mark.parametrize("argument", [3, "x", [], object()], ids=type)
def test_predicate_must_be_callable(argument: Any) -> None:
    for function in (
        optree.tree_flatten,
        optree.tree_flatten_with_path,
        optree.tree_leaves,
        optree.tree_structure,
        optree.tree_iter,
        optree.tree_is_leaf,
        optree.tree_paths,
        optree.tree_accessors,
    ):
        with pytest.raises(TypeError, match="'is_leaf'"):
            function([1], argument)


@pytest.mark.parametrize("argument", [3, None, ("a",)])
def test_namespace_must_be_a_string(argument: Any) -> None:
    for function in (
        optree.tree_flatten,
        optree.tree_flatten_with_path,
        optree.tree_leaves,
        optree.tree_structure,
        optree.tree_iter,
        optree.tree_is_leaf,
        optree.tree_paths,
    ):
        with pytest.raises(TypeError, match="'namespace'"):
            function([1], namespace=argument)


@pytest.mark.parametrize("argument", ["", "True", object(), [], b"x"], ids=type)
def test_none_is_leaf_must_be_boolean(argument: Any) -> None:
    for function in (
        optree.tree_flatten,
        optree.tree_leaves,
        optree.tree_structure,
        optree.tree_iter,
        optree.tree_is_leaf,
    ):
        with pytest.raises(TypeError, match="'none_is_leaf'"):
            function([1], none_is_leaf=argument)


@pytest.mark.parametrize(("argument", "expected"), [(None, []), (0, []), (1, [None])])
def test_none_is_leaf_accepts_objects_with_a_boolean_slot(
    argument: Any, expected: list[Any]
) -> None:
    assert optree.tree_leaves(None, none_is_leaf=argument) == expected


def test_namespace_of_the_structure_is_kept_only_when_it_mattered() -> None:
    structure = optree.tree_structure
    assert structure([1], namespace="any").namespace == ""
    assert structure([Ring(1)]).namespace == ""
    assert structure([Ring(1)], namespace=NAMESPACE).namespace == NAMESPACE
    assert structure([Ring(1)], namespace="any").namespace == ""
    # A custom node found through the global namespace keeps the namespace of the call.
    assert structure([Pair(1, 2)], namespace="any").namespace == "any"
    assert structure([Pair(1, 2)]).namespace == ""
    with optree.dict_insertion_ordered(True, namespace="ordered"):
        assert structure(1, namespace="ordered").namespace == "ordered"
        assert structure(1).namespace == ""
        assert structure(1, namespace="any").namespace == ""
    with optree.dict_insertion_ordered(True, namespace=optree.registry.__GLOBAL_NAMESPACE):
        assert structure({"a": 1}, namespace="any").namespace == ""


def test_flatten_function_runs_once_per_custom_node() -> None:
    calls: list[Any] = []

    class Node:
        pass

    def flatten(node: Node) -> tuple[tuple[int], None]:
        calls.append(node)
        return (1,), None

    optree.register_pytree_node(Node, flatten, lambda m, c: Node(), namespace="once")
    try:
        tree = [Node(), Node()]
        for flatten_tree in FLATTENERS[:5]:
            calls.clear()
            flatten_tree(tree, namespace="once")
            assert [id(x) for x in calls] == [id(x) for x in tree]
        treespec = optree.tree_structure(tree, namespace="once")
        calls.clear()
        treespec.flatten_up_to(tree)
        assert len(calls) == 2
        calls.clear()
        optree.tree_map(lambda x: x, tree, namespace="once")
        assert len(calls) == 2
        calls.clear()
        optree.tree_map(lambda x, y: x, tree, tree, namespace="once")
        assert len(calls) == 4
        calls.clear()
        optree.tree_broadcast_map(lambda x: x, tree, namespace="once")
        assert len(calls) == 2
    finally:
        optree.unregister_pytree_node(Node, namespace="once")


@pytest.mark.parametrize(
    "result",
    [
        [[1, 2], "meta"],
        ((1, 2), "meta", None),
        ([1, 2], "meta", ["p", "q"]),
        iter([(1, 2), "meta"]),
        (range(1, 3), "meta"),
        (reversed([2, 1]), "meta"),
        ((x for x in (1, 2)), "meta", (x for x in "pq")),
        ({1: "a", 2: "b"}, "meta"),
    ],
    ids=["list", "no_entries", "entries", "iterator", "range", "reversed", "generators", "dict"],
)
def test_flatten_function_may_return_any_iterables(result: Any) -> None:
    class Node:
        pass

    optree.register_pytree_node(Node, lambda n: result, lambda m, c: (m, c), namespace="iterables")
    try:
        leaves, treespec = optree.tree_flatten(Node(), namespace="iterables")
    finally:
        optree.unregister_pytree_node(Node, namespace="iterables")
    assert leaves == [1, 2]
    assert treespec.unflatten(leaves) == ("meta", (1, 2))
    assert treespec.entries() in ([0, 1], ["p", "q"])
    assert optree.treespec_is_one_level(treespec)


def test_a_string_of_children_iterates_by_character() -> None:
    class Node:
        pass

    optree.register_pytree_node(Node, lambda n: ("ab", 1), lambda m, c: c, namespace="chars")
    try:
        assert optree.tree_leaves(Node(), namespace="chars") == ["a", "b"]
    finally:
        optree.unregister_pytree_node(Node, namespace="chars")


@every_flatten
@pytest.mark.parametrize(
    ('result', 'error', 'message'),
    [
        (((1,),), RuntimeError, 'PyTree custom flatten function for type {cls!r} should return '
         'a 2- or 3-tuple, got 1.'),
        ((), RuntimeError, 'PyTree custom flatten function for type {cls!r} should return '
         'a 2- or 3-tuple, got 0.'),
        (((1,), 2, None, 4), RuntimeError, 'PyTree custom flatten function for type {cls!r} should '
         'return a 2- or 3-tuple, got 4.'),
        (None, TypeError, None),
        (3, TypeError, None),
        ((3, None), TypeError, None),
        (((1, 2), None, 3), TypeError, None),
    ],
    ids=['one', 'zero', 'four', 'none', 'int', 'children', 'entries'],
)  # fmt: skip
def test_wrong_results_of_flatten_functions(
    flatten: Any, result: Any, error: type[Exception], message: str | None
) -> None:
    class Node:
        pass

    optree.register_pytree_node(Node, lambda n: result, lambda m, c: c, namespace="wrong")
    try:
        with pytest.raises(error) as info:
            flatten([0, Node()], namespace="wrong")
        with pytest.raises(error) as one_level:
            optree.tree_flatten_one_level(Node(), namespace="wrong")
    finally:
        optree.unregister_pytree_node(Node, namespace="wrong")
    if message is not None:
        assert str(info.value) == message.format(cls=Node)
        assert str(one_level.value) == message.format(cls=Node)


@pytest.mark.parametrize("entries", [(), ("a",), ("a", "b", "c")])
def test_entries_must_match_the_children(entries: tuple[str, ...]) -> None:
    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((1, 2), None, entries), lambda m, c: c, namespace="entries"
    )
    message = re.escape(
        f"PyTree custom flatten function for type {Node!r} returned inconsistent number of "
        f"children (2) and number of entries ({len(entries)})."
    )
    short = re.escape(
        f"PyTree custom flatten function for type {Node!r} returned inconsistent number of children"
    )
    try:
        for function in (
            optree.tree_flatten,
            optree.tree_leaves,
            optree.tree_structure,
            optree.tree_flatten_one_level,
            lambda tree, **kw: list(optree.tree_iter(tree, **kw)),
        ):
            with pytest.raises(RuntimeError, match=f"^{message}$"):
                function(Node(), namespace="entries")
        with pytest.raises(RuntimeError, match=f"^{short}"):
            optree.tree_flatten_with_path(Node(), namespace="entries")
    finally:
        optree.unregister_pytree_node(Node, namespace="entries")


@every_flatten
def test_exception_of_a_flatten_function_propagates(flatten: Any) -> None:
    class Node:
        pass

    def flatten_node(node: Node) -> Any:
        raise LookupError("flatten")

    optree.register_pytree_node(Node, flatten_node, lambda m, c: c, namespace="raises")
    try:
        with pytest.raises(LookupError, match="^flatten$"):
            flatten([1, {"a": Node()}], namespace="raises")
    finally:
        optree.unregister_pytree_node(Node, namespace="raises")


@every_flatten
def test_exception_of_a_generator_of_children_propagates(flatten: Any) -> None:
    class Node:
        pass

    def children() -> Any:
        yield 1
        raise LookupError("children")

    optree.register_pytree_node(
        Node, lambda n: (children(), None), lambda m, c: c, namespace="raises"
    )
    try:
        with pytest.raises(LookupError, match="^children$"):
            flatten([Node()], namespace="raises")
    finally:
        optree.unregister_pytree_node(Node, namespace="raises")


def test_tree_is_leaf() -> None:
    assert optree.tree_is_leaf(1)
    assert not optree.tree_is_leaf([1])
    assert not optree.tree_is_leaf(None)
    assert optree.tree_is_leaf(None, none_is_leaf=True)
    assert optree.tree_is_leaf([1], lambda x: True)
    assert optree.tree_is_leaf([1], is_leaf=lambda x: isinstance(x, list))
    assert optree.tree_is_leaf(Ring())
    assert not optree.tree_is_leaf(Ring(), namespace=NAMESPACE)
    assert optree.tree_is_leaf(1) is True


def test_all_leaves_short_circuits() -> None:
    assert optree.all_leaves([]) is True
    assert optree.all_leaves([1, "a", object()]) is True
    assert optree.all_leaves([1, [2]]) is False
    assert optree.all_leaves([1, None]) is False
    assert optree.all_leaves([1, None], none_is_leaf=True) is True
    assert optree.all_leaves([[1]], lambda x: True) is True
    rest = iter([1, [2], 3])
    assert optree.all_leaves(rest) is False
    assert list(rest) == [3]
    with pytest.raises(TypeError):
        optree.all_leaves(1)


@every_tree
def test_one_level_unflatten_function_of_the_table(row: Any) -> None:
    tree = row.make()
    if optree.tree_is_leaf(tree, namespace=row.namespace):
        with pytest.raises(
            ValueError,
            match="^" + re.escape(f"Cannot flatten leaf-type: {type(tree)} (node: {tree!r})."),
        ):
            optree.tree_flatten_one_level(tree, namespace=row.namespace)
        return
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(
        tree, namespace=row.namespace
    )
    assert type(children) is list
    assert type(entries) is tuple
    assert type(unflatten(metadata, tuple(children))) is type(tree)


def test_one_level_of_each_builtin_kind() -> None:
    one = optree.tree_flatten_one_level
    assert tuple(one((1, 2)))[:3] == ([1, 2], None, (0, 1))
    assert tuple(one([1, 2]))[:3] == ([1, 2], None, (0, 1))
    assert tuple(one(None))[:3] == ([], None, ())
    assert tuple(one({"b": 1, "a": 2}))[:3] == ([2, 1], ["a", "b"], ("a", "b"))
    assert tuple(one(OrderedDict(b=1, a=2)))[:3] == ([1, 2], ["b", "a"], ("b", "a"))
    assert tuple(one(defaultdict(int, b=1, a=2)))[:3] == ([2, 1], (int, ["a", "b"]), ("a", "b"))
    assert tuple(one(deque([1], maxlen=4)))[:3] == ([1], 4, (0,))
    assert tuple(one(Point(1, 2)))[:3] == ([1, 2], Point, (0, 1))
    assert tuple(one(Box("p", p=[1]), namespace=NAMESPACE))[:3] == ([[1]], "p", ("p",))
    level = one({"b": 1, "a": 2})
    assert type(level).__name__ == "FlattenOneLevelOutputEx"
    assert type(level).__mro__[1].__name__ == "FlattenOneLevelOutput"
    assert level.type is dict
    assert level.kind is optree.PyTreeKind.DICT
    assert level.path_entry_type is optree.MappingEntry
    assert list(level.unflatten_func(level.metadata, level.children)) == ["b", "a"]
    assert level.metadata.original_keys == {"b": None, "a": None}
    with pytest.raises(ValueError, match=r"^Expected no children\.$"):
        one(None).unflatten_func(None, (1,))


def test_one_level_stops_at_leaves() -> None:
    for tree, options in [
        (1, {}),
        (None, {"none_is_leaf": True}),
        ([1], {"is_leaf": lambda x: True}),
        (Ring(1), {}),
    ]:
        message = f"Cannot flatten leaf-type: {type(tree)} (node: {tree!r})."
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            optree.tree_flatten_one_level(tree, **options)


def test_identical_leaves_stay_identical() -> None:
    shared = Opaque()
    leaves = optree.tree_leaves([shared, (shared, {"a": shared})])
    assert leaves == [shared] * 3
    assert all(leaf is shared for leaf in leaves)


def test_private_functions_return_tuples() -> None:
    assert type(optree._C.flatten([1])) is tuple
    assert type(optree._C.flatten_with_path([1])) is tuple
    assert optree._C.flatten([1, None], None, True, "")[0] == [1, None]
    assert optree._C.flatten([1, None], leaf_predicate=None, none_is_leaf=True)[0] == [1, None]
    assert optree._C.flatten_with_path({"a": [1]}, namespace="x")[0] == [("a", 0)]
    assert optree._C.is_leaf([1], leaf_predicate=lambda x: True)
    for function in (optree._C.flatten, optree._C.flatten_with_path, optree._C.is_leaf):
        with pytest.raises(TypeError, match="missing required argument"):
            function()
        with pytest.raises(TypeError, match="unexpected keyword argument 'tree'"):
            function(tree=[1])
        with pytest.raises(TypeError, match="takes at most 4 positional arguments but 5"):
            function([1], None, False, "", 5)
        with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
            function([1], unknown=1)
        with pytest.raises(TypeError, match="multiple values for argument 'leaf_predicate'"):
            function([1], None, leaf_predicate=None)


class Flawed:
    """A node whose flatten function returns the constructor's arguments."""

    def __init__(self, *flattened: Any) -> None:
        self.flattened = flattened


optree.register_pytree_node(
    Flawed, lambda x: x.flattened, lambda metadata, children: Flawed(children), namespace="flawed"
)


def test_one_level_of_a_registered_class_checks_what_its_function_returns() -> None:
    def one_level(*flattened: Any) -> Any:
        return optree.tree_flatten_one_level(Flawed(*flattened), namespace="flawed")

    children, metadata, entries, _ = one_level([5, 6], "meta", ["x", "y"])
    assert (children, metadata, entries) == ([5, 6], "meta", ("x", "y"))
    assert one_level([5, 6], "meta")[2] == (0, 1)
    for flattened in ((), ([5],), ([5], None, ("x",), 7)):
        with pytest.raises(RuntimeError, match=rf"2- or 3-tuple, got {len(flattened)}\."):
            one_level(*flattened)
    for entries in (("x",), ("x", "y", "z")):
        with pytest.raises(RuntimeError, match=rf"children \(2\) .* entries \({len(entries)}\)"):
            one_level([5, 6], None, entries)


def test_the_constants_say_what_none_is() -> None:
    tree = [None, 1]
    assert optree.tree_leaves(tree, none_is_leaf=optree.NONE_IS_LEAF) == [None, 1]
    assert optree.tree_leaves(tree, none_is_leaf=optree.NONE_IS_NODE) == [1]
