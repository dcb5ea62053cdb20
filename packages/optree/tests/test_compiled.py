# SPDX-License-Identifier: Apache-2.0
"""Public builtins cannot be distinguished from the Python functions that they replace."""

from __future__ import annotations

import copy
import doctest
import gc
import inspect
import pickle
import time
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import pytest

import optree
import optree._C as _C

NAMES = [
    "tree_flatten",
    "tree_leaves",
    "tree_structure",
    "tree_unflatten",
    "tree_flatten_one_level",
]

# The Python functions that the builtins replace.
PROTOTYPES: dict[str, Any] = {name: getattr(optree, name).__self__.prototype for name in NAMES}


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    try:
        return "returned", repr(function(*args, **kwargs))
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("name", NAMES)
def test_names_documentation_and_signature(name: str) -> None:
    function, prototype = getattr(optree, name), PROTOTYPES[name]
    assert type(function) is types.BuiltinFunctionType
    assert function is getattr(optree.ops, name)
    assert function.__module__ == "optree.ops"
    assert function.__name__ == function.__qualname__ == name
    assert inspect.getdoc(function) == inspect.getdoc(prototype)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(prototype).parameters.values()
    ]
    assert list(inspect.signature(function).parameters.values()) == bare


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    function = getattr(optree, name)
    example = doctest.DocTestParser().get_doctest(
        function.__doc__, vars(optree).copy(), name, None, None
    )
    assert len(example.examples) >= 2
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_and_copy_by_name(name: str, protocol: int) -> None:
    function = getattr(optree, name)
    assert pickle.loads(pickle.dumps(function, protocol)) is function
    assert copy.copy(function) is copy.deepcopy(function) is function


TREE = {"b": (2, [3, None]), "a": 1}
ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((TREE,), {}),
    ((None,), {"none_is_leaf": True}),
    ((TREE,), {"none_is_leaf": True}),
    ((TREE,), {"none_is_leaf": 1, "namespace": ""}),
    ((TREE, None), {"namespace": "somewhere"}),
    ((TREE,), {"is_leaf": lambda x: isinstance(x, tuple)}),
    ((TREE, lambda x: isinstance(x, tuple)), {"none_is_leaf": True}),
    ((TREE,), {"".join(["none_", "is_", "leaf"]): True}),
    ((), {}),
    ((1, 2, 3), {}),
    ((1, 2), {}),
    ((1, None), {"is_leaf": None}),
    ((1,), {"unknown": 1}),
    ((), {"tree": 1}),
    ((1,), {"none_is_leaf": "yes"}),
    ((1,), {"none_is_leaf": None}),
    ((1,), {"namespace": 3}),
    ((1,), {"namespace": None}),
    ((1,), {"is_leaf": 7}),
]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tree_unflatten"])
@pytest.mark.parametrize("case", range(len(ARGUMENTS)))
def test_same_answers_and_errors(name: str, case: int) -> None:
    args, kwargs = ARGUMENTS[case]
    expected = outcome(PROTOTYPES[name], *args, **kwargs)
    assert outcome(getattr(optree, name), *args, **kwargs) == expected


def test_same_answers_and_errors_of_unflatten() -> None:
    leaves, spec = optree.tree_flatten(TREE)
    bare = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((spec, leaves), {}),
        ((spec, tuple(leaves)), {}),
        ((spec, leaves[:-1]), {}),
        ((spec, [*leaves, 0]), {}),
        ((spec, 5), {}),
        ((spec,), {}),
        ((spec, leaves, 1), {}),
        ((spec,), {"leaves": leaves}),
        ((), {"leaves": leaves, "treespec": spec}),
        ((spec, leaves), {"unknown": 1}),
        ((7, leaves), {}),
        ((bare, leaves), {}),
    ]
    for args, kwargs in cases:
        expected = outcome(PROTOTYPES["tree_unflatten"], *args, **kwargs)
        assert outcome(optree.tree_unflatten, *args, **kwargs) == expected
    made = (optree.tree_unflatten(spec, iter(leaves)), optree.tree_unflatten(spec, set(leaves)))
    assert made == (TREE, TREE)


def test_reexported_functions_take_another_namespace() -> None:
    module = optree.pytree.reexport(namespace="compiled", module="compiled.pytree")
    assert inspect.signature(module.flatten).parameters["namespace"].default == "compiled"
    assert module.leaves(TREE) == [1, 2, 3]


def test_only_known_functions_can_be_compiled() -> None:
    def tree_other() -> None: ...

    with pytest.raises(ValueError, match="expected the prototype of tree_flatten, tree_leaves"):
        _C.compiled(tree_other)
    with pytest.raises(AttributeError, match="__name__"):
        _C.compiled(1)  # type: ignore[type-var]


