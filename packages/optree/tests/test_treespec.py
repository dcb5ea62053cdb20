# SPDX-License-Identifier: Apache-2.0
"""PyTreeSpec: properties, navigation, comparison, hash, representation, constructors."""

from __future__ import annotations

import copy
import gc
import os
import re
import time
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
from trees import NAMESPACE, Box, Empty, Mapping2, Pair, Point, Point3, Ring

import optree

structure = optree.tree_structure
LEAF = optree.treespec_leaf()


class WithIndex:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class WithInt:
    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


# type ---------------------------------------------------------------------------------------------


def test_the_class() -> None:
    cls = optree.PyTreeSpec
    assert cls.__module__ == "optree"
    assert cls.__qualname__ == cls.__name__ == "PyTreeSpec"
    assert cls is optree._C.PyTreeSpec is optree.typing.PyTreeSpec
    assert optree.PyTreeDef is cls
    assert not hasattr(cls, "__iter__")
    assert cls.__hash__ is not None
    treespec = structure([1])
    assert not hasattr(treespec, "__dict__")
    with pytest.raises(TypeError):
        iter(treespec)  # type: ignore[call-overload]
    with pytest.raises(AttributeError):
        treespec.brand_new = 1  # type: ignore[attr-defined]


@pytest.mark.skipif(
    not hasattr(type, "__flags__") or os.sys.version_info < (3, 10), reason="since Python 3.10"
)
def test_the_class_is_immutable() -> None:
    for cls in (optree.PyTreeSpec, optree._C.PyTreeIter):
        with pytest.raises(TypeError):
            cls.brand_new = 1
        with pytest.raises(TypeError):
            del cls.__module__


def test_no_constructor() -> None:
    with pytest.raises(TypeError, match="No constructor defined!"):
        optree.PyTreeSpec()
    with pytest.raises(TypeError, match="No constructor defined!"):
        structure([1]).__init__()  # type: ignore[misc]
    assert type(optree.PyTreeSpec.__new__(optree.PyTreeSpec)) is optree.PyTreeSpec


def test_weak_references_and_tracking() -> None:
    treespec = structure([1, Pair(1, 2)])
    assert weakref.ref(treespec)() is treespec
    watched = weakref.ref(treespec)
    del treespec
    assert watched() is None
    assert gc.is_tracked(structure({Ring: 1}))


@pytest.mark.parametrize(
    "name",
    ["num_leaves", "num_nodes", "num_children", "none_is_leaf", "namespace", "type", "kind"],
)
def test_properties_are_read_only(name: str) -> None:
    treespec = structure([1])
    with pytest.raises(AttributeError):
        setattr(treespec, name, 1)
    with pytest.raises(AttributeError):
        delattr(treespec, name)


@pytest.mark.parametrize(
    ("tree", "leaves", "nodes", "children", "cls", "kind"),
    [
        (1, 1, 1, 0, None, "LEAF"),
        (None, 0, 1, 0, type(None), "NONE"),
        ([], 0, 1, 0, list, "LIST"),
        ({}, 0, 1, 0, dict, "DICT"),
        ([1, (2, None)], 2, 5, 2, list, "LIST"),
        (Point3(1, {"a": [2]}), 2, 5, 2, Point3, "NAMEDTUPLE"),
        (time.gmtime(0), 9, 10, 9, time.struct_time, "STRUCTSEQUENCE"),
        (Pair(1, Pair(2, 3)), 3, 5, 2, Pair, "CUSTOM"),
    ],
)
def test_counts(tree: Any, leaves: int, nodes: int, children: int, cls: Any, kind: str) -> None:
    treespec = structure(tree)
    assert treespec.num_leaves == len(treespec) == leaves
    assert bool(treespec) is (leaves > 0)
    assert treespec.num_nodes == nodes
    assert treespec.num_children == children
    assert treespec.type is cls
    assert treespec.kind is optree.PyTreeKind[kind]


# kind ---------------------------------------------------------------------------------------------


def test_kinds() -> None:
    import enum
    import pickle

    cls = optree.PyTreeKind
    names = [
        'CUSTOM', 'LEAF', 'NONE', 'TUPLE', 'LIST', 'DICT', 'NAMEDTUPLE', 'ORDEREDDICT',
        'DEFAULTDICT', 'DEQUE', 'STRUCTSEQUENCE', 'FROZENDICT',
    ]  # fmt: skip
    assert issubclass(cls, enum.IntEnum)
    assert cls.__module__ == "optree"
    assert [(kind.name, kind.value) for kind in cls] == [(n, i) for i, n in enumerate(names)]
    assert cls.NUM_KINDS == len(list(cls)) == 12
    assert not isinstance(cls.NUM_KINDS, cls)
    assert type(structure([1]).kind) is cls
    assert structure([1]).kind == 4
    with pytest.raises(ValueError, match=r"^12 is not a valid .*PyTreeKind$"):
        cls(12)
    for kind in cls:
        assert pickle.loads(pickle.dumps(kind)) is kind
    with pytest.raises(AttributeError, match="annot reassign member"):
        cls.LIST = 5  # type: ignore[misc]


# entries and children -----------------------------------------------------------------------------


def test_entry_and_child_accept_indices() -> None:
    treespec = structure({"b": [1], "a": (2,)})
    for index in (1, -1, True, WithIndex(1), WithInt(1), WithIndex(-1)):
        assert treespec.entry(index) == "b"
        assert treespec.child(index) == structure([0])
    assert optree.treespec_entry(treespec, 0) == "a"
    assert optree.treespec_child(treespec, -2) == structure((0,))


