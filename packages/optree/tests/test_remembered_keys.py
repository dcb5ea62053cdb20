# SPDX-License-Identifier: Apache-2.0
"""The caches of keys and classes: what they hold, for how long, and that they never go stale."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from trees import Unsortable

import optree


def text(letters: str) -> str:
    """Return equal text, but a new object at each call."""
    return "".join(list(letters))


# Each function makes new keys of one kind at every call.
ATOMIC_KEYS: dict[str, Callable[[], list[Any]]] = {
    "ascii": lambda: [text(f"key{i}") for i in (3, 1, 2)],
    "latin": lambda: [text(f"k\u00e9y{i}") for i in (3, 1, 2)],
    "greek": lambda: [text(f"\u03bb{i}") for i in (3, 1, 2)],
    "emoji": lambda: [text(f"\U0001f600{i}") for i in (3, 1, 2)],
    "one_greek": lambda: [text("key"), text("\u03bb"), text("kex")],
    "int": lambda: [1000 + int(i) for i in "312"],
    "large_int": lambda: [2**70 + int(i) for i in "312"],
    "negative_int": lambda: [-(2**70) - int(i) for i in "312"],
    "float": lambda: [float(i) for i in ("3.5", "-0.0", "inf")],
    "bool_and_int": lambda: [1000 + int("0"), True, False],
    "complex": lambda: [complex(0, int(i)) for i in "312"],
    "bytes": lambda: [bytes([65, i]) for i in (3, 1, 2)],
    "none": lambda: [text("some text"), None],
    "str_and_int": lambda: [text("key3"), 1000 + int("7"), text("key1")],
    "tuple": lambda: [(text("layer"), 1000 + int(i)) for i in "312"],
    "nested_tuple": lambda: [((text("a"), float(i)), None, ()) for i in "312"],
    "mixed": lambda: [text("a b"), 1000 + int("1"), (1000 + int("2"),), None, 1.5],
}
LOOSE_KEYS: dict[str, Callable[[], list[Any]]] = {
    "object": lambda: [Unsortable(i) for i in "312"],
    "object_in_tuple": lambda: [(1, Unsortable(i)) for i in "312"],
    "class": lambda: [type(f"Key{i}", (), {}) for i in "312"],
}
EVERY_KEY = {**ATOMIC_KEYS, **LOOSE_KEYS}
MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda items: defaultdict(None, items),
    "dict_with_a_hole": lambda items: without_first({"removed": 0, **items}),
}


def without_first(items: dict[Any, Any]) -> dict[Any, Any]:
    del items["removed"]
    return items


@pytest.mark.parametrize("make_keys", EVERY_KEY.values(), ids=EVERY_KEY)
@pytest.mark.parametrize("make", MAPPINGS.values(), ids=MAPPINGS)
def test_answers_do_not_depend_on_what_is_remembered(
    make: Callable[[dict[Any, Any]], Any], make_keys: Callable[[], list[Any]]
) -> None:
    optree.clear_caches()
    keys = make_keys()
    mapping = make(dict.fromkeys(keys))
    for i, key in enumerate(keys):
        mapping[key] = i
    order = list(mapping) if isinstance(mapping, OrderedDict) else ordered(keys)
    for _ in range(6):
        leaves, treespec = optree.tree_flatten(mapping)
        assert leaves == [mapping[key] for key in order]
        assert treespec.entries() == order
        rebuilt = treespec.unflatten([10 + leaf for leaf in leaves])
        assert list(rebuilt.items()) == [(key, 10 + value) for key, value in mapping.items()]
        # A mapping with equal keys that are other objects has its own leaves.
        other = make(dict.fromkeys(make_keys(), "x"))
        assert optree.tree_leaves(other) == ["x"] * len(keys)


def ordered(keys: list[Any]) -> list[Any]:
    return optree.utils.total_order_sorted(keys)


@pytest.mark.parametrize("make_keys", ATOMIC_KEYS.values(), ids=ATOMIC_KEYS)
def test_keys_that_never_change_are_found_again(make_keys: Callable[[], list[Any]]) -> None:
    optree.clear_caches()
    first = make_keys()
    mapping = dict.fromkeys(first, 0)
    for _ in range(3):
        optree.tree_flatten(mapping)
    # Equal keys that are other objects are found as well: the spec holds the keys seen first.
    entries = optree.tree_structure(dict.fromkeys(make_keys(), 0)).entries()
    assert {id(key) for key in entries} <= {id(key) for key in first}


def test_keys_that_are_equal_but_not_the_same_are_distinguished() -> None:
    for zero, other in ((0.0, -0.0), (1, True), (1, 1.0), ((0.0,), (-0.0,)), (b"", "")):
        for keys in ([zero, "z"], ["a", zero], [("t", zero)]):
            optree.clear_caches()
            like = [other if key is zero else (("t", other) if type(key) is tuple else key)
                    for key in keys]  # fmt: skip
            for _ in range(4):
                optree.tree_flatten(dict.fromkeys(keys))
            entries = optree.tree_structure(dict.fromkeys(like), none_is_leaf=True).entries()
            assert sorted(map(repr, entries)) == sorted(map(repr, like))


@pytest.mark.parametrize("make_keys", LOOSE_KEYS.values(), ids=LOOSE_KEYS)
def test_objects_of_yours_are_not_kept(
    make_keys: Callable[[], list[Any]], request: pytest.FixtureRequest
) -> None:
    if make_keys is LOOSE_KEYS["class"]:
        request.getfixturevalue("classes_can_die")
    keys = make_keys()
    for _ in range(4):
        optree.tree_flatten(dict.fromkeys(keys))
    kept = keys[0][1] if isinstance(keys[0], tuple) else keys[0]
    reference = weakref.ref(kept)
    del keys, kept
    gc.collect()
    assert reference() is None


def remembered_bytes(make_mapping: Callable[[int], Any], rounds: int) -> list[int]:
    optree.clear_caches()
    gc.collect()
    tracemalloc.start()
    try:
        held = []
        for i in range(rounds):
            mapping = make_mapping(i)
            for _ in range(3):
                leaves, treespec = optree.tree_flatten(mapping)
                treespec.unflatten(leaves)
            del mapping, leaves, treespec
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        optree.clear_caches()
        held.append(tracemalloc.get_traced_memory()[0])
        return held
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make_mapping",
    [
        lambda n: {f"{n}-{i}-" + "x" * 100_000: i for i in range(40)},
        lambda n: {(n, i, "x" * 100_000 + str(i)): i for i in range(40)},
        lambda n: {(1 << 800_000) + 100 * n + i: i for i in range(40)},
        lambda n: OrderedDict((f"{n}-{i}", i) for i in range(6000)),
        lambda n: {(f"{n}-{i}", i): i for i in range(6000)},
    ],
    ids=["long_texts", "long_texts_in_tuples", "large_ints", "many_keys", "many_tuples"],
)
def test_what_is_remembered_is_bounded_in_bytes_and_can_be_dropped(
    make_mapping: Callable[[int], Any],
) -> None:
    *held, after = remembered_bytes(make_mapping, 8)
    assert max(held) < 20 * 2**20
    assert max(held) > 10**5  # the cache does hold something
    assert after < 3 * 10**5


def test_keys_too_large_to_be_remembered_are_flattened_all_the_same() -> None:
    mapping = {f"{i}-" + "x" * 1_000_000: i for i in range(9)}
    *held, _ = remembered_bytes(lambda _: dict(mapping), 3)
    assert max(held) < 10**6
    assert optree.tree_leaves(mapping) == list(range(9))


def test_what_a_thread_remembers_is_dropped_at_once_and_goes_with_it() -> None:
    def remember() -> int:
        mapping = {f"{i}-" + "x" * 100_000: i for i in range(40)}
        for _ in range(3):
            optree.tree_leaves(mapping)
        del mapping
        held = tracemalloc.get_traced_memory()[0]
        if clear:
            optree.clear_caches()
        return held - tracemalloc.get_traced_memory()[0]

    for clear in (True, False):
        optree.clear_caches()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            with ThreadPoolExecutor(1) as pool:
                freed = pool.submit(remember).result()
            assert freed > 10**6 or not clear
            optree.clear_caches()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < 3 * 10**5
        finally:
            tracemalloc.stop()


# ---- cycles


class Key:
    """A key that holds structures in which it is itself a key."""


RELATIVES: dict[str, Callable[[Any], list[Any]]] = {
    "itself": lambda spec: [spec],
    "one_level": lambda spec: [spec, spec.one_level()],
    "compose": lambda spec: [spec, spec.compose(spec), spec.compose(optree.treespec_leaf())],
    "children": lambda spec: [spec.compose(spec), *spec.compose(spec).children()],
    "copy": lambda spec: [spec, spec.__copy__(), spec.transform()],
    "broadcast": lambda spec: [spec, spec.broadcast_to_common_suffix(spec)],
    "collection": lambda spec: [optree.treespec_list([spec, spec]), optree.treespec_dict(a=spec)],
}


@pytest.mark.parametrize("relatives", RELATIVES.values(), ids=RELATIVES)
@pytest.mark.parametrize("make", list(MAPPINGS.values())[:3], ids=list(MAPPINGS)[:3])
def test_cycles_through_keys_are_collected(
    make: Callable[[dict[Any, Any]], Any], relatives: Callable[[Any], list[Any]]
) -> None:
    key = Key()
    key.specs = relatives(optree.tree_structure(make({key: 1})))  # type: ignore[attr-defined]
    reference = weakref.ref(key)
    del key
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("relatives", RELATIVES.values(), ids=RELATIVES)
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.usefixtures("classes_can_die")
def test_cycles_through_registrations_are_collected(
    relatives: Callable[[Any], list[Any]], registered: bool
) -> None:
    class Node:
        def __init__(self, *items: Any) -> None:
            self.items = items

    optree.register_pytree_node(
        Node, lambda node: (node.items, None), lambda _, items: items, namespace="cycles"
    )
    specs = relatives(optree.tree_structure([Node(1), Node(2)], namespace="cycles"))
    Node.SPECS = specs  # type: ignore[attr-defined]
    if registered:  # the registry keeps registered classes alive
        gc.collect()
        assert specs[0].type is not None
    optree.unregister_pytree_node(Node, namespace="cycles")
    reference = weakref.ref(Node)
    del Node, specs
    gc.collect()
    assert reference() is None


def test_cycles_through_iterators_and_metadata_are_collected() -> None:
    key = Key()
    node = optree.tree_flatten_one_level({key: 1, "b": 2})
    key.parts = [node, optree.tree_iter([{key: 1}])]  # type: ignore[attr-defined]
    reference = weakref.ref(key)
    del key, node
    gc.collect()
    assert reference() is None


# ---- OrderedDicts changed through the methods of dict

BEHIND: dict[str, Callable[[OrderedDict[str, int]], Any]] = {
    "popitem": dict.popitem,
    "popitem_and_set": lambda od: (dict.popitem(od), dict.__setitem__(od, "d", 4)),
    "popitem_and_set_again": lambda od: (dict.popitem(od), dict.__setitem__(od, "c", 4)),
    "clear": dict.clear,
    "refill": lambda od: (dict.clear(od), dict.update(od, x=1, y=2, z=3)),
    "refill_in_the_middle": lambda od: (dict.clear(od), dict.update(od, a=1, q=2, c=3)),
    "refill_alike": lambda od: (dict.clear(od), dict.update(od, a=4, b=5, c=6)),
    "set": lambda od: dict.__setitem__(od, "d", 4),
    "set_many": lambda od: dict.update(od, {str(i): i for i in range(30)}),
    "set_value": lambda od: dict.__setitem__(od, "b", 9),
    "delete": lambda od: dict.__delitem__(od, "b"),
    "delete_first": lambda od: dict.__delitem__(od, "a"),
    "delete_and_set": lambda od: (dict.__delitem__(od, "b"), dict.__setitem__(od, "b", 9)),
    "delete_last_and_set": lambda od: (dict.pop(od, "c"), dict.__setitem__(od, "c", 9)),
    "empty_and_set": lambda od: (od.clear(), dict.__setitem__(od, "x", 1)),
    "setdefault": lambda od: dict.setdefault(od, "e", 5),
    "update": lambda od: dict.update(od, a=7),
    # Changes through its own methods, for comparison.
    "moved": lambda od: od.move_to_end("a"),
    "popped": lambda od: od.pop("b"),
    "popped_and_set": lambda od: (od.pop("c"), od.update(d=4)),
    "last_popped": lambda od: od.popitem(),
    "emptied": OrderedDict.clear,
}


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except KeyError as ex:
        return repr(ex)


@pytest.mark.parametrize("change", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("times", range(4))
def test_ordered_dicts_are_what_they_say_they_are(change: Callable[[Any], Any], times: int) -> None:
    def make() -> OrderedDict[str, int]:
        ordered = OrderedDict(a=1, b=2, c=3)
        change(ordered)
        return ordered

    optree.clear_caches()
    for _ in range(times):  # fills the cache with the keys before and after the change
        optree.tree_leaves(OrderedDict(a=1, b=2, c=3))
        with_dict_keys = OrderedDict.fromkeys(dict.keys(make()), 0)
        optree.tree_leaves(with_dict_keys)
        outcome(lambda: optree.tree_leaves(make()))
    ordered = make()
    expected = outcome(lambda: list(make().items()))
    for nest in (lambda tree: tree, lambda tree: [tree, 0], lambda tree: {"k": tree}):
        found = outcome(lambda: optree.tree_flatten_with_path(nest(ordered)))  # noqa: B023
        if isinstance(expected, str):
            assert found == expected
        else:
            paths, leaves, treespec = found
            pairs = [(path[-1], leaf) for path, leaf in zip(paths, leaves)]
            assert [pair for pair in pairs if isinstance(pair[0], str)] == expected
            assert treespec.num_leaves == len(leaves)
    if isinstance(expected, str):
        for function in (optree.tree_flatten_one_level, optree.tree_structure, list_of_leaves):
            assert outcome(lambda: function(ordered)) == expected  # noqa: B023
    else:
        assert optree.tree_flatten_one_level(ordered).children == [value for _, value in expected]
        assert list_of_leaves(ordered) == [value for _, value in expected]


def list_of_leaves(tree: Any) -> list[Any]:
    return list(optree.tree_iter(tree))


@pytest.mark.usefixtures("classes_can_die")
def test_thousands_of_classes_come_and_go() -> None:
    classes = [type("Tuple", (tuple,), {}) for _ in range(3000)]
    assert len(optree.tree_leaves([cls((1,)) for cls in classes])) == 3000
    references = [weakref.ref(cls) for cls in classes]
    for cls in classes:
        optree.register_pytree_node(
            cls, lambda t: (tuple(t), None), lambda _, items: items, namespace="many"
        )
    assert len(optree.tree_leaves([cls((1, 2)) for cls in classes], namespace="many")) == 6000
    for cls in classes[::2] + classes[1::2]:
        optree.unregister_pytree_node(cls, namespace="many")
    assert len(optree.tree_leaves([cls((1, 2)) for cls in classes], namespace="many")) == 3000
    del classes, cls
    gc.collect()
    assert not any(reference() for reference in references)
