# SPDX-License-Identifier: Apache-2.0
"""Registration preserves the type of the class and requires a namespace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typing_extensions import assert_type

import optree
from optree import GetAttrEntry


class Bag:
    def __init__(self, items: Iterable[int]) -> None:
        self.items = list(items)


def registration() -> None:
    registered = optree.register_pytree_node(
        Bag,
        lambda bag: (bag.items, None),
        lambda _, items: Bag(items),
        namespace="bags",
    )
    assert_type(registered, type[Bag])
    entry = optree.unregister_pytree_node(Bag, namespace="bags")
    assert_type(entry.type, type[Any])
    optree.register_pytree_node(
        Bag,
        lambda bag: (bag.items, None),
        lambda _, items: Bag(items),
        path_entry_type=GetAttrEntry,
        namespace=optree.GLOBAL_NAMESPACE,
    )
    with optree.dict_insertion_ordered(True, namespace="bags") as nothing:
        assert_type(nothing, None)


def class_decorators() -> None:
    @optree.register_pytree_node_class(namespace="pairs")
    class Pair:
        def __init__(self, first: int, second: int) -> None:
            self.first, self.second = first, second

        def __tree_flatten__(self) -> tuple[tuple[int, int], None]:
            return (self.first, self.second), None

        @classmethod
        def __tree_unflatten__(cls, metadata: None, children: tuple[int, int]) -> Pair:
            return cls(*children)

    assert_type(Pair(1, 2), Pair)
    assert_type(optree.tree_leaves(Pair(1, 2), namespace="pairs"), list[int])
    Pair("1", 2)  # type: ignore[arg-type]


def wrong_arguments(flatten: Any, unflatten: Any) -> None:
    optree.register_pytree_node(Bag, flatten, unflatten)  # type: ignore[call-arg]
    optree.register_pytree_node(3, flatten, unflatten, namespace="bags")  # type: ignore[type-var]
    optree.register_pytree_node(Bag, flatten, unflatten, namespace=None)  # type: ignore[arg-type]
    optree.register_pytree_node(
        Bag,
        flatten,
        unflatten,
        path_entry_type=int,  # type: ignore[arg-type]
        namespace="bags",
    )
    optree.dict_insertion_ordered(True)  # type: ignore[call-arg]