@pytest.mark.parametrize("index", [2, -3, 10**6, True + 2])
def test_indices_out_of_range(index: int) -> None:
    treespec = structure({"b": [1], "a": (2,)})
    with pytest.raises(IndexError, match=r"^PyTreeSpec::Entry\(\) index out of range\.$"):
        treespec.entry(index)
    with pytest.raises(IndexError, match=r"^PyTreeSpec::Child\(\) index out of range\.$"):
        treespec.child(index)
    for empty in (LEAF, structure(None), structure([])):
        with pytest.raises(IndexError, match=r"^PyTreeSpec::Entry\(\) index out of range\.$"):
            empty.entry(0)
        with pytest.raises(IndexError, match=r"^PyTreeSpec::Child\(\) index out of range\.$"):
            empty.child(-1)


@pytest.mark.parametrize("index", [1.0, "0", None, [0], object(), 1j])
def test_indices_of_the_wrong_type(index: Any) -> None:
    treespec = structure([1, 2])
    with pytest.raises(TypeError, match="expected an integer index"):
        treespec.entry(index)
    with pytest.raises(TypeError, match="expected an integer index"):
        treespec.child(index)


def test_exception_of_an_index_propagates() -> None:
    class Bad:
        def __index__(self) -> int:
            raise LookupError("index")

    with pytest.raises(LookupError, match="^index$"):
        structure([1, 2]).entry(Bad())


def test_entries_are_fresh_lists() -> None:
    for tree in ({"a": 1}, OrderedDict(a=1), defaultdict(int, a=1), [1], Point(1, 2)):
        treespec = structure(tree)
        before = treespec.entries()
        treespec.entries().append("x")
        treespec.children().append(LEAF)
        assert treespec.entries() == before
        assert len(treespec.children()) == len(before)
    box = structure(Box("p", p=1), namespace=NAMESPACE)
    box.entries().append("x")
    assert box.entries() == ["p"]


def test_children_keep_the_namespace_and_none_mode() -> None:
    treespec = structure([Ring(1), 2], none_is_leaf=True, namespace=NAMESPACE)
    for child in (*treespec.children(), treespec.child(1), treespec.one_level()):
        assert child.namespace == NAMESPACE
        assert child.none_is_leaf


def test_one_level() -> None:
    assert LEAF.one_level() is None
    assert structure(None).one_level() == structure(None)
    assert structure([1, (2, [3])]).one_level() == structure([0, 0])
    assert structure([]).one_level() == structure([])
    assert optree.treespec_one_level(structure({"a": [1]})) == structure({"a": 1})
    one_level = structure({"b": [1], "a": 2}).one_level()
    assert list(one_level.unflatten([1, 2])) == ["b", "a"]


def test_leaf_predicates() -> None:
    rows = [
        # tree, strict leaf, leaf, one level
        (1, True, True, False),
        (None, False, True, True),
        ([], False, True, True),
        ({}, False, True, True),
        ([1], False, False, True),
        ([1, 2], False, False, True),
        ([None], False, False, False),
        ([[1]], False, False, False),
    ]
    for tree, strict, loose, one_level in rows:
        treespec = structure(tree)
        assert treespec.is_leaf() is treespec.is_leaf(strict=True) is strict
        assert treespec.is_leaf(strict=False) is loose
        assert treespec.is_one_level() is one_level
        assert optree.treespec_is_leaf(treespec) is strict
        assert optree.treespec_is_leaf(treespec, strict=False) is loose
        assert optree.treespec_is_strict_leaf(treespec) is strict
        assert optree.treespec_is_one_level(treespec) is one_level
    with pytest.raises(TypeError, match="takes at most 0 positional"):
        LEAF.is_leaf(False)  # type: ignore[misc]


def test_leaf_predicates_work_on_look_alikes() -> None:
    class Spec:
        num_nodes = 1
        num_leaves = 1
        num_children = 0

    assert optree.treespec_is_leaf(Spec())
    assert optree.treespec_is_strict_leaf(Spec())
    assert not optree.treespec_is_one_level(Spec())


# equality and hash --------------------------------------------------------------------------------

UNEQUAL: list[tuple[Any, Any]] = [
    ([1], (1,)),
    ([1], [1, 2]),
    ([1], [[1]]),
    (1, None),
    ({"a": 1}, {"b": 1}),
    ({"a": 1}, OrderedDict(a=1)),
    ({"a": 1}, defaultdict(None, a=1)),
    (defaultdict(int, a=1), defaultdict(list, a=1)),
    (OrderedDict(a=1, b=2), OrderedDict(b=1, a=2)),
    (deque([1]), deque([1], maxlen=1)),
    (deque([1], maxlen=1), deque([1], maxlen=2)),
    (deque([1]), [1]),
    (Point(1, 2), Point3(1, 2)),
    (Point(1, 2), (1, 2)),
    (Ring(1), Ring(1, 2)),
    ([], ()),
    ([], {}),
    (Empty(), ()),
    ([[], 1], [1, []]),
    ([[1], 2], [1, [2]]),
]


@pytest.mark.parametrize(("left", "right"), UNEQUAL)
def test_unequal(left: Any, right: Any) -> None:
    a, b = structure(left, namespace=NAMESPACE), structure(right, namespace=NAMESPACE)
    assert a != b
    assert not (a == b)  # noqa: SIM201
    assert hash(a) != hash(b)


def test_equal_ignores_insertion_order_and_entries() -> None:
    assert structure({"a": 1, "b": 2}) == structure({"b": 1, "a": 2})
    first = structure(Box("same", p=1), namespace=NAMESPACE)
    second = structure(Box("same", q=1), namespace=NAMESPACE)
    assert first.entries() != second.entries()
    assert first == second
    assert hash(first) == hash(second)


