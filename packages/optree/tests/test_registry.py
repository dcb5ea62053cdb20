# SPDX-License-Identifier: Apache-2.0
"""Registering, looking up and unregistering node types."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import subprocess
import sys
import textwrap
import time
import warnings
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
from trees import NAMESPACE, Box, Module, Pair, Point, Ring

import optree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL

BUILTINS = [type(None), tuple, list, dict, OrderedDict, defaultdict, deque]


def new_class() -> type:
    return type("Local", (), {})


def nothing(node: Any) -> Any:
    return (), None


def rebuild(metadata: Any, children: Any) -> Any:
    return children


def raises(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match="^" + re.escape(message) + "$")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-X', 'dev', '-W', 'error', '-c', textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_sizes_in_a_fresh_interpreter() -> None:
    output = run("""
        import optree
        size = 9 if optree._C.OPTREE_HAS_FROZENDICT else 8
        assert optree._C.get_registry_size() == size
        assert optree._C.get_registry_size(None) == size
        assert optree._C.get_registry_size('any') == size
        assert len(optree.registry._NODETYPE_REGISTRY) == size + 2
        optree.register_pytree_node(type('A', (), {}), len, len, namespace='any')
        assert optree._C.get_registry_size() == size + 1
        assert optree._C.get_registry_size('any') == size + 1
        assert optree._C.get_registry_size(namespace='other') == size
        assert len(optree.registry._NODETYPE_REGISTRY) == size + 3
        entries = optree.register_pytree_node.get()
        assert list(entries)[:7] == [type(None), tuple, list, dict, *list(entries)[4:7]]
        assert optree.functools.partial in entries
        print('fine')
    """)
    assert output == "fine\n"


@pytest.mark.skipif(optree._C.OPTREE_HAS_FROZENDICT, reason="this Python has frozendict")
def test_a_class_put_among_the_builtins_as_frozendict_is_a_leaf() -> None:
    code = """
        import builtins
        class frozendict(dict): pass
        builtins.frozendict = frozendict
        import optree
        tree = [frozendict(b=1, a=2)]
        assert optree.tree_leaves(tree) == tree and not optree._C.OPTREE_HAS_FROZENDICT
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_importing_is_silent() -> None:
    assert run("import optree") == ""
    assert run("import optree.integrations, optree.typing, optree._C") == ""


def test_register_returns_the_class_and_takes_effect() -> None:
    cls = new_class()
    assert optree.register_pytree_node(cls, nothing, rebuild, namespace="effect") is cls
    assert optree.tree_leaves(cls(), namespace="effect") == []
    assert len(optree.tree_leaves(cls())) == 1
    assert len(optree.tree_leaves(cls(), namespace="other")) == 1
    entry = optree.unregister_pytree_node(cls, namespace="effect")
    assert type(entry) is optree.registry.PyTreeNodeRegistryEntry
    assert (entry.type, entry.flatten_func, entry.unflatten_func) == (cls, nothing, rebuild)
    assert (entry.kind, entry.path_entry_type, entry.namespace) == (
        optree.PyTreeKind.CUSTOM, optree.AutoEntry, 'effect',
    )  # fmt: skip
    assert len(optree.tree_leaves(cls(), namespace="effect")) == 1


def test_namespaces_are_independent() -> None:
    cls = new_class()
    optree.register_pytree_node(cls, lambda n: ((1,), None), rebuild, namespace=GLOBAL)
    optree.register_pytree_node(cls, lambda n: ((2,), None), rebuild, namespace="own")
    try:
        assert optree.tree_leaves(cls()) == [1]
        assert optree.tree_leaves(cls(), namespace="other") == [1]
        assert optree.tree_leaves(cls(), namespace="own") == [2]
        optree.unregister_pytree_node(cls, namespace="own")
        assert optree.tree_leaves(cls(), namespace="own") == [1]
    finally:
        optree.unregister_pytree_node(cls, namespace=GLOBAL)
    assert len(optree.tree_leaves(cls(), namespace="own")) == 1


