# SPDX-License-Identifier: Apache-2.0
"""Paths, path entries and accessors."""

from __future__ import annotations

import copy
import dataclasses
import operator
import os
import pickle
import re
import time
import types
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees import NAMESPACE, Box, Mapping2, Module, Pair, Point, Ring

import optree
from optree import (
    AutoEntry,
    DataclassEntry,
    FlattenedEntry,
    GetAttrEntry,
    GetItemEntry,
    MappingEntry,
    NamedTupleEntry,
    PyTreeAccessor,
    PyTreeEntry,
    SequenceEntry,
    StructSequenceEntry,
)

KIND = optree.PyTreeKind

ENTRY_CLASSES = [
    PyTreeEntry, GetItemEntry, GetAttrEntry, FlattenedEntry, SequenceEntry, MappingEntry,
    NamedTupleEntry, StructSequenceEntry, DataclassEntry,
]  # fmt: skip


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = 2
    c: Any = dataclasses.field(default=3, init=False)


EXAMPLES = [
    PyTreeEntry(1, Pair, KIND.CUSTOM),
    GetItemEntry("k", Pair, KIND.CUSTOM),
    GetAttrEntry("a.b", Pair, KIND.CUSTOM),
    FlattenedEntry(0, Pair, KIND.CUSTOM),
    SequenceEntry(0, list, KIND.LIST),
    MappingEntry("k", dict, KIND.DICT),
    NamedTupleEntry(1, Point, KIND.NAMEDTUPLE),
    StructSequenceEntry(0, time.struct_time, KIND.STRUCTSEQUENCE),
    DataclassEntry("a", Plain, KIND.CUSTOM),
]
every_example = pytest.mark.parametrize(
    "entry", EXAMPLES, ids=[type(entry).__name__ for entry in EXAMPLES]
)


def test_entry_classes_of_each_kind() -> None:
    def only(tree: Any, namespace: str = "") -> PyTreeEntry:
        return optree.tree_accessors(tree, namespace=namespace)[0][0]

    expected = [
        (only((1,)), SequenceEntry, 0, tuple, KIND.TUPLE),
        (only([1]), SequenceEntry, 0, list, KIND.LIST),
        (only(deque([1])), SequenceEntry, 0, deque, KIND.DEQUE),
        (only({"a": 1}), MappingEntry, "a", dict, KIND.DICT),
        (only(OrderedDict(a=1)), MappingEntry, "a", OrderedDict, KIND.ORDEREDDICT),
        (only(defaultdict(int, a=1)), MappingEntry, "a", defaultdict, KIND.DEFAULTDICT),
        (only(Point(1, 2)), NamedTupleEntry, 0, Point, KIND.NAMEDTUPLE),
        (only(time.gmtime(0)), StructSequenceEntry, 0, time.struct_time, KIND.STRUCTSEQUENCE),
        (only(Pair(1, 2)), FlattenedEntry, 0, Pair, KIND.CUSTOM),
        (only(Box("p", p=1), NAMESPACE), GetAttrEntry, "p", Box, KIND.CUSTOM),
        (only(Ring(1), NAMESPACE), SequenceEntry, 0, Ring, KIND.CUSTOM),
        (only(Mapping2(k=1), NAMESPACE), MappingEntry, "k", Mapping2, KIND.CUSTOM),
        (only(Module(1, 2), NAMESPACE), DataclassEntry, "weight", Module, KIND.CUSTOM),
    ]
    for entry, cls, key, node_type, kind in expected:
        assert type(entry) is cls
        assert entry.entry == key
        assert entry.type is node_type
        assert entry.kind is kind


@every_example
def test_entries_are_frozen_and_slotted(entry: PyTreeEntry) -> None:
    for name in ("entry", "type", "kind"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(entry, name, 1)
    # CPython 3.11 answers TypeError for unknown names on frozen slotted dataclasses.
    with pytest.raises((AttributeError, TypeError)):
        entry.brand_new = 1  # type: ignore[attr-defined]
    assert not hasattr(entry, "__dict__")
    assert type(entry).__module__ == "optree"
    assert getattr(optree._C, type(entry).__name__) is type(entry)
    assert getattr(optree.accessors, type(entry).__name__) is type(entry)
    assert getattr(optree.typing, type(entry).__name__) is type(entry)


@every_example
def test_entries_survive_pickle_and_copy(entry: PyTreeEntry) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(entry, protocol))
        assert loaded == entry
        assert type(loaded) is type(entry)
        assert hash(loaded) == hash(entry)
    for copied in (copy.copy(entry), copy.deepcopy(entry)):
        assert copied == entry
        assert type(copied) is type(entry)