def test_empty_namespace_equals_any() -> None:
    a = structure(Pair(1, 2), namespace="a")
    b = structure(Pair(1, 2), namespace="b")
    none = structure(Pair(1, 2))
    assert a == none == b
    assert a != b
    assert hash(a) == hash(b) == hash(none)
    assert a <= none <= b
    assert not a <= b


def test_registrations_are_compared_by_identity() -> None:
    assert structure(Pair(1, 2)) != structure(Pair(1, 2), namespace="pairs")

    class Node:
        pass

    def register() -> Any:
        optree.register_pytree_node(
            Node, lambda n: ((), None), lambda m, c: Node(), namespace="again"
        )
        return structure(Node(), namespace="again")

    first = register()
    optree.unregister_pytree_node(Node, namespace="again")
    second = register()
    optree.unregister_pytree_node(Node, namespace="again")
    assert first != second


def test_comparison_with_other_objects() -> None:
    treespec = structure([1])
    assert (treespec == 3) is False
    assert (treespec != 3) is True
    assert treespec.__eq__(3) is NotImplemented
    assert treespec.__lt__(3) is NotImplemented
    for compare in ("__lt__", "__le__", "__gt__", "__ge__"):
        with pytest.raises(TypeError, match="not supported between instances of"):
            getattr(__import__("operator"), compare)(treespec, 3)


def test_exceptions_of_metadata_comparison_propagate() -> None:
    class Meta:
        def __eq__(self, other: object) -> bool:
            raise LookupError("meta")

        __hash__ = None  # type: ignore[assignment]

    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((1,), Meta()), lambda m, c: Node(), namespace="meta"
    )
    try:
        a, b = structure(Node(), namespace="meta"), structure(Node(), namespace="meta")
        for compare in (
            lambda: a == b,
            lambda: a != b,
            lambda: a <= b,
            lambda: a < b,
            lambda: a.flatten_up_to(Node()),
            lambda: a.broadcast_to_common_suffix(b),
        ):
            with pytest.raises(LookupError, match="^meta$"):
                compare()
        assert isinstance(hash(a), int)
    finally:
        optree.unregister_pytree_node(Node, namespace="meta")


class MutableKey:
    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MutableKey) and self.name == other.name

    def __hash__(self) -> int:
        if self.name == "raise":
            raise LookupError("hash")
        return hash(("MutableKey", self.name))

    def __repr__(self) -> str:
        if self.name == "raise":
            raise LookupError("repr")
        return f"<{self.name}>"


def test_hash_follows_the_keys() -> None:
    key = MutableKey("a")
    treespec = structure({key: 1})
    before = hash(treespec)
    assert hash(treespec) == before
    key.name = "b"
    assert hash(treespec) != before
    assert repr(treespec) == "PyTreeSpec({<b>: *})"
    key.name = "a"
    assert hash(treespec) == before


def test_exceptions_of_keys_propagate() -> None:
    key = MutableKey("a")
    treespec = structure([1, {key: 1}])
    key.name = "raise"
    with pytest.raises(LookupError, match="^hash$"):
        hash(treespec)
    with pytest.raises(LookupError, match="^repr$"):
        repr(treespec)
    with pytest.raises(LookupError, match="^hash$"):
        treespec.unflatten([1, 2])
    key.name = "a"
    assert treespec.unflatten([1, 2]) == [1, {key: 2}]
    assert repr(treespec) == "PyTreeSpec([*, {<a>: *}])"


class SpecKey:
    """A key that takes its hash and representation from a structure."""

    treespec: Any = None

    def __hash__(self) -> int:
        return hash(self.treespec)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return repr(self.treespec)


def test_a_structure_inside_its_own_key() -> None:
    key = SpecKey()
    treespec = structure({key: 1})
    key.treespec = treespec
    assert hash(treespec) == hash(treespec)
    assert repr(treespec) == "PyTreeSpec({...: *})"
    inner, outer = SpecKey(), SpecKey()
    a, b = structure({inner: 1}), structure({outer: 1})
    inner.treespec, outer.treespec = b, a
    assert hash(a) == hash(b)
    assert repr(a) == "PyTreeSpec({PyTreeSpec({...: *}): *})"


def test_hash_of_unhashable_metadata() -> None:
    treespec = structure(Mapping2({"b": 1}), namespace=NAMESPACE)
    assert isinstance(hash(treespec), int)
    assert hash(treespec) == hash(structure(Mapping2({"b": 5}), namespace=NAMESPACE))


# prefixes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('left', 'right', 'prefix', 'strict'),
    [
        (1, 1, True, False),
        (1, [1], True, True),
        (1, None, True, True),
        (None, 1, False, False),
        ([1], 1, False, False),
        ([1, 2], [1, [2]], True, True),
        ([1, [2]], [1, 2], False, False),
        ([1, 2], [1], False, False),
        ([1], (1,), False, False),
        (deque([1], maxlen=3), deque([1]), True, False),
        ({'a': 1, 'b': 2}, OrderedDict([('b', [1]), ('a', 2)]), True, True),
        ({'a': 1, 'b': 2}, OrderedDict([('b', 1), ('a', 2)]), True, False),
        (defaultdict(int, a=1), {'a': 1}, True, False),
        ({'a': 1}, {'b': 1}, False, False),
        ({'a': 1}, {'a': 1, 'b': 2}, False, False),
        ({'z': {'y': 1, 'x': [2]}, 'a': 3},
         OrderedDict([('z', OrderedDict([('y', (0,)), ('x', [2])])), ('a', 3)]), True, True),
        (Point(1, 2), Point3(1, 2), False, False),
        (Point(1, 2), Point(1, (2,)), True, True),
        (Pair(1, 2), Pair(1, [2]), True, True),
        (Ring(1), Ring(1, 2), False, False),
        ([], [], True, False),
    ],
)  # fmt: skip
def test_prefix(left: Any, right: Any, prefix: bool, strict: bool) -> None:
    a, b = structure(left, namespace=NAMESPACE), structure(right, namespace=NAMESPACE)
    assert a.is_prefix(b) is (a <= b) is b.is_suffix(a) is (b >= a) is prefix
    assert (
        a.is_prefix(b, strict=True) is (a < b) is b.is_suffix(a, strict=True) is (b > a) is strict
    )
    assert optree.treespec_is_prefix(a, b) is prefix
    assert optree.treespec_is_prefix(a, b, strict=True) is strict
    assert optree.treespec_is_suffix(b, a) is prefix
    assert optree.treespec_is_suffix(b, a, strict=True) is strict