def test_subclasses_are_not_registered() -> None:
    class Sub(Pair):
        pass

    sub = Sub(1, 2)
    assert optree.tree_leaves(sub)[0] is sub


def test_argument_checks() -> None:
    cls = new_class()
    register = optree.register_pytree_node
    for first in (1, "x", None, cls()):
        with pytest.raises(TypeError, match="^Expected a class, got "):
            register(first, nothing, rebuild, namespace="x")
    for entry_type in (1, int, None, "x", optree.PyTreeAccessor):
        with pytest.raises(TypeError, match=r"^Expected a subclass of PyTreeEntry, got "):
            register(cls, nothing, rebuild, path_entry_type=entry_type, namespace="x")
    for namespace in (1, None, b"x"):
        with pytest.raises(TypeError, match="^The namespace must be a string, got "):
            register(cls, nothing, rebuild, namespace=namespace)
    with raises(ValueError, "The namespace cannot be an empty string."):
        register(cls, nothing, rebuild, namespace="")
    for functions in ((1, rebuild), (nothing, 1), (None, rebuild)):
        with pytest.raises(TypeError, match="Expected a callable for `"):
            register(cls, *functions, namespace="x")
    with pytest.raises(TypeError, match="'namespace'"):
        register(cls, nothing, rebuild)
    assert optree.register_pytree_node.get(cls, namespace="x") is None


def test_checks_come_in_order() -> None:
    register = optree.register_pytree_node
    with pytest.raises(TypeError, match="^Expected a class"):
        register(1, 1, 1, path_entry_type=1, namespace=1)
    with pytest.raises(TypeError, match="^Expected a subclass of PyTreeEntry"):
        register(list, 1, 1, path_entry_type=1, namespace=1)
    with pytest.raises(TypeError, match="^The namespace must be a string"):
        register(list, 1, 1, namespace=1)
    with pytest.raises(ValueError, match="^The namespace cannot be an empty string"):
        register(list, 1, 1, namespace="")


@pytest.mark.parametrize("cls", BUILTINS)
@pytest.mark.parametrize("namespace", ["x", GLOBAL], ids=["x", "global"])
def test_builtin_types_are_fixed(cls: type, namespace: Any) -> None:
    with raises(ValueError, f"PyTree type {cls!r} is a built-in type and cannot be re-registered."):
        optree.register_pytree_node(cls, nothing, rebuild, namespace=namespace)
    with raises(ValueError, f"PyTree type {cls!r} is a built-in type and cannot be unregistered."):
        optree.unregister_pytree_node(cls, namespace=namespace)


def test_duplicates() -> None:
    with raises(ValueError, f"PyTree type {Box!r} is already registered in namespace 'trees'."):
        optree.register_pytree_node(Box, nothing, rebuild, namespace=NAMESPACE)
    with raises(ValueError, f"PyTree type {Pair!r} is already registered in the global namespace."):
        optree.register_pytree_node(Pair, nothing, rebuild, namespace=GLOBAL)
    assert optree.tree_leaves(Pair(1, 2)) == [1, 2]


def test_unregister_checks() -> None:
    unregister = optree.unregister_pytree_node
    cls = new_class()
    with pytest.raises(TypeError, match="^Expected a class, got "):
        unregister(1, namespace="x")
    with pytest.raises(TypeError, match="^The namespace must be a string, got "):
        unregister(cls, namespace=1)
    with raises(ValueError, "The namespace cannot be an empty string."):
        unregister(cls, namespace="")
    with raises(ValueError, f"PyTree type {cls!r} is not registered in namespace 'x'."):
        unregister(cls, namespace="x")
    with raises(ValueError, f"PyTree type {cls!r} is not registered in the global namespace."):
        unregister(cls, namespace=GLOBAL)
    with raises(
        ValueError,
        f"PyTree type {Point!r} is a subclass of `collections.namedtuple`, which is not explicitly "
        "registered in namespace 'x'.",
    ):
        unregister(Point, namespace="x")
    with raises(
        ValueError,
        f"PyTree type {time.struct_time!r} is a class of `PyStructSequence`, which is not "
        "explicitly registered in the global namespace.",
    ):
        unregister(time.struct_time, namespace=GLOBAL)
    with pytest.raises(TypeError, match="'namespace'"):
        unregister(cls)