class MyAutoEntry(AutoEntry):
    """A subclass of the class that otherwise picks another one."""


def test_a_subclass_of_the_automatic_entry_survives_pickle_and_copy() -> None:
    entry = MyAutoEntry("a", Box, KIND.CUSTOM)
    copies = [pickle.loads(pickle.dumps(entry, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for copied in (*copies, copy.copy(entry), copy.deepcopy(entry)):
        assert copied == entry
        assert type(copied) is MyAutoEntry


@every_example
def test_entry_equality(entry: PyTreeEntry) -> None:
    cls = type(entry)
    assert entry == cls(entry.entry, entry.type, entry.kind)
    assert entry != cls(entry.entry, Box, KIND.CUSTOM)
    assert entry != entry.entry
    assert (entry == object()) is False
    subclass = type("Renamed", (cls,), {"__slots__": ()})
    twin = subclass(entry.entry, entry.type, entry.kind)
    assert twin == entry
    assert hash(twin) == hash(entry)
    called = type("Called", (cls,), {"__slots__": (), "__call__": lambda self, obj: obj})
    assert called(entry.entry, entry.type, entry.kind) != entry


def test_entries_of_different_classes_differ() -> None:
    entries = [cls(0, Point, KIND.CUSTOM) for cls in ENTRY_CLASSES if cls is not GetAttrEntry]
    for i, a in enumerate(entries):
        for j, b in enumerate(entries):
            same_functions = (
                type(a).__call__ is type(b).__call__ and type(a).codify is type(b).codify
            )
            assert (a == b) is (i == j or same_functions)
    assert SequenceEntry(0, list, KIND.LIST) != GetItemEntry(0, list, KIND.LIST)
    assert MappingEntry(0, dict, KIND.DICT) != GetItemEntry(0, dict, KIND.DICT)


@pytest.mark.parametrize("cls", [*ENTRY_CLASSES, AutoEntry])
def test_entries_for_leaves_and_none_cannot_be_made(cls: Any) -> None:
    if cls is AutoEntry:
        message = "^Cannot create an automatic path entry for PyTreeKind "
        for kind in (KIND.LEAF, KIND.NONE, KIND.LIST):
            with pytest.raises(ValueError, match=message):
                cls(0, int, kind)
        return
    with pytest.raises(ValueError, match=r"^Cannot create a leaf path entry\.$"):
        cls(0, int, KIND.LEAF)
    with pytest.raises(ValueError, match=r"^Cannot create a path entry for None\.$"):
        cls(0, type(None), KIND.NONE)


def test_codify_and_repr() -> None:
    cases = [
        (PyTreeEntry(1, Pair, KIND.CUSTOM), 'x[<flat index 1>]', f'PyTreeEntry(entry=1, type={Pair!r})'),  # noqa: E501
        (GetItemEntry('k', dict, KIND.CUSTOM), "x['k']", f"GetItemEntry(entry='k', type={dict!r})"),
        (FlattenedEntry(2, Pair, KIND.CUSTOM), 'x[<flat index 2>]',
         f'FlattenedEntry(entry=2, type={Pair!r})'),
        (GetAttrEntry('a.b', Pair, KIND.CUSTOM), 'x.a.b', f"GetAttrEntry(entry='a.b', type={Pair!r})"),  # noqa: E501
        (GetAttrEntry('x y', Pair, KIND.CUSTOM), "getattr(x, 'x y')", None),
        (SequenceEntry(3, list, KIND.LIST), 'x[3]', f'SequenceEntry(index=3, type={list!r})'),
        (MappingEntry('k', dict, KIND.DICT), "x['k']", f"MappingEntry(key='k', type={dict!r})"),
        (NamedTupleEntry(1, Point, KIND.NAMEDTUPLE), 'x.y', f"NamedTupleEntry(field='y', type={Point!r})"),  # noqa: E501
        (StructSequenceEntry(1, time.struct_time, KIND.STRUCTSEQUENCE), 'x.tm_mon',
         f"StructSequenceEntry(field='tm_mon', type={time.struct_time!r})"),
        (StructSequenceEntry(7, os.stat_result, KIND.STRUCTSEQUENCE), 'x[7]',
         f'StructSequenceEntry(entry=7, type={os.stat_result!r})'),
        (DataclassEntry('b', Plain, KIND.CUSTOM), 'x.b', f"DataclassEntry(field='b', type={Plain!r})"),  # noqa: E501
    ]  # fmt: skip
    for entry, code, text in cases:
        assert entry.codify("x") == code
        assert entry.codify().lstrip("getattr(") == code.replace("x", "", 1).lstrip("getattr(")  # noqa: B005
        if text is not None:
            assert repr(entry) == text


def test_extra_attributes() -> None:
    assert SequenceEntry(3, list, KIND.LIST).index == 3
    assert MappingEntry("k", dict, KIND.DICT).key == "k"
    assert GetAttrEntry("n", Pair, KIND.CUSTOM).name == "n"
    named = NamedTupleEntry(1, Point, KIND.NAMEDTUPLE)
    assert (named.fields, named.field, named.index) == (("x", "y"), "y", 1)
    struct = StructSequenceEntry(0, os.stat_result, KIND.STRUCTSEQUENCE)
    assert struct.field == "st_mode"
    assert not struct.is_unnamed
    assert StructSequenceEntry(8, os.stat_result, KIND.STRUCTSEQUENCE).is_unnamed
    data = DataclassEntry("b", Plain, KIND.CUSTOM)
    assert (data.fields, data.init_fields) == (("a", "b", "c"), ("a", "b"))
    assert (data.field, data.name) == ("b", "b")
    assert DataclassEntry(1, Plain, KIND.CUSTOM).field == "b"


def test_calls() -> None:
    assert SequenceEntry(1, list, KIND.LIST)([5, 6]) == 6
    assert MappingEntry("k", dict, KIND.DICT)({"k": 1}) == 1
    assert GetItemEntry("k", dict, KIND.CUSTOM)({"k": 1}) == 1
    assert NamedTupleEntry(1, Point, KIND.NAMEDTUPLE)(Point(1, 2)) == 2
    assert (
        StructSequenceEntry(8, os.stat_result, KIND.STRUCTSEQUENCE)(os.stat_result(range(10))) == 8
    )
    assert DataclassEntry("a", Plain, KIND.CUSTOM)(Plain(5)) == 5
    assert DataclassEntry(1, Plain, KIND.CUSTOM)(Plain(5)) == 2
    assert GetAttrEntry("left.right", Pair, KIND.CUSTOM)(Pair(Pair(1, 2), 3)) == 2
    with pytest.raises(KeyError):
        MappingEntry("z", dict, KIND.DICT)({})
    with pytest.raises(IndexError):
        SequenceEntry(1, list, KIND.LIST)([5])
    with pytest.raises(AttributeError):
        GetAttrEntry("z", Pair, KIND.CUSTOM)(Pair(1, 2))
    for cls in (PyTreeEntry, FlattenedEntry):
        message = f"{cls!r} cannot access through 5 via entry 0"
        with pytest.raises(TypeError, match="^" + re.escape(message) + "$") as info:
            cls(0, int, KIND.CUSTOM)(5)
        assert isinstance(info.value.__cause__, TypeError)


def test_automatic_entries_choose_by_type() -> None:
    class Seq(list):  # type: ignore[type-arg]
        pass

    cases = [
        (AutoEntry(0, time.struct_time, KIND.CUSTOM), StructSequenceEntry),
        (AutoEntry(0, Point, KIND.CUSTOM), NamedTupleEntry),
        (AutoEntry("a", Plain, KIND.CUSTOM), DataclassEntry),
        (AutoEntry("a", Mapping2, KIND.CUSTOM), MappingEntry),
        (AutoEntry(0, Seq, KIND.CUSTOM), SequenceEntry),
        (AutoEntry(0, Pair, KIND.CUSTOM), FlattenedEntry),
    ]
    for entry, cls in cases:
        assert type(entry) is cls

    class Mine(AutoEntry):
        pass

    assert type(Mine(0, Point, KIND.CUSTOM)) is Mine


def test_a_user_entry_class_is_called_for_each_edge() -> None:
    made: list[Any] = []

    class Recorded(GetItemEntry):
        def __init__(self, entry: Any, type: Any, kind: Any) -> None:
            made.append((entry, type, kind))
            super().__init__(entry, type, kind)

    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((1, (2, 3)), None), lambda m, c: c, path_entry_type=Recorded,
        namespace='recorded',
    )  # fmt: skip
    try:
        accessors = optree.tree_accessors(Node(), namespace="recorded")
    finally:
        optree.unregister_pytree_node(Node, namespace="recorded")
    assert sorted(made) == [(0, Node, KIND.CUSTOM), (1, Node, KIND.CUSTOM)]
    assert [type(accessor[0]) for accessor in accessors] == [Recorded] * 3
    assert [accessor.path for accessor in accessors] == [(0,), (1, 0), (1, 1)]


def test_exception_of_a_user_entry_class_propagates() -> None:
    class Failing(GetItemEntry):
        def __init__(self, *args: Any) -> None:
            raise LookupError("entry")

    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((1,), None), lambda m, c: c, path_entry_type=Failing, namespace="failing"
    )
    try:
        treespec = optree.tree_structure(Node(), namespace="failing")
        with pytest.raises(LookupError, match="^entry$"):
            treespec.accessors()
    finally:
        optree.unregister_pytree_node(Node, namespace="failing")


def test_call_may_be_any_callable_object() -> None:
    class First(PyTreeEntry):
        __call__ = operator.itemgetter(0)  # type: ignore[assignment]

    first = First("ignored", Pair, KIND.CUSTOM)
    assert isinstance(hash(first), int)
    assert first == First("ignored", Pair, KIND.CUSTOM)
    assert first != PyTreeEntry("ignored", Pair, KIND.CUSTOM)


# accessors ----------------------------------------------------------------------------------------


def test_accessor_repr_and_code() -> None:
    accessor = optree.tree_accessors({"b": [0]})[0]
    assert repr(accessor) == (
        "PyTreeAccessor(*['b'][0], (MappingEntry(key='b', type=<class 'dict'>), "
        "SequenceEntry(index=0, type=<class 'list'>)))"
    )
    assert accessor.codify() == "*['b'][0]"
    assert accessor.codify("tree") == "tree['b'][0]"
    assert PyTreeAccessor().codify() == "*"
    assert PyTreeAccessor().codify("root") == "root"
    spaced = PyTreeAccessor(
        (GetAttrEntry("x y", Pair, KIND.CUSTOM), SequenceEntry(0, list, KIND.LIST))
    )
    assert spaced.codify("n") == "getattr(n, 'x y')[0]"


def test_accessor_is_a_tuple_of_entries() -> None:
    accessor = optree.tree_accessors({"b": [0]})[0]
    assert isinstance(accessor, tuple)
    assert len(accessor) == 2
    assert accessor.path == ("b", 0)
    assert accessor[0] == MappingEntry("b", dict, KIND.DICT)
    assert accessor[-1] == SequenceEntry(0, list, KIND.LIST)
    assert type(accessor[:1]) is PyTreeAccessor
    assert accessor[:1].path == ("b",)
    assert accessor[::-1].path == (0, "b")
    assert accessor({"b": [7]}) == 7
    assert PyTreeAccessor()("root") == "root"
    assert type(accessor).__module__ == "optree"
    with pytest.raises(TypeError):
        accessor["b"]
    with pytest.raises(IndexError):
        accessor[2]


def test_accessor_arithmetic() -> None:
    a, b = MappingEntry("b", dict, KIND.DICT), SequenceEntry(0, list, KIND.LIST)
    for total in (a + b, PyTreeAccessor((a,)) + b, a + PyTreeAccessor((b,)),
                  PyTreeAccessor((a,)) + PyTreeAccessor((b,)), PyTreeAccessor([a, b])):  # fmt: skip
        assert type(total) is PyTreeAccessor
        assert total == PyTreeAccessor((a, b))
    assert PyTreeAccessor((a,)) * 2 == PyTreeAccessor((a, a)) == 2 * PyTreeAccessor((a,))
    assert type(PyTreeAccessor((a,)) * 0) is PyTreeAccessor
    assert type(2 * PyTreeAccessor((a,))) is PyTreeAccessor
    for left, right in [(a, 1), (a, (b,)), (PyTreeAccessor((a,)), (b,)), (PyTreeAccessor(), "x")]:
        with pytest.raises(TypeError):
            left + right
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \+"):
        a + 1


def test_accessor_equality_and_hash() -> None:
    accessor = optree.tree_accessors({"b": [0]})[0]
    plain = tuple(accessor)
    assert type(plain) is tuple
    assert accessor == PyTreeAccessor(plain)
    assert (accessor == plain) is False
    assert (plain == accessor) is False
    assert accessor != plain
    assert plain != accessor
    assert not (accessor != PyTreeAccessor(plain))  # noqa: SIM202
    assert hash(accessor) == hash(plain)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(accessor, protocol)) == accessor
    assert copy.deepcopy(accessor) == accessor