def test_prefix_needs_equal_none_modes_and_structures() -> None:
    assert not structure([1]).is_prefix(structure([1], none_is_leaf=True))
    with pytest.raises(TypeError, match="expected an optree.PyTreeSpec, got"):
        structure([1]).is_prefix([1])
    with pytest.raises(TypeError, match="takes at most 1 positional argument but 2"):
        structure([1]).is_prefix(structure([1]), True)  # type: ignore[misc]


# broadcast, compose, transform --------------------------------------------------------------------

BROADCAST_ERRORS: list[tuple[Any, Any, str]] = [
    (None, [1], 'PyTreeSpecs have incompatible node types; expected type: NoneType, got: list.'),
    ([1], None, 'PyTreeSpecs have incompatible node types; expected type: list, got: NoneType.'),
    ([1], (1,), 'PyTreeSpecs have incompatible node types; expected type: list, got: tuple.'),
    ({'a': 1}, [1], 'PyTreeSpecs have incompatible node types; expected type: dict, got: list.'),
    (defaultdict(int, a=1), [1],
     'PyTreeSpecs have incompatible node types; expected type: defaultdict, got: list.'),
    ((1, 2), Point(1, 2),
     f'PyTreeSpecs have incompatible node types; expected type: tuple, got: {Point!r}.'),
    (Point(1, 2), (1, 2),
     f'PyTreeSpecs have incompatible node types; expected type: {Point!r}, got: tuple.'),
    (time.gmtime(0), [1],
     f'PyTreeSpecs have incompatible node types; expected type: {time.struct_time!r}, got: list.'),
    (Point(1, 2), Point3(1, 2),
     f'namedtuple type mismatch; expected type: {Point!r}, got type: {Point3!r}.'),
    (deque([1]), deque([1, 2]), 'deque arity mismatch; expected: 1, got: 2.'),
    ((1,), (), 'tuple arity mismatch; expected: 1, got: 0.'),
    ([1], [1, 2], 'list arity mismatch; expected: 1, got: 2.'),
    ({'a': 1}, {'b': 1}, "dictionary key mismatch; expected key(s): ['a'], got key(s): ['b'], "
     "missing key(s): ['a'], extra key(s): ['b']."),
    ({'a': 1}, OrderedDict(a=1, b=2), "dictionary key mismatch; expected key(s): ['a'], got "
     "key(s): ['a', 'b'], extra key(s): ['b']."),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "message"), BROADCAST_ERRORS)
def test_broadcast_errors(left: Any, right: Any, message: str) -> None:
    a, b = structure(left), structure(right)
    before = repr(a), repr(b)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        a.broadcast_to_common_suffix(b)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        structure([left, 0]).broadcast_to_common_suffix(structure([right, [1]]))
    assert (repr(a), repr(b)) == before


def test_broadcast_to_common_suffix() -> None:
    a = structure([0, {"b": 0, "a": (0, 0)}])
    b = structure([[0, 0], OrderedDict([("b", [0]), ("a", 0)])])
    common = a.broadcast_to_common_suffix(b)
    assert repr(common) == "PyTreeSpec([[*, *], {'a': (*, *), 'b': [*]}])"
    assert list(common.unflatten(range(5))[1]) == ["b", "a"]
    other = b.broadcast_to_common_suffix(a)
    assert repr(other) == "PyTreeSpec([[*, *], OrderedDict({'b': [*], 'a': (*, *)})])"
    assert LEAF.broadcast_to_common_suffix(a) == a
    assert structure([0, None]).broadcast_to_common_suffix(structure([0, None])) == structure(
        [0, None]
    )


def test_merging_checks_modes_and_namespaces() -> None:
    a, b = structure([1]), structure([1], none_is_leaf=True)
    pair_a, pair_b = structure(Pair(1, 2), namespace="a"), structure(Pair(1, 2), namespace="b")
    for merge in ("broadcast_to_common_suffix", "compose"):
        with pytest.raises(
            ValueError, match=r"^PyTreeSpecs must have the same none_is_leaf value\.$"
        ):
            getattr(a, merge)(b)
        with pytest.raises(
            ValueError, match=r"^PyTreeSpecs must have the same namespace, got 'a' vs\. 'b'\.$"
        ):
            getattr(pair_a, merge)(pair_b)
        with pytest.raises(TypeError, match="expected an optree.PyTreeSpec, got"):
            getattr(a, merge)([1])
    assert structure([1]).compose(pair_a).namespace == "a"
    assert pair_a.compose(structure([1])).namespace == "a"