@pytest.mark.parametrize("namespace", ["over", GLOBAL], ids=["named", "global"])
def test_overriding_a_namedtuple_warns_at_the_caller(namespace: Any) -> None:
    cls = namedtuple("cls", ["x"])
    where = " in namespace 'over'" if namespace == "over" else ""
    message = (
        f"PyTree type {cls!r} is a subclass of `collections.namedtuple`, which is already "
        f"registered in the global namespace. Override it with custom flatten/unflatten "
        f"functions{where}."
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optree.register_pytree_node(cls, lambda n: ((n.x, n.x), None), rebuild, namespace=namespace)
    try:
        assert [str(w.message) for w in caught] == [message]
        assert caught[0].category is UserWarning
        assert caught[0].filename == __file__
        options = {} if namespace is GLOBAL else {"namespace": "over"}
        assert optree.tree_leaves(cls(1), **options) == [1, 1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="already registered"):
                optree.register_pytree_node(cls, nothing, rebuild, namespace=namespace)
        assert caught == []
    finally:
        optree.unregister_pytree_node(cls, namespace=namespace)
    assert optree.tree_leaves(cls(1)) == [1]


def test_overriding_a_structseq_warns() -> None:
    message = (
        f"PyTree type {time.struct_time!r} is a class of `PyStructSequence`, which is already "
        "registered in the global namespace. Override it with custom flatten/unflatten functions "
        "in namespace 'over'."
    )
    with pytest.warns(UserWarning, match="^" + re.escape(message) + "$"):
        optree.register_pytree_node(time.struct_time, nothing, rebuild, namespace="over")
    try:
        assert optree.tree_leaves(time.gmtime(0), namespace="over") == []
    finally:
        optree.unregister_pytree_node(time.struct_time, namespace="over")


def test_an_escalated_warning_undoes_the_registration() -> None:
    cls = namedtuple("cls", ["x"])
    size = optree._C.get_registry_size()
    length = len(optree.registry._NODETYPE_REGISTRY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is a subclass of"):
            optree.register_pytree_node(cls, nothing, rebuild, namespace="undone")
    assert optree._C.get_registry_size() == size
    assert len(optree.registry._NODETYPE_REGISTRY) == length
    assert optree.tree_leaves(cls(1), namespace="undone") == [1]
    with pytest.raises(ValueError, match="is not explicitly registered"):
        optree.unregister_pytree_node(cls, namespace="undone")


# lookup -------------------------------------------------------------------------------------------


def test_get() -> None:
    get = optree.register_pytree_node.get
    expected = {
        type(None): ("NONE", optree.PyTreeEntry),
        tuple: ("TUPLE", optree.SequenceEntry),
        list: ("LIST", optree.SequenceEntry),
        dict: ("DICT", optree.MappingEntry),
        OrderedDict: ("ORDEREDDICT", optree.MappingEntry),
        defaultdict: ("DEFAULTDICT", optree.MappingEntry),
        deque: ("DEQUE", optree.SequenceEntry),
        Point: ("NAMEDTUPLE", optree.NamedTupleEntry),
        namedtuple: ("NAMEDTUPLE", optree.NamedTupleEntry),
        time.struct_time: ("STRUCTSEQUENCE", optree.StructSequenceEntry),
        Pair: ("CUSTOM", optree.AutoEntry),
    }
    for cls, (kind, path_entry_type) in expected.items():
        entry = get(cls)
        assert entry.kind is optree.PyTreeKind[kind]
        assert entry.path_entry_type is path_entry_type
        assert get(cls) is entry
        assert get(cls, namespace="unknown") is entry
    assert get(Box) is None
    assert get(int) is None
    assert get(Box, namespace=NAMESPACE).path_entry_type is optree.GetAttrEntry
    assert get(Pair, namespace="pairs") is not get(Pair)
    for first in (1, "x"):
        with pytest.raises(TypeError, match="^Expected a class or None, got "):
            get(first)
    with pytest.raises(TypeError, match="^The namespace must be a string, got "):
        get(int, namespace=1)


def test_get_everything() -> None:
    get = optree.register_pytree_node.get
    entries = get()
    assert entries[Pair] is get(Pair)
    assert Box not in entries
    entries.clear()
    assert get()[list] is get(list)
    own = get(namespace=NAMESPACE)
    assert own[Box] is get(Box, namespace=NAMESPACE)
    assert own[list] is get(list)
    assert list(own)[: len(get())] == list(get())


def test_get_follows_the_dict_order_mode() -> None:
    get = optree.register_pytree_node.get
    with optree.dict_insertion_ordered(True, namespace="mode"):
        for cls in (dict, defaultdict):
            assert get(cls, namespace="mode") is not get(cls)
            assert get(cls, namespace="mode") is get(cls, namespace="mode")
            assert get(namespace="mode")[cls] is get(cls, namespace="mode")
        assert get(list, namespace="mode") is get(list)
        children = get(dict, namespace="mode").flatten_func({"b": 1, "a": 2})[0]
        assert list(children) == [1, 2]
    assert get(dict, namespace="mode") is get(dict)
    assert list(get(dict).flatten_func({"b": 1, "a": 2})[0]) == [2, 1]


@pytest.mark.parametrize(
    'tree',
    [(1, 2), [1, 2], {'b': 1, 'a': 2}, OrderedDict(b=1, a=2), defaultdict(int, b=1, a=2),
     deque([1, 2], maxlen=3), Point(1, 2), None, time.gmtime(0)],
    ids=lambda tree: type(tree).__name__,
)  # fmt: skip
def test_functions_of_builtin_entries_round_trip(tree: Any) -> None:
    entry = optree.register_pytree_node.get(type(tree))
    children, metadata, *_ = entry.flatten_func(tree)
    assert list(children) == optree.tree_leaves(tree)
    again = entry.unflatten_func(metadata, children)
    assert type(again) is type(tree)
    assert again == tree
    if isinstance(tree, dict):
        assert list(again) == list(tree)


def test_entries_are_frozen() -> None:
    import dataclasses

    entry = optree.register_pytree_node.get(list)
    assert [field.name for field in dataclasses.fields(entry)] == [
        'type', 'flatten_func', 'unflatten_func', 'path_entry_type', 'kind', 'namespace',
    ]  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.kind = 1


# classes ------------------------------------------------------------------------------------------


class Methods:
    def __tree_flatten__(self) -> Any:
        return (1, 2), "meta"

    @classmethod
    def __tree_unflatten__(cls, metadata: Any, children: Any) -> Any:
        return cls, metadata, children


def methods_class(**attributes: Any) -> Any:
    return type("Local", (Methods,), attributes)


def test_class_decorator_forms() -> None:
    register = optree.register_pytree_node_class
    for use in (
        lambda cls: register(namespace="decorated")(cls),
        lambda cls: register("decorated")(cls),
        lambda cls: register(cls, namespace="decorated"),
    ):
        cls = methods_class()
        assert use(cls) is cls
        leaves, treespec = optree.tree_flatten(cls(), namespace="decorated")
        assert leaves == [1, 2]
        assert treespec.unflatten([3, 4]) == (cls, "meta", (3, 4))
        optree.unregister_pytree_node(cls, namespace="decorated")


def test_class_decorator_errors() -> None:
    register = optree.register_pytree_node_class
    with raises(ValueError, "Cannot specify `namespace` when the first argument is a string."):
        register("x", namespace="y")
    with raises(ValueError, "Must specify `namespace` when the first argument is a class."):
        register(methods_class())
    for action in (lambda: register(""), lambda: register(methods_class(), namespace="")):
        with raises(ValueError, "The namespace cannot be an empty string."):
            action()
    with pytest.raises(TypeError, match="Expected a class, got 1"):
        register(1, namespace="x")
    for attributes in ({}, {'__tree_flatten__': nothing}, {'tree_flatten': nothing},
                       {'__tree_unflatten__': nothing}):  # fmt: skip
        cls = type("Local", (), attributes)
        with pytest.raises(
            TypeError,
            match="must define both `__tree_flatten__` and `__tree_unflatten__` methods",
        ):
            register(cls, namespace="x")


def test_path_entry_type_of_a_class() -> None:
    register = optree.register_pytree_node_class
    plain = methods_class()
    marked = methods_class(TREE_PATH_ENTRY_TYPE=optree.SequenceEntry)
    for cls, argument, expected in [
        (plain, None, optree.AutoEntry),
        (marked, None, optree.SequenceEntry),
        (methods_class(TREE_PATH_ENTRY_TYPE=optree.SequenceEntry), optree.GetItemEntry,
         optree.GetItemEntry),
    ]:  # fmt: skip
        register(cls, path_entry_type=argument, namespace="entry type")
        entry = optree.unregister_pytree_node(cls, namespace="entry type")
        assert entry.path_entry_type is expected


def test_classes_with_the_older_method_names() -> None:
    class Old:
        def tree_flatten(self) -> Any:
            return (1,), None

        @classmethod
        def tree_unflatten(cls, metadata: Any, children: Any) -> Any:
            return cls, children

    optree.register_pytree_node_class(Old, namespace="old")
    try:
        leaves, treespec = optree.tree_flatten(Old(), namespace="old")
        assert leaves == [1]
        assert treespec.unflatten([2]) == (Old, (2,))
        assert callable(Old.__tree_flatten__)  # type: ignore[attr-defined]
        assert callable(Old.__tree_unflatten__)  # type: ignore[attr-defined]
        assert Old().tree_flatten() == ((1,), None)
    finally:
        optree.unregister_pytree_node(Old, namespace="old")


def test_older_methods_of_subclasses_and_later_ones_are_followed() -> None:
    class Base:
        def __init__(self, *items: Any) -> None:
            self.items = items

        def tree_flatten(self) -> Any:
            return self.items[:1], type(self).__name__

        @classmethod
        def tree_unflatten(cls, metadata: Any, children: Any) -> Any:
            return cls(*children)

    class All(Base):
        def tree_flatten(self) -> Any:
            return self.items, type(self).__name__

    class Doubled(All):
        @staticmethod
        def tree_unflatten(metadata: Any, children: Any) -> Any:  # type: ignore[override]
            return Doubled(*children, *children)

    classes = (Base, All, Doubled)
    for order in (classes, classes[::-1]):
        for cls in order:
            optree.register_pytree_node_class(cls, namespace="older")
        try:
            expected = {Base: ([1], (1,)), All: ([1, 2], (1, 2)), Doubled: ([1, 2], (1, 2, 1, 2))}
            for cls, (leaves, items) in expected.items():
                assert optree.tree_leaves(cls(1, 2), namespace="older") == leaves
                made = optree.tree_map(lambda x: x, cls(1, 2), namespace="older")
                assert type(made) is cls
                assert made.items == items
                assert isinstance(made, optree.CustomTreeNode)
        finally:
            for cls in order:
                optree.unregister_pytree_node(cls, namespace="older")

    optree.register_pytree_node_class(All, namespace="older")
    try:
        treespec = optree.tree_structure(All(1, 2), namespace="older")
        All.tree_flatten = lambda self: ((*self.items, "patched"), "")  # type: ignore[assignment,method-assign]
        All.tree_unflatten = classmethod(lambda cls, m, c: ("patched", c))  # type: ignore[assignment,method-assign]
        assert optree.tree_leaves(All(1, 2), namespace="older") == [1, 2, "patched"]
        assert treespec.unflatten([1, 2]) == ("patched", (1, 2))
    finally:
        optree.unregister_pytree_node(All, namespace="older")


def test_a_call_that_raises_leaves_nothing_behind() -> None:
    class Meta(type):
        def __repr__(cls) -> str:
            raise ZeroDivisionError

    class Hidden(namedtuple("Hidden", "x y"), metaclass=Meta):  # type: ignore[misc]
        pass

    size = len(optree.register_pytree_node.get(namespace="nothing"))  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        optree.register_pytree_node(
            Hidden, lambda h: ((h.x,), None), lambda _, c: c, namespace="nothing"
        )
    assert optree.tree_leaves(Hidden(1, 2), namespace="nothing") == [1, 2]
    assert len(optree.register_pytree_node.get(namespace="nothing")) == size  # type: ignore[attr-defined]

    class Old:
        def tree_flatten(self) -> Any:
            return (1,), None

        @classmethod
        def tree_unflatten(cls, metadata: Any, children: Any) -> Any:
            return cls()

    optree.register_pytree_node(Old, Old.tree_flatten, Old.tree_unflatten, namespace="nothing")
    try:
        before = set(vars(Old))
        with pytest.raises(ValueError, match="already registered"):
            optree.register_pytree_node_class(Old, namespace="nothing")
        assert set(vars(Old)) == before
    finally:
        optree.unregister_pytree_node(Old, namespace="nothing")


def test_the_global_namespace_may_stand_in_the_place_of_the_class() -> None:
    attrs = pytest.importorskip("attrs")
    cls = methods_class()
    fields = dataclasses.make_dataclass("Fields", ["x"])
    register: Any
    for register, made in (
        (optree.register_pytree_node_class, cls),
        (optree.dataclasses.register_node, fields),
        (optree.integrations.attrs.register_node, attrs.make_class("Fields", ["x"])),
    ):
        assert register(optree.GLOBAL_NAMESPACE)(made) is made
        assert optree.register_pytree_node.get(made) is not None  # type: ignore[attr-defined]
        optree.unregister_pytree_node(made, namespace=optree.GLOBAL_NAMESPACE)
        with pytest.raises(ValueError, match="^Cannot specify `namespace` when"):
            register(optree.GLOBAL_NAMESPACE, namespace="other")


def test_flatten_method_is_looked_up_at_call_time() -> None:
    cls = methods_class()
    optree.register_pytree_node_class(cls, namespace="late")
    try:
        assert optree.tree_leaves(cls(), namespace="late") == [1, 2]
        cls.__tree_flatten__ = lambda self: ((3,), None)
        assert optree.tree_leaves(cls(), namespace="late") == [3]
    finally:
        optree.unregister_pytree_node(cls, namespace="late")


# after unregistration -----------------------------------------------------------------------------


def test_structures_keep_their_registration() -> None:
    cls = new_class()
    optree.register_pytree_node(cls, lambda n: ((1,), "m"), lambda m, c: (m, c), namespace="gone")
    treespec = optree.tree_structure(cls(), namespace="gone")
    optree.unregister_pytree_node(cls, namespace="gone")
    assert treespec.unflatten([5]) == ("m", (5,))
    assert treespec.type is cls
    assert treespec.kind is optree.PyTreeKind.CUSTOM
    assert treespec == treespec.transform()
    assert hash(treespec) == hash(treespec.transform())
    assert repr(treespec) == "PyTreeSpec(CustomTreeNode(Local['m'], [*]), namespace='gone')"
    with pytest.raises(ValueError, match="^Custom node type mismatch"):
        treespec.flatten_up_to(cls())
    with pytest.raises(RuntimeError, match="^Unknown custom type in pickled PyTreeSpec"):
        optree.PyTreeSpec.__new__(optree.PyTreeSpec).__setstate__(treespec.__getstate__())


def test_registering_inside_a_flatten_function() -> None:
    cls, other = new_class(), new_class()

    def flatten(node: Any) -> Any:
        optree.register_pytree_node(other, nothing, rebuild, namespace="inside")
        return (other(),), None

    optree.register_pytree_node(cls, flatten, rebuild, namespace="inside")
    assert len(optree.tree_leaves([cls(), 1], namespace="inside")) in (1, 2)
    optree.unregister_pytree_node(other, namespace="inside")

    def vanish(node: Any) -> Any:
        optree.unregister_pytree_node(cls, namespace="inside")
        return (1,), None

    optree.unregister_pytree_node(cls, namespace="inside")
    optree.register_pytree_node(cls, vanish, rebuild, namespace="inside")
    leaves, treespec = optree.tree_flatten([cls()], namespace="inside")
    assert leaves == [1]
    assert treespec.unflatten([2]) == [(2,)]


def test_hostile_metaclass_repr_may_reenter() -> None:
    class Meta(type):
        def __repr__(cls) -> str:
            optree.tree_leaves([1, {"a": 2}])
            optree._C.get_registry_size()
            return "hostile"

    class Hostile(metaclass=Meta):
        pass

    optree.register_pytree_node(Hostile, nothing, rebuild, namespace="hostile")
    with raises(ValueError, "PyTree type hostile is already registered in namespace 'hostile'."):
        optree.register_pytree_node(Hostile, nothing, rebuild, namespace="hostile")
    optree.unregister_pytree_node(Hostile, namespace="hostile")
    with raises(ValueError, "PyTree type hostile is not registered in namespace 'hostile'."):
        optree.unregister_pytree_node(Hostile, namespace="hostile")


# metadata of dictionaries -------------------------------------------------------------------------


def test_dict_metadata() -> None:
    cls = optree.registry.DictMetaData
    metadata = cls(["a", "b"], original_keys=["b", "a"])
    assert metadata == ["a", "b"]
    assert isinstance(metadata, list)
    assert metadata.original_keys == {"b": None, "a": None}
    assert list(metadata.original_keys) == ["b", "a"]
    for other in (
        copy.copy(metadata),
        copy.deepcopy(metadata),
        *(pickle.loads(pickle.dumps(metadata, p)) for p in range(2, 6)),
    ):
        assert type(other) is cls
        assert other == metadata
        assert list(other.original_keys) == ["b", "a"]
    with pytest.raises(ValueError, match="^`original_keys` must have the same length as `keys`"):
        cls(["a"], original_keys=["b", "a"])
    with pytest.raises(ValueError, match="^`original_keys` must have the same keys as `keys`"):
        cls(["a", "c"], original_keys=["b", "a"])
    assert cls(["a", "c"], original_keys=["b", "a"], check_keys_consistency=False) == ["a", "c"]


def test_table_classes_are_where_they_should_be() -> None:
    assert optree.register_pytree_node.get(Ring, namespace=NAMESPACE).namespace == NAMESPACE
    assert optree.register_pytree_node.get(Module, namespace=NAMESPACE) is not None
    assert repr(GLOBAL) == "<GLOBAL NAMESPACE>"


@pytest.mark.parametrize("namespace", ["", NAMESPACE])
def test_entries_can_be_copied_and_pickled(namespace: str) -> None:
    for cls in (list, dict, type(None)):
        entry = optree.register_pytree_node.get(cls, namespace=namespace)
        for other in (copy.copy(entry), copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))):
            assert other == entry
            assert (other.kind, other.namespace) == (entry.kind, entry.namespace)


def test_entries_match_by_their_constructor_arguments() -> None:
    entry = optree.register_pytree_node.get(list)
    assert type(entry).__match_args__ == ("type", "flatten_func", "unflatten_func")