def test_a_compiled_function_dies_with_its_prototype() -> None:
    class Marker:
        pass

    marker = Marker()
    witness = weakref.ref(marker)
    names: dict[str, Any] = {"_C": _C, "marker": marker}
    exec("@_C.compiled\ndef tree_leaves(): 'doc'", names)
    assert names["tree_leaves"]((1, [2])) == [1, 2]
    del names, marker
    gc.collect()
    assert witness() is None


class Point(NamedTuple):
    x: Any
    y: Any


class Offset(Point):
    pass


class Strange:
    """A node whose test chooses what its flatten function returns; callables are called first."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return "Strange()"


class StrangeEntry(optree.GetItemEntry):
    pass


optree.register_pytree_node(
    Strange,
    lambda node: (part() if callable(part) else part for part in node.parts),
    lambda metadata, children: Strange(tuple(children), metadata),
    path_entry_type=StrangeEntry,
    namespace="one-level",
)


def unlucky() -> Any:
    raise ZeroDivisionError("unlucky")


ONE_LEVEL_TREES: list[Any] = [
    (),
    (1, [2]),
    [],
    [None, {"a": 1}],
    list(range(40)),
    {},
    {"b": 1, "a": [2]},
    {3: 1, "a": 2, (1, 2): 3},
    {"ä": 1, "z": 2, "日本": 3},
    OrderedDict(),
    OrderedDict(b=1, a=2),
    defaultdict(int),
    defaultdict(list, b=1, a=2),
    defaultdict(None, {3: 1, "a": 2, (1, 2): 3}),
    deque(),
    deque([1, 2], maxlen=3),
    Point(1, [2]),
    Offset(1, 2),
    time.gmtime(0),
    None,
    optree.functools.partial(print, 1, sep=""),
    Strange((), None),
    Strange([1, 2], "metadata"),
    Strange(lambda: iter([1, 2]), "metadata", None),
    Strange((1, 2), ["meta", "data"], ["left", "right"]),
]


@pytest.mark.parametrize("tree", ONE_LEVEL_TREES, ids=repr)
@pytest.mark.parametrize("mode", [True, False], ids=["insertion", "sorted"])
def test_one_level_is_the_same_as_by_python(tree: Any, mode: bool) -> None:
    with optree.dict_insertion_ordered(mode, namespace="one-level"):
        quick = optree.tree_flatten_one_level(tree, namespace="one-level")
        slow = PROTOTYPES["tree_flatten_one_level"](tree, namespace="one-level")
    assert type(quick) is type(slow)
    assert quick == slow
    assert vars(quick) == vars(slow)
    assert list(vars(quick)) == list(vars(slow))
    assert [type(part) for part in quick] == [type(part) for part in slow]
    if isinstance(tree, dict) and not isinstance(tree, OrderedDict):
        ours, theirs = quick.metadata, slow.metadata
        if isinstance(tree, defaultdict):
            assert ours[0] is theirs[0] is tree.default_factory
            ours, theirs = ours[1], theirs[1]
        assert type(ours) is type(theirs) is optree.registry.DictMetaData
        assert pickle.loads(pickle.dumps(ours)).original_keys == theirs.original_keys
        assert list(ours.original_keys) == list(theirs.original_keys) == list(tree)
        assert type(ours.original_keys) is type(theirs.original_keys) is dict
    if not isinstance(tree, (optree.functools.partial, Strange)):
        rebuilt = quick.unflatten_func(quick.metadata, quick.children)
        assert type(rebuilt) is type(tree)
        assert rebuilt == tree
        if tree is not None:
            assert list(rebuilt) == list(tree)


ONE_LEVEL_ERRORS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1,), {}),
    ((None,), {"none_is_leaf": True}),
    ((None, unlucky), {"none_is_leaf": True}),
    ((None, lambda _: "yes"), {}),
    (([1], lambda _: "yes"), {}),
    (([1], lambda _: ""), {}),
    (([1], unlucky), {}),
    (([1], lambda _: unlucky()), {}),
    (([1], 7), {}),
    (([1],), {"namespace": 7}),
    (([1],), {"namespace": optree.registry.GLOBAL_NAMESPACE}),
    ((None,), {"none_is_leaf": "no"}),
    ((Strange((1,), None),), {}),
    ((Strange(),), {"namespace": "one-level"}),
    ((Strange((1,)),), {"namespace": "one-level"}),
    ((Strange((1,), None, None, None),), {"namespace": "one-level"}),
    ((Strange((1,), None, ()),), {"namespace": "one-level"}),
    ((Strange(1, None),), {"namespace": "one-level"}),
    ((Strange((1,), None, 1),), {"namespace": "one-level"}),
    ((Strange(unlucky, None),), {"namespace": "one-level"}),
]


@pytest.mark.parametrize("case", range(len(ONE_LEVEL_ERRORS)))
def test_one_level_has_the_errors_of_python(case: int) -> None:
    args, kwargs = ONE_LEVEL_ERRORS[case]
    expected = outcome(PROTOTYPES["tree_flatten_one_level"], *args, **kwargs)
    assert outcome(optree.tree_flatten_one_level, *args, **kwargs) == expected


def test_one_level_asks_the_predicate_once() -> None:
    asked: list[Any] = []
    optree.tree_flatten_one_level([1, [2]], asked.append)  # type: ignore[arg-type]
    assert asked == [[1, [2]]]
    optree.tree_flatten_one_level(None, asked.append)  # type: ignore[arg-type]
    assert asked == [[1, [2]], None]
    with pytest.raises(ValueError, match="Cannot flatten leaf-type"):
        optree.tree_flatten_one_level(7, asked.append)  # type: ignore[arg-type]
    assert asked == [[1, [2]], None, 7]


def test_one_level_follows_the_registry() -> None:
    class Node:
        pass

    def flatten_one_level() -> Any:
        return optree.tree_flatten_one_level(Node(), namespace="follows")

    for metadata in "ab":
        optree.register_pytree_node(
            Node,
            lambda _, metadata=metadata: ((1,), metadata),
            lambda *_: Node(),
            path_entry_type=StrangeEntry,
            namespace="follows",
        )
        node = flatten_one_level()
        assert (node.metadata, node.type, node.path_entry_type) == (metadata, Node, StrangeEntry)
        assert node.kind == optree.PyTreeKind.CUSTOM
        optree.unregister_pytree_node(Node, namespace="follows")
        with pytest.raises(ValueError, match="Cannot flatten leaf-type"):
            flatten_one_level()


def test_keys_of_metadata_are_attributes_like_others() -> None:
    metadata = optree.tree_flatten_one_level({"b": 1, "a": 2}).metadata
    again = copy.copy(metadata)
    assert again.original_keys == {"b": None, "a": None}
    metadata.original_keys = {"c": None}
    assert (metadata.original_keys, metadata) == ({"c": None}, ["a", "b"])
    del metadata.original_keys
    with pytest.raises(AttributeError, match="original_keys"):
        metadata.original_keys  # noqa: B018
    with pytest.raises(AttributeError, match="original_keys"):
        del metadata.original_keys
    untouched = optree.tree_flatten_one_level({"b": 1, "a": 2}).metadata
    del untouched.original_keys
    assert not hasattr(untouched, "original_keys")
    assert not hasattr(optree.registry.DictMetaData.__new__(type(metadata)), "original_keys")


def test_keys_of_metadata_are_those_of_the_flattening() -> None:
    metadata = optree.tree_flatten_one_level({"b": 1, "a": 2}).metadata
    metadata.append("c")
    assert metadata.original_keys == {"b": None, "a": None}


def test_metadata_with_keys_in_a_cycle_is_collected() -> None:
    class Key:
        metadata: Any = None

    key = Key()
    witness = weakref.ref(key)
    key.metadata = optree.tree_flatten_one_level({key: 1}).metadata
    del key
    gc.collect()
    assert witness() is None


def test_one_level_outputs_do_not_share_their_parts() -> None:
    first, second = (optree.tree_flatten_one_level({"a": 1}) for _ in range(2))
    first.children.append(2)
    first.metadata.append("b")
    first.metadata.original_keys["b"] = None
    first.type = list
    assert second == ([1], ["a"], ("a",), second.unflatten_func)
    assert (second.metadata.original_keys, second.type) == ({"a": None}, dict)


def test_one_level_of_a_dict_that_keeps_its_insertion_order() -> None:
    with optree.dict_insertion_ordered(True, namespace="compiled"):
        node = optree.tree_flatten_one_level({"b": 1, "a": 2}, namespace="compiled")
    assert node.children == [1, 2]
    assert node.entries == ("b", "a")


def test_one_level_classes_are_checked() -> None:
    handlers = (None,) * optree.PyTreeKind.NUM_KINDS
    with pytest.raises(TypeError, match="expected subclasses of tuple and list"):
        _C.set_one_level(list, list, handlers, handlers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a tuple of 12 handlers"):
        _C.set_one_level(tuple, list, handlers, handlers[1:])
    wrong: Any = (*handlers[1:], 3)
    with pytest.raises(TypeError, match=r"expected \(unflatten_func, attributes\) or None"):
        _C.set_one_level(tuple, list, handlers, wrong)
    assert optree.tree_flatten_one_level([1]).children == [1]  # nothing was changed