def test_merging_refuses_to_rebind_custom_types() -> None:
    # ``Pair`` has another registration in the namespace 'pairs' than in the global namespace.
    wide = structure([Pair(1, 2), 0])
    narrow = structure([0, Pair(1, 2)], namespace="pairs")
    assert narrow.namespace == "pairs"
    for action in (
        lambda: wide.broadcast_to_common_suffix(narrow),
        lambda: narrow.broadcast_to_common_suffix(wide),
        lambda: wide.compose(narrow),
        lambda: narrow.compose(wide),
        lambda: optree.treespec_list([wide, narrow]),
        lambda: optree.treespec_from_collection(Pair(structure(0), narrow)),
        lambda: narrow.transform(None, lambda leaf: structure(Pair(1, 2))),
        lambda: wide.transform(None, lambda leaf: structure(Pair(1, 2), namespace="pairs")),
    ):
        with pytest.raises(
            ValueError,
            match=r"^PyTreeSpecs cannot be (merged|transformed|composed into a collection): custom "
            r"PyTree type <class '.*Pair'> no longer resolves to its original registration in "
            r"namespace 'pairs'\.$",
        ):
            action()
    assert optree.treespec_list([wide], namespace="pairs").namespace == ""


def test_merging_refuses_custom_nodes_of_different_classes() -> None:
    pair, ring = structure(Pair(1, 2)), structure(Ring(1, 2), namespace=NAMESPACE)
    expected = "expected type: <class '.*Pair'>, got type: <class '.*Ring'>"
    with pytest.raises(ValueError, match=rf"^Custom node type mismatch; {expected}\.$"):
        pair.broadcast_to_common_suffix(ring)


@pytest.mark.parametrize("many", ["leaves", "nodes", "slots"])
def test_a_composition_that_is_too_large_is_refused_before_it_is_built(many: str) -> None:
    class Node:
        pass

    width = 2**15 if many == "slots" else 2**16
    optree.register_pytree_node(Node, lambda _: ((), None), lambda *_: Node(), namespace="wide")
    inner: list[Any] = {
        "leaves": [0] * width,
        "nodes": [()] * width,
        "slots": [Node()] * (width * 3 // 2),  # three for each node
    }[many]
    outer = structure([0] * width)
    with pytest.raises(OverflowError, match="at most 4294967294 leaves and as many nodes"):
        outer.compose(structure(inner, namespace="wide"))
    optree.unregister_pytree_node(Node, namespace="wide")


def test_compose() -> None:
    outer, inner = structure({"b": 0, "a": None}), structure([0, (0,)])
    assert repr(outer.compose(inner)) == "PyTreeSpec({'a': None, 'b': [*, (*,)]})"
    assert outer.compose(LEAF) == outer
    assert LEAF.compose(inner) == inner
    assert structure([]).compose(inner) == structure([])
    assert structure([0, 0]).compose(structure([])) == structure([[], []])


def test_transform() -> None:
    treespec = structure({"b": [1, None], "a": (2,)})
    copied = treespec.transform()
    assert copied == treespec
    assert copied is not treespec
    visited: list[str] = []

    def f_node(node: Any) -> Any:
        visited.append(str(node))
        if node.type is list:
            return optree.treespec_tuple(node.children())
        return node

    def f_leaf(leaf: Any) -> Any:
        visited.append(str(leaf))
        return structure({"z": 0})

    result = optree.treespec_transform(treespec, f_node, f_leaf)
    assert repr(result) == "PyTreeSpec({'a': ({'z': *},), 'b': ({'z': *}, None)})"
    assert visited == [
        'PyTreeSpec(*)', 'PyTreeSpec((*,))', 'PyTreeSpec(*)', 'PyTreeSpec(None)',
        'PyTreeSpec([*, *])', "PyTreeSpec({'a': *, 'b': *})",
    ]  # fmt: skip
    assert list(result.unflatten([1, 2])) == ["b", "a"]


def test_transform_errors() -> None:
    treespec = structure([1])
    start = "Expected the PyTreeSpec transform function returns a"
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (lambda n: 3, None, TypeError,
         f'{start} PyTreeSpec, got 3 (input: PyTreeSpec([*])).'),
        (lambda n: structure([1, 2]), None, ValueError,
         f'{start} PyTreeSpec with the same number of arity as the input (1), got '
         'PyTreeSpec([*, *]) (input: PyTreeSpec([*])).'),
        (lambda n: structure([[1]]), None, ValueError,
         f'{start} PyTreeSpec'.replace('returns a', 'returns a one-level')
         + ' as the input, got PyTreeSpec([[*]]) (input: PyTreeSpec([*])).'),
        (lambda n: structure([1], none_is_leaf=True), None, ValueError,
         f'{start} PyTreeSpec with the same value of `none_is_leaf=False` as the input, got '
         'PyTreeSpec([*], NoneIsLeaf) (input: PyTreeSpec([*])).'),
        (None, lambda n: None, TypeError,
         f'{start} PyTreeSpec, got None (input: PyTreeSpec(*)).'),
    ]  # fmt: skip
    for f_node, f_leaf, error, message in cases:
        with pytest.raises(error) as info:
            treespec.transform(f_node, f_leaf)
        assert str(info.value).startswith(message)
    in_a = structure(Pair(1, 2), namespace="a")
    with pytest.raises(ValueError, match=re.escape(
        f"{start} PyTreeSpec with namespace 'a', got 'b'."
    )):  # fmt: skip
        in_a.transform(None, lambda leaf: structure(Pair(1, 2), namespace="b"))
    for error in (LookupError, StopIteration):

        def raising(node: Any, error: Any = error) -> Any:
            raise error("mine")

        with pytest.raises(error, match="^mine$"):
            treespec.transform(raising)
        with pytest.raises(error, match="^mine$"):
            treespec.transform(None, raising)
    with pytest.raises(TypeError, match="'f_node', got 3"):
        treespec.transform(3)


