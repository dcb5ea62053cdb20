# SPDX-License-Identifier: Apache-2.0
"""The lazy iterator over leaves."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
from trees import Opaque, Pair, nested_lists

import optree


def test_iterates_leaves_in_order() -> None:
    iterator = optree.tree_iter({"b": (2, [3]), "a": 1, "c": None})
    assert iter(iterator) is iterator
    assert [*iterator] == [1, 2, 3]
    assert next(iterator, "end") == "end"
    assert next(iterator, "end") == "end"
    with pytest.raises(StopIteration):
        next(iterator)


def test_type_of_the_iterator() -> None:
    iterator = optree.tree_iter([1])
    assert type(iterator) is optree._C.PyTreeIter
    assert type(iterator).__module__ == "optree"
    assert type(iterator).__name__ == "PyTreeIter"
    assert not hasattr(iterator, "__length_hint__")
    assert not hasattr(iterator, "__dict__")
    assert gc.is_tracked(iterator)
    assert weakref.ref(iterator)() is iterator
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(iterator)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.copy(iterator)


def test_constructor() -> None:
    assert list(optree._C.PyTreeIter([1, None])) == [1]
    assert list(optree._C.PyTreeIter([1, None], None, True, "")) == [1, None]
    assert list(optree._C.PyTreeIter([1, None], leaf_predicate=None, none_is_leaf=True)) == [
        1,
        None,
    ]
    assert list(optree._C.PyTreeIter([[1]], lambda x: x == [1], namespace="x")) == [[1]]
    for arguments in ((), ([1], 3), ([1], None, False, 3)):
        with pytest.raises(TypeError):
            optree._C.PyTreeIter(*arguments)


def test_is_lazy() -> None:
    visited: list[Any] = []
    iterator = optree.tree_iter([1, [2, 3]], is_leaf=lambda x: visited.append(x))
    assert visited == []
    assert next(iterator) == 1
    assert visited == [[1, [2, 3]], 1]
    assert next(iterator) == 2
    assert visited == [[1, [2, 3]], 1, [2, 3], 2]


def test_children_are_read_when_their_container_is_reached() -> None:
    inner = {"x": 1}
    tree = {"a": 0, "b": inner}
    iterator = optree.tree_iter(tree)
    assert next(iterator) == 0
    tree["c"] = 99
    inner["y"] = 2
    assert list(iterator) == [1, 2]
    items: list[Any] = [1, 2, 3]
    iterator = optree.tree_iter(items)
    assert next(iterator) == 1
    items.clear()
    assert list(iterator) == [2, 3]


def test_dict_order_mode_is_read_at_construction() -> None:
    tree = {"b": 1, "a": 2}
    with optree.dict_insertion_ordered(True, namespace="lazy"):
        inserted = optree.tree_iter(tree, namespace="lazy")
    ordered = optree.tree_iter(tree, namespace="lazy")
    with optree.dict_insertion_ordered(True, namespace="lazy"):
        assert list(ordered) == [2, 1]
    assert list(inserted) == [1, 2]


def test_exceptions_propagate_and_end_nothing_else() -> None:
    def predicate(x: Any) -> bool:
        if x == 2:
            raise LookupError("predicate")
        return False

    iterator = optree.tree_iter([1, 2, 3], is_leaf=predicate)
    assert next(iterator) == 1
    with pytest.raises(LookupError, match="^predicate$"):
        next(iterator)


def test_reentering_from_the_predicate_is_an_error() -> None:
    errors: list[str] = []
    iterator: Any = None

    def predicate(x: Any) -> bool:
        try:
            next(iterator)
        except RuntimeError as error:
            errors.append(str(error))
        return False

    iterator = optree.tree_iter([1], is_leaf=predicate)
    assert list(iterator) == [1]
    assert errors == ["PyTreeIter is already iterating."] * 2


def test_reentering_from_a_flatten_function_is_an_error() -> None:
    class Node:
        pass

    def flatten(node: Node) -> Any:
        next(iterator)
        return (), None

    optree.register_pytree_node(Node, flatten, lambda m, c: Node(), namespace="reenter")
    try:
        iterator = optree.tree_iter([Node()], namespace="reenter")
        with pytest.raises(RuntimeError, match=r"^PyTreeIter is already iterating\.$"):
            next(iterator)
    finally:
        optree.unregister_pytree_node(Node, namespace="reenter")


def test_depth_limit() -> None:
    limit = optree.MAX_RECURSION_DEPTH
    assert list(optree.tree_iter(nested_lists(limit, 5))) == [5]
    with pytest.raises(
        RecursionError, match=r"^Maximum recursion depth exceeded during flattening the tree\.$"
    ):
        list(optree.tree_iter(nested_lists(limit + 1)))


@pytest.mark.parametrize("place", ["root", "pending", "predicate"])
def test_cycles_through_the_iterator_are_collected(place: str) -> None:
    witness = Opaque()
    watched = weakref.ref(witness)
    box: list[Any] = [1, [witness], [2]]
    if place == "predicate":

        def predicate(x: Any, kept: Any = box) -> bool:
            return False

        iterator = optree.tree_iter([1, 2], is_leaf=predicate)
    else:
        iterator = optree.tree_iter(box)
    if place == "pending":
        assert next(iterator) == 1
    box.append(iterator)
    del iterator, box, witness
    if place == "predicate":
        del predicate
    gc.collect()
    assert watched() is None


def test_an_exhausted_iterator_lets_go_of_the_tree() -> None:
    witness = Opaque()
    watched = weakref.ref(witness)
    iterator = optree.tree_iter([(witness,), Pair(1, 2)])
    assert len(list(iterator)) == 3
    del witness
    gc.collect()
    del iterator
    assert watched() is None


def test_registrations_between_two_leaves_count() -> None:
    class Pair:
        def __init__(self, *items: int) -> None:
            self.items = items

    a, b, c, d = (Pair(i, i + 1) for i in range(4))
    iterator = optree.tree_iter([a, b, {"x": c}, d], namespace="iterated")
    assert next(iterator) is a
    optree.register_pytree_node(
        Pair, lambda p: (p.items, None), lambda _, items: Pair(*items), namespace="iterated"
    )
    assert [next(iterator), next(iterator)] == [1, 2]
    optree.unregister_pytree_node(Pair, namespace="iterated")
    assert next(iterator) is c
    assert [*iterator] == [d]


@pytest.mark.usefixtures("classes_can_die")
def test_an_exhausted_iterator_lets_go_of_the_class_of_its_leaves() -> None:
    class Leaf:
        pass

    iterator = optree.tree_iter([Leaf(), Leaf()])
    died = weakref.ref(Leaf)
    assert len([*iterator]) == 2
    del Leaf
    gc.collect()
    assert died() is None
    assert [*iterator] == []


def test_leaves_of_one_class_do_not_let_a_predicate_in() -> None:
    seen: list[object] = []

    def predicate(obj: object) -> bool:
        seen.append(obj)
        return obj == 2

    assert list(optree.tree_iter([1, 2, (3, 4), 5], is_leaf=predicate)) == [1, 2, 3, 4, 5]
    assert seen == [[1, 2, (3, 4), 5], 1, 2, (3, 4), 3, 4, 5]