@pytest.mark.parametrize("path", [(1,), ["a"], (MappingEntry("b", dict, KIND.DICT), 2)])
def test_accessor_members_must_be_entries(path: Any) -> None:
    with pytest.raises(TypeError, match=r"^Expected a path of PyTreeEntry, got "):
        PyTreeAccessor(path)


# paths --------------------------------------------------------------------------------------------


def test_paths() -> None:
    assert optree.tree_paths({"b": (1, [2]), "a": 3, "c": None}) == [("a",), ("b", 0), ("b", 1, 0)]
    assert optree.tree_paths(1) == [()]
    assert optree.tree_paths([]) == []
    assert optree.tree_paths(None) == []
    assert optree.tree_paths(None, none_is_leaf=True) == [()]
    assert optree.tree_paths([[1]], is_leaf=lambda x: x == [1]) == [(0,)]
    assert optree.tree_accessors(1) == [PyTreeAccessor()]
    assert optree.tree_accessors([]) == []


def test_paths_are_fresh_objects() -> None:
    treespec = optree.tree_structure([1, (2,)])
    first = treespec.paths()
    first.clear()
    assert treespec.paths() == [(0,), (1, 0)]
    accessors = treespec.accessors()
    accessors.clear()
    assert len(treespec.accessors()) == 2