def test_custom_entries_survive() -> None:
    treespec = structure(Box("p+q", p=1, q=2), namespace=NAMESPACE)
    for derived in (
        treespec.transform(),
        treespec.transform(lambda n: n, lambda n: n),
        treespec.compose(LEAF),
        treespec.broadcast_to_common_suffix(LEAF),
        LEAF.broadcast_to_common_suffix(treespec),
        LEAF.compose(treespec),
        treespec.one_level(),
        optree.treespec_list([treespec]).child(0),
        copy.copy(treespec),
        copy.deepcopy(treespec),
        optree.treespec_from_collection(Box("p+q", p=LEAF, q=LEAF), namespace=NAMESPACE),
    ):
        assert derived.entries() == ["p", "q"]
        assert derived.paths() == [("p",), ("q",)]
        assert derived.unflatten([1, 2]) == Box("p+q", p=1, q=2)


# repr ---------------------------------------------------------------------------------------------


def test_repr_of_structures() -> None:
    cases: list[tuple[Any, str]] = [
        (1, '*'),
        ((1,), '(*,)'),
        ({1: 1, 'a': [None]}, "{1: *, 'a': [None]}"),
        (OrderedDict(), 'OrderedDict()'),
        (defaultdict(None), 'defaultdict(None, {})'),
        (defaultdict(list, a=1), "defaultdict(<class 'list'>, {'a': *})"),
        (deque(maxlen=0), 'deque(maxlen=0)'),
        (deque([1], maxlen=2), 'deque([*], maxlen=2)'),
        (os.stat_result(range(10)), 'os.stat_result(st_mode=*, st_ino=*, st_dev=*, st_nlink=*, '
         'st_uid=*, st_gid=*, st_size=*, <unnamed@7>=*, <unnamed@8>=*, <unnamed@9>=*)'),
        (Pair(None, 1), 'CustomTreeNode(Pair[None], [None, *])'),
    ]  # fmt: skip
    for tree, body in cases:
        treespec = structure(tree)
        assert repr(treespec) == str(treespec) == f"PyTreeSpec({body})"
    assert repr(structure([Ring()], none_is_leaf=True, namespace=NAMESPACE)) == (
        "PyTreeSpec([CustomTreeNode(Ring[0], [])], NoneIsLeaf, namespace='trees')"
    )


def test_repr_reads_the_fields_of_a_namedtuple_when_asked() -> None:
    cls = namedtuple("cls", ["x", "y"])
    treespec = structure(cls(1, 2))
    cls._fields = ("p", "q")  # type: ignore[assignment]
    assert repr(treespec) == "PyTreeSpec(cls(p=*, q=*))"
    cls._fields = ("p",)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="does not match the arity"):
        repr(treespec)


@pytest.mark.parametrize("fields", [(10**30, [0] * 10), (b"x", "y"), (1.5, None), ["x", "y"], 3])
def test_fields_of_a_namedtuple_that_are_not_names_raise(fields: Any) -> None:
    cls = namedtuple("cls", ["x", "y"])
    treespec = structure([cls(1, [2])])
    cls._fields = fields
    with pytest.raises(TypeError, match=r"^Expected a collections\.namedtuple type, got "):
        repr(treespec)
    with pytest.raises(TypeError, match=r"^Expected a collections\.namedtuple type, got "):
        optree.namedtuple_fields(cls)
    # The place of the mismatch cannot be named.
    with pytest.raises(ValueError, match=r"^Expected an instance of list, got 3\.") as caught:
        treespec.flatten_up_to([cls(1, 3)])
    assert not getattr(caught.value, "__notes__", [])


def test_exception_of_the_metadata_repr_propagates() -> None:
    class Meta:
        def __repr__(self) -> str:
            raise LookupError("meta repr")

    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((), Meta()), lambda m, c: Node(), namespace="meta repr"
    )
    try:
        treespec = structure([Node()], namespace="meta repr")
    finally:
        optree.unregister_pytree_node(Node, namespace="meta repr")
    for _ in range(2):
        with pytest.raises(LookupError, match="^meta repr$"):
            repr(treespec)


# constructors -------------------------------------------------------------------------------------


def test_constructors() -> None:
    one, two = structure([0]), structure((0, 0))
    cases = [
        (optree.treespec_leaf(), 1),
        (optree.treespec_none(), None),
        (optree.treespec_tuple([one, two]), ([0], (0, 0))),
        (optree.treespec_tuple(), ()),
        (optree.treespec_list(iter([one])), [[0]]),
        (optree.treespec_dict({"b": one, "a": two}), {"b": [0], "a": (0, 0)}),
        (optree.treespec_dict([("b", one)], a=two), {"b": [0], "a": (0, 0)}),
        (optree.treespec_dict(), {}),
        (optree.treespec_ordereddict({"b": one, "a": two}), OrderedDict(b=[0], a=(0, 0))),
        (optree.treespec_ordereddict(b=one), OrderedDict(b=[0])),
        (optree.treespec_defaultdict(int, {"b": one}, a=two), defaultdict(int, b=[0], a=(0, 0))),
        (optree.treespec_defaultdict(), defaultdict(None)),
        (optree.treespec_deque([one], maxlen=3), deque([[0]], maxlen=3)),
        (optree.treespec_deque([one], 2), deque([[0]], maxlen=2)),
        (optree.treespec_deque(), deque()),
        (optree.treespec_namedtuple(Point(one, two)), Point([0], (0, 0))),
        (optree.treespec_structseq(time.struct_time([one] * 9)), time.struct_time([[0]] * 9)),
        (optree.treespec_from_collection([one, two]), [[0], (0, 0)]),
        (optree.treespec_from_collection({"a": one}), {"a": [0]}),
        (optree.treespec_from_collection(None), None),
        (optree.treespec_from_collection(Pair(one, two)), Pair([0], (0, 0))),
    ]
    for treespec, tree in cases:
        assert treespec == structure(tree)
        assert hash(treespec) == hash(structure(tree))
    assert optree.treespec_none(none_is_leaf=True) == optree.treespec_leaf(none_is_leaf=True)
    assert optree.treespec_leaf(namespace="x").namespace == ""
    assert optree.treespec_none(namespace="x").namespace == ""
    assert list(optree.treespec_dict({"b": one, "a": two}).unflatten("xyz")) == ["b", "a"]


