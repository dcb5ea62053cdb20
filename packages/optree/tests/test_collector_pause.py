# SPDX-License-Identifier: Apache-2.0
"""No collection starts while a large tree is rebuilt, and user code sees the collector enabled."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from trees import NAMESPACE, Pair, Point

import optree

COUNT = 1000
puts_off = pytest.mark.skipif(
    optree._C.Py_GIL_DISABLED or sys.version_info < (3, 10) or sys.implementation.name != "cpython",
    reason="this interpreter does not defer collections",
)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    gc.enable()
    gc.set_threshold(500, 1000, 1000)
    yield
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


def starts_of(action: Callable[[], Any]) -> int:
    """Return how many collections start in 20 calls."""
    starts: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        starts.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        for _ in range(20):
            action()
    finally:
        gc.callbacks.remove(note)
    return starts.count("start")


@puts_off
@pytest.mark.parametrize(
    "node", [Point, lambda x, y: {"x": x, "y": y}, lambda x, y: OrderedDict(x=x, y=y)]
)
def test_rebuilding_a_large_tree_starts_no_collection(node: Callable[[Any, Any], Any]) -> None:
    leaves, treespec = optree.tree_flatten([node(0, 1) for _ in range(COUNT)])
    assert starts_of(lambda: treespec.unflatten(leaves)) == 0
    kept: list[Any] = []
    assert starts_of(lambda: kept.append(treespec.unflatten(leaves))) >= 10


class Key:
    """A key whose hash is Python code."""

    def __init__(self, name: str, note: Callable[[], Any]) -> None:
        self.name = name
        self.note = note

    def __hash__(self) -> int:
        self.note()
        return hash(self.name)

    def __lt__(self, other: Key) -> bool:
        return self.name < other.name


class Noting(Point):
    """A named tuple with a constructor of its own."""

    note: Callable[[], Any] = staticmethod(lambda: None)

    def __new__(cls, x: Any, y: Any) -> Noting:
        cls.note()
        return super().__new__(cls, x, y)


def noting_rebuild(place: str, note: Callable[[], Any]) -> Callable[[], Any]:
    """Return a rebuild of a large tree that calls `note` at one place."""
    Noting.note = NotingPair.note = staticmethod(lambda: None)
    noting: Any = {
        "key": lambda: {Key("a", note): 0},
        "ordered key": lambda: OrderedDict([(Key("a", note), 0)]),
        "named tuple": lambda: Noting(0, 1),
        "custom": lambda: NotingPair(0, 1),
        "leaves": list,
    }[place]()
    many = [Point(0, 1) for _ in range(COUNT)]
    tree = [many, noting, many]
    leaves, treespec = optree.tree_flatten(tree, namespace=NAMESPACE)

    def noting_leaves() -> Iterator[Any]:
        for leaf in leaves:
            note()
            yield leaf

    def rebuild() -> Any:
        Noting.note = NotingPair.note = staticmethod(note)
        return treespec.unflatten(noting_leaves() if place == "leaves" else leaves)

    return rebuild


class NotingPair(Pair):
    """A custom node that notes when it is rebuilt."""

    note: Callable[[], Any] = staticmethod(lambda: None)


def rebuild_pair(_: None, children: Any) -> NotingPair:
    NotingPair.note()
    return NotingPair(*children)


optree.register_pytree_node(
    NotingPair, lambda pair: ((pair.left, pair.right), None), rebuild_pair, namespace=NAMESPACE
)
every_place = pytest.mark.parametrize(
    "place", ["key", "ordered key", "named tuple", "custom", "leaves"]
)


@every_place
def test_python_code_in_between_finds_the_collector_on(place: str) -> None:
    seen: list[bool] = []
    rebuild = noting_rebuild(place, lambda: seen.append(gc.isenabled()))
    seen.clear()
    rebuild()
    assert seen
    assert all(seen)
    assert gc.isenabled()


@every_place
def test_the_collector_is_left_on_by_an_error(place: str) -> None:
    armed = False

    def fail() -> None:
        if armed:
            raise ZeroDivisionError

    rebuild = noting_rebuild(place, fail)
    armed = True
    with pytest.raises(ZeroDivisionError):
        rebuild()
    assert gc.isenabled()


@every_place
def test_the_collector_may_be_turned_off_in_between(place: str) -> None:
    rebuild = noting_rebuild(place, lambda: None)
    rebuild()
    assert gc.isenabled()
    rebuild = noting_rebuild(place, gc.disable)
    gc.enable()
    rebuild()
    assert not gc.isenabled()
    rebuild = noting_rebuild(place, lambda: None)
    rebuild()
    assert not gc.isenabled()
