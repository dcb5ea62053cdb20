# SPDX-License-Identifier: Apache-2.0
"""Builtins among the public functions cannot be told from the Python functions they stand for."""

from __future__ import annotations

import ast
import copy
import doctest
import gc
import inspect
import pickle
import types
import weakref
from pathlib import Path
from typing import Any

import pytest

import optree
import optree._C as _C
import optree.ops.flatten as source

NAMES = ["tree_flatten", "tree_leaves", "tree_structure", "tree_unflatten"]


def prototypes() -> dict[str, Any]:
    """The Python functions that the builtins were made of."""
    text = Path(source.__file__).read_text(encoding="utf-8")
    module = ast.parse(text)
    made: dict[str, Any] = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    exec(compile(module, source.__file__, "exec"), made)
    return {name: made[name] for name in NAMES}


PROTOTYPES = prototypes()


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


@pytest.mark.parametrize("name", NAMES[:3])
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


ONE_LEVEL_TREES: list[Any] = [
    (),
    (1, [2]),
    [],
    [None, {"a": 1}],
    {},
    {"b": 1, "a": [2]},
    {3: 1, "a": 2, (1, 2): 3},
    {"ä": 1, "z": 2, "日本": 3},
]


@pytest.mark.parametrize("tree", ONE_LEVEL_TREES, ids=repr)
def test_one_level_is_the_same_with_and_without_python(tree: Any) -> None:
    quick = optree.tree_flatten_one_level(tree)
    # A predicate, even one that never applies, is left to the Python function.
    slow = optree.tree_flatten_one_level(tree, lambda _: False)
    assert type(quick) is type(slow)
    assert quick == slow
    assert vars(quick) == vars(slow)
    assert [type(part) for part in quick] == [type(part) for part in slow]
    if isinstance(tree, dict):
        ours, theirs = quick.metadata, slow.metadata
        assert list(ours.original_keys) == list(theirs.original_keys) == list(tree)
        assert type(ours.original_keys) is type(theirs.original_keys) is dict
        assert pickle.loads(pickle.dumps(ours)).original_keys == ours.original_keys
    rebuilt = quick.unflatten_func(quick.metadata, quick.children)
    assert type(rebuilt) is type(tree)
    assert rebuilt == tree
    assert list(rebuilt) == list(tree)


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
    pair = (list, {})
    with pytest.raises(TypeError, match="expected subclasses of tuple and list"):
        _C.set_one_level(list, list, pair, pair, pair)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected \(unflatten_func, attributes\)"):
        _C.set_one_level(tuple, list, pair, 3, pair)  # type: ignore[arg-type]