def test_constructors_reject_other_objects() -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: optree.treespec_list([1]), 'Expected a(n) list of PyTreeSpec(s), got [1].'),
        (lambda: optree.treespec_tuple([1]), 'Expected a(n) tuple of PyTreeSpec(s), got (1,).'),
        (lambda: optree.treespec_dict(a=1), "Expected a(n) dict of PyTreeSpec(s), got {'a': 1}."),
        (lambda: optree.treespec_deque([1]), 'Expected a(n) deque of PyTreeSpec(s), got deque([1]).'),  # noqa: E501
        (lambda: optree.treespec_defaultdict(int, a=1),
         "Expected a(n) defaultdict of PyTreeSpec(s), got defaultdict(<class 'int'>, {'a': 1})."),
        (lambda: optree.treespec_ordereddict(a=1), 'Expected a(n) OrderedDict of PyTreeSpec(s), got '  # noqa: E501
         f'{OrderedDict(a=1)!r}.'),
        (lambda: optree.treespec_namedtuple([LEAF]),
         'Expected a namedtuple of PyTreeSpec(s), got [PyTreeSpec(*)].'),
        (lambda: optree.treespec_namedtuple(time.gmtime(0)),
         f'Expected a namedtuple of PyTreeSpec(s), got {time.gmtime(0)!r}.'),
        (lambda: optree.treespec_structseq(Point(1, 2)),
         'Expected a PyStructSequence of PyTreeSpec(s), got Point(x=1, y=2).'),
        (lambda: optree.treespec_from_collection(Point(1, 2)),
         f'Expected a(n) {Point!r} of PyTreeSpec(s), got Point(x=1, y=2).'),
        (lambda: optree.treespec_from_collection(Pair(1, 2)),
         f'Expected a(n) {Pair!r} of PyTreeSpec(s), got Pair(1, 2).'),
        (lambda: optree.treespec_list([structure(1, none_is_leaf=True)]),
         'Expected treespec(s) with `none_is_leaf=False`.'),
        (lambda: optree.treespec_list([structure(1)], none_is_leaf=True),
         'Expected treespec(s) with `none_is_leaf=True`.'),
        (lambda: optree.treespec_list([structure(Pair(1, 2), namespace='a'),
                                       structure(Pair(1, 2), namespace='b')]),
         "Expected treespecs with the same namespace, got 'a' vs. 'b'."),
        (lambda: optree.treespec_list([structure(Pair(1, 2), namespace='y')], namespace='x'),
         "Expected treespec(s) with namespace 'x', got 'y'."),
    ]  # fmt: skip
    for make, message in cases:
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            make()


def test_from_collection_on_a_leaf_warns() -> None:
    message = r"^PyTreeSpec::MakeFromCollection\(\) is called on a leaf\.$"
    with pytest.warns(UserWarning, match=message):
        assert optree.treespec_from_collection(1, namespace="x") == LEAF
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message):
            optree.treespec_from_collection(1)


def test_namespace_of_collections() -> None:
    inner = structure(Pair(1, 2), namespace="inner")
    assert optree.treespec_list([inner, LEAF]).namespace == "inner"
    assert optree.treespec_list([LEAF], namespace="any").namespace == ""
    assert optree.treespec_from_collection(Ring(LEAF), namespace=NAMESPACE).namespace == NAMESPACE
    with optree.dict_insertion_ordered(True, namespace="ordered"):
        assert optree.treespec_dict(b=LEAF, a=LEAF, namespace="ordered").namespace == "ordered"
        assert optree.treespec_dict(b=LEAF, a=LEAF, namespace="ordered").entries() == ["b", "a"]
        assert optree.treespec_list([LEAF], namespace="ordered").namespace == ""
        assert optree.treespec_none(namespace="ordered").namespace == ""
    assert optree.treespec_dict(b=LEAF, a=LEAF).entries() == ["a", "b"]


@pytest.mark.skipif(optree._C.OPTREE_HAS_FROZENDICT, reason="this Python has frozendict")
def test_frozendict_needs_a_python_with_frozendict() -> None:
    message = "`optree.treespec_frozendict` requires Python 3.15+ with `frozendict` support."
    for make in (
        lambda: optree.treespec_frozendict(),
        lambda: optree.treespec_frozendict({"a": LEAF}),
        lambda: optree.treespec_frozendict(a=LEAF),
        lambda: optree.treespec_frozendict(1),
    ):
        with pytest.raises(RuntimeError, match="^" + re.escape(message) + "$"):
            make()


def test_functions_that_query_a_spec_call_its_methods() -> None:
    treespec = structure({"b": (2, [3]), "a": Point(1, None)})
    for ask, answer in (
        (optree.treespec_paths, [("a", 0), ("b", 0), ("b", 1, 0)]),
        (optree.treespec_accessors, treespec.accessors()),
        (optree.treespec_entries, ["a", "b"]),
        (optree.treespec_children, [structure(Point(1, None)), structure((2, [3]))]),
    ):
        assert ask(treespec) == answer
    tree = treespec.unflatten("lmn")
    assert [find(tree) for find in optree.treespec_accessors(treespec)] == ["l", "m", "n"]


