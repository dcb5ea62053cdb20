# SPDX-License-Identifier: Apache-2.0
"""Functions that apply to some of the leaves or to some of the attributes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Union

import pytest
from trees import TREES, TreeRow

import optree


def test_all_and_any_of_a_type_ask_about_no_other_leaf_and_stop_early() -> None:
    asked: list[Any] = []

    def is_positive(x: int) -> bool:
        asked.append(x)
        return x > 0

    tree = {"a": 1, "b": ["text", -2, None, 3.5], "c": 4}
    for kind in (int, (int,), Union[int, bytes], lambda x: type(x) is int):
        asked.clear()
        assert not optree.tree_all_only(kind, is_positive, tree)
        assert asked == [1, -2]
        asked.clear()
        assert optree.tree_any_only(kind, is_positive, tree)
        assert asked == [1]
    for kind in (bytes, complex):
        assert optree.tree_all_only(kind, is_positive, tree)
        assert not optree.tree_any_only(kind, is_positive, tree)
    assert optree.tree_all_only(type(None), bool, tree)
    assert not optree.tree_all_only(type(None), bool, tree, none_is_leaf=True)
    assert optree.tree_any_only(list, len, tree, lambda x: isinstance(x, list))


@pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
def test_a_leaf_is_replaced_at_its_place(row: TreeRow) -> None:
    tree, name = row.make(), {"namespace": row.namespace}
    leaves, treespec = optree.tree_flatten(tree, **name)
    for places in (treespec.paths(), treespec.accessors()):
        for i, place in list(enumerate(places))[:12]:
            made = optree.tree_replace_at(place, "new", tree, **name)
            assert optree.tree_structure(made, **name) == treespec
            expected = [*leaves[:i], "new", *leaves[i + 1 :]]
            assert optree.tree_leaves(made, **name) == expected
    assert optree.tree_leaves(tree, **name) == leaves


def test_only_the_nodes_on_the_way_are_rebuilt() -> None:
    tree = {"a": [1, {"b": 2}], "c": [3]}
    made = optree.tree_replace_at(("a", 1, "b"), [4, 5], tree)
    assert made == {"a": [1, {"b": [4, 5]}], "c": [3]}
    assert list(made) == list(tree)
    assert made["c"] is tree["c"]
    assert optree.tree_replace_at((), 6, tree) == 6
    assert optree.tree_replace_at(("a",), 6, tree) == {"a": 6, "c": [3]}
    for path in (("x",), ("a", 2), ("c", 0, "d"), ("a", -1)):
        with pytest.raises(KeyError, match="^['\"]Expected "):
            optree.tree_replace_at(path, 0, tree)
    with pytest.raises(KeyError):
        optree.tree_replace_at(("a", 0), 0, tree, is_leaf=lambda x: isinstance(x, list))


def test_static_objects_are_structure() -> None:
    class Option:
        def __init__(self, value: Any) -> None:
            self.value = value

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Option) and self.value == other.value

        __hash__ = None  # type: ignore[assignment]

    assert optree.register_static(Option, namespace="static options") is Option
    try:
        tree = [1, Option("x"), {"k": Option("y")}]
        leaves, treespec = optree.tree_flatten(tree, namespace="static options")
        assert leaves == [1]
        made = treespec.unflatten([2])
        assert made[1] is tree[1]
        same, other = [3, Option("x"), {"k": Option("y")}], [3, Option("z"), {"k": Option("y")}]
        assert treespec == optree.tree_structure(same, namespace="static options")
        assert treespec != optree.tree_structure(other, namespace="static options")
        assert treespec.flatten_up_to(same) == [3]
        with pytest.raises(ValueError, match="Mismatch custom node data"):
            treespec.flatten_up_to(other)
        with pytest.raises(ValueError, match="already registered"):
            optree.register_static(Option, namespace="static options")
    finally:
        optree.unregister_pytree_node(Option, namespace="static options")


def test_fields_are_named_outside_of_the_class() -> None:
    @dataclasses.dataclass
    class Layer:
        weight: Any
        name: str
        bias: Any = 0
        cache: Any = dataclasses.field(default=None, init=False)

    name = {"namespace": "named fields"}
    assert optree.register_dataclass(Layer, ["bias", "weight"], ["name"], **name) is Layer
    try:
        tree = Layer([1, 2], "fc", 3)
        leaves, treespec = optree.tree_flatten(tree, **name)
        assert leaves == [3, 1, 2]
        assert treespec.unflatten([30, 10, 20]) == Layer([10, 20], "fc", 30)
        assert treespec != optree.tree_structure(Layer([1, 2], "other", 3), **name)
        codes = [accessor.codify("x") for accessor in treespec.accessors()]
        assert codes == ["x.bias", "x.weight[0]", "x.weight[1]"]
        assert [accessor(tree) for accessor in treespec.accessors()] == leaves
    finally:
        optree.unregister_pytree_node(Layer, **name)


def test_fields_are_checked() -> None:
    def make() -> Any:
        return dataclasses.make_dataclass("Fields", ["x", "y", ("z", int, 3)])

    for data, meta, error in [
        (["x"], [], ValueError),  # y is missing
        (["x", "y", "w"], [], ValueError),
        (["x", "y"], ["x"], ValueError),
        (["x", 1], ["y"], TypeError),
    ]:
        cls = make()
        with pytest.raises(error, match="^Expected "):
            optree.register_dataclass(cls, data, meta, namespace="checked fields")
        assert optree.tree_leaves(cls(1, 2), namespace="checked fields") == [cls(1, 2)]
    with pytest.raises(TypeError, match="^Expected a class"):
        optree.register_dataclass(3, [], namespace="checked fields")  # type: ignore[type-var]

    class Plain:  # deliberately not a dataclass
        def __init__(self, *, x: Any, mode: str) -> None:
            self.x, self.mode = x, mode

    optree.register_dataclass(Plain, ["x"], ["mode"], namespace="checked fields")
    try:
        made = optree.tree_map(lambda x: -x, Plain(x=1, mode="m"), namespace="checked fields")
        assert (type(made), made.x, made.mode) == (Plain, -1, "m")
    finally:
        optree.unregister_pytree_node(Plain, namespace="checked fields")


def test_new_functions_have_short_names_too() -> None:
    copy = optree.pytree.reexport(namespace="short names", module="short_names_pytree")
    for name in ("all_only", "any_only", "combine", "leaves_with_path", "map_only", "replace_at"):
        assert getattr(optree.pytree, name) is getattr(optree, f"tree_{name}")
        assert callable(getattr(copy, name))
    assert copy.map_only(int, lambda x: -x, [1, "a"]) == [-1, "a"]
    for name in ("all_leaves", "prefix_errors", "register_dataclass", "register_static"):
        assert getattr(optree.pytree, name) is getattr(optree, name)
        assert inspect.signature(getattr(copy, name)).parameters["namespace"].default == (
            "short names"
        )
    for name in ("keystr", "treespec_dumps", "treespec_loads"):
        assert getattr(optree.pytree, name) is getattr(optree, name)
        assert getattr(copy, name) is getattr(optree, name)