def test_paths_of_a_custom_node_use_its_entries() -> None:
    box = Box("p+q", p=1, q=[2])
    assert optree.tree_paths(box, namespace=NAMESPACE) == [("p",), ("q", 0)]
    codes = [a.codify("box") for a in optree.tree_accessors(box, namespace=NAMESPACE)]
    assert codes == ["box.p", "box.q[0]"]
    assert optree.tree_structure(box, namespace=NAMESPACE).entries() == ["p", "q"]


def test_paths_of_a_structseq_with_unnamed_fields() -> None:
    stat = os.stat_result(range(10))
    codes = [accessor.codify("s") for accessor in optree.tree_accessors(stat)]
    assert codes == [
        's.st_mode', 's.st_ino', 's.st_dev', 's.st_nlink', 's.st_uid', 's.st_gid', 's.st_size',
        's[7]', 's[8]', 's[9]',
    ]  # fmt: skip


def test_code_of_keywords_is_code() -> None:
    for name in ("class", "None", "a.import", "two words", "soft.match", ""):
        entry = optree.GetAttrEntry(name, object, optree.PyTreeKind.CUSTOM)
        node: Any = types.SimpleNamespace()
        for part in reversed(name.split(".")):
            node = types.SimpleNamespace(**{part: node})
        assert eval(entry.codify("node"), {"node": node}) is entry(node)


def test_paths_are_given_for_every_tree_that_can_be_flattened_and_for_no_deeper_one() -> None:
    tree: Any = 0
    for _ in range(optree.MAX_RECURSION_DEPTH):
        tree = [tree]
    treespec = optree.tree_structure(tree)
    assert treespec.paths() == [(0,) * optree.MAX_RECURSION_DEPTH]
    assert len(treespec.accessors()[0]) == optree.MAX_RECURSION_DEPTH
    deeper = treespec.compose(optree.tree_structure([0]))
    for walk in (deeper.paths, deeper.accessors):
        with pytest.raises(RecursionError, match="during walking the tree"):
            walk()