def test_short_names() -> None:
    names = [
        'leaf', 'none', 'tuple', 'list', 'dict', 'namedtuple', 'ordereddict', 'defaultdict',
        'deque', 'structseq', 'frozendict', 'from_collection',
    ]  # fmt: skip
    assert list(optree.treespec.__all__) == names
    for name in names:
        assert getattr(optree.treespec, name) is getattr(optree, f"treespec_{name}")
    rest = [n[len("treespec_") :] for n in optree.__all__ if n.startswith("treespec_")]
    assert [n for n in rest if n in names] == names


def test_self_reference_through_metadata_is_collected() -> None:
    class Meta:
        treespec: Any = None

    class Node:
        meta = Meta()

    optree.register_pytree_node(
        Node, lambda n: ((1,), n.meta), lambda m, c: Node(), namespace="cycle"
    )
    try:
        node = Node()
        node.meta = meta = Meta()
        meta.treespec = structure(node, namespace="cycle")
    finally:
        optree.unregister_pytree_node(Node, namespace="cycle")
    watched = weakref.ref(meta)
    del meta, node
    gc.collect()
    assert watched() is None


# which error is reported --------------------------------------------------------------------------


def test_transform_compares_leaf_counts_before_it_asks_for_one_level() -> None:
    start = "^Expected the PyTreeSpec transform function returns a "
    one_level = start + r"one-level PyTreeSpec as the input, got "
    for treespec, result in [
        (structure([1]), LEAF),
        (structure([1]), structure([[1]])),
        (structure([]), structure([[]])),
        (structure([]), structure([(), {}])),
    ]:
        with pytest.raises(ValueError, match=one_level):
            treespec.transform(lambda node, result=result: result)
    for treespec, result in [
        (structure([]), LEAF),
        (structure([]), structure([[], 1])),
        (structure([1, 2]), structure([[1]])),
    ]:
        arity = (
            start + rf"PyTreeSpec with the same number of arity as the input \({len(treespec)}\), "
        )
        with pytest.raises(ValueError, match=arity):
            treespec.transform(lambda node, result=result: result)


def test_expected_keys_are_named_in_the_order_of_the_structure() -> None:
    start = "^dictionary key mismatch; expected key\\(s\\): \\['b', 'a'\\], got key\\(s\\): \\['a', 'c'\\]"  # noqa: E501
    ordered = structure(OrderedDict(b=1, a=2))
    with optree.dict_insertion_ordered(True, namespace="named"):
        inserted = structure({"b": 1, "a": 2}, namespace="named")
    for treespec in (ordered, inserted):
        with pytest.raises(ValueError, match=start):
            treespec.flatten_up_to({"c": 1, "a": 2})
        with pytest.raises(ValueError, match=start):
            treespec.broadcast_to_common_suffix(structure({"c": 1, "a": 2}))


def test_broadcast_asks_for_arity_before_metadata_and_flatten_up_to_after() -> None:
    class Node:
        def __init__(self, count: int, metadata: str) -> None:
            self.count, self.metadata = count, metadata

    optree.register_pytree_node(
        Node, lambda n: (range(n.count), n.metadata), lambda m, c: None, namespace="both"
    )
    try:
        treespec = structure(Node(1, "m"), namespace="both")
        with pytest.raises(ValueError, match=r"^Custom type arity mismatch; expected: 1, got: 0\."):
            treespec.broadcast_to_common_suffix(structure(Node(0, "n"), namespace="both"))
        with pytest.raises(
            ValueError, match=r"^Mismatch custom node data; expected: 'm', got: 'n'\."
        ):
            treespec.broadcast_to_common_suffix(structure(Node(1, "n"), namespace="both"))
        with pytest.raises(ValueError, match='^Mismatch custom node data; expected: m, got: n; value: '  # noqa: E501
                           "|^Mismatch custom node data; expected: 'm', got: 'n'; value: "):  # fmt: skip  # noqa: E501
            treespec.flatten_up_to(Node(0, "n"))
    finally:
        optree.unregister_pytree_node(Node, namespace="both")


def test_broadcast_reports_the_rightmost_mismatch() -> None:
    a, b = structure([[1], (2,)]), structure([(1,), [2]])
    with pytest.raises(ValueError, match=r"expected type: tuple, got: list\."):
        a.broadcast_to_common_suffix(b)
    with pytest.raises(ValueError, match=r"expected type: list, got: tuple\."):
        b.broadcast_to_common_suffix(a)


def test_structures_made_apart_are_compared_by_their_keys() -> None:
    keys = [f"key{i}" for i in range(50)]

    def structure(names: list[str]) -> Any:
        # New string objects, so that no cache knows the keys.
        return optree.tree_structure({"".join(list(name)): 0 for name in names})

    alike = [structure(keys), structure(keys), structure(keys[::-1]), structure(keys)]
    other = structure([*keys[:-1], "other"])
    # The result of the first comparison is cached; later comparisons must give the same.
    for _ in range(3):
        for one in alike:
            assert all(one == two and hash(one) == hash(two) for two in alike)
            assert one != other
            assert other != one
    with optree.dict_insertion_ordered(True, namespace="apart"):
        forward, backward = (
            optree.tree_structure(dict.fromkeys(order, 0), namespace="apart")
            for order in (keys, keys[::-1])
        )
    for _ in range(2):
        assert forward != backward
