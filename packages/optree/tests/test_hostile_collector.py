# SPDX-License-Identifier: Apache-2.0
"""A collector that runs at every allocation and reads every object it tracks.

Python before 3.12 collects during allocations, so a collector callback or a finalizer can run in
the middle of any C function. The callback of these tests reads each tracked object, and checks
that the length of a container equals the number of items that the collector finds in it. This
detects tuples with empty slots, lists whose size exceeds their items, and unfinished objects of
this package.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from trees import NAMESPACE, TREES, Empty, Layer, Module, Point, Point3, TreeRow, Unsortable

import optree

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

SPEC = type(optree.tree_structure(0))
FREE_THREADED = optree._C.Py_GIL_DISABLED


class Reader:
    """Reads all objects younger than itself whenever a collection starts."""

    def __init__(self) -> None:
        self.reads = 0
        self.faults: list[str] = []

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            return
        for obj in gc.get_objects(generation=0):
            self.reads += 1
            cls = type(obj)
            if issubclass(cls, tuple):
                self.count(obj, tuple.__len__(obj), cls is not tuple)
            elif issubclass(cls, list):
                self.count(obj, list.__len__(obj), cls is not list)
            elif cls is SPEC:
                self.attempt(repr, obj)
            elif cls.__module__ == "optree":
                self.attempt(gc.get_referents, obj)
            # Results of one-level flattening and their metadata must be complete.
            for name in ONE_LEVEL.get(cls.__name__, ()):
                if not hasattr(obj, name):
                    self.faults.append(f"a {cls.__name__} without {name!r}")

    def count(self, obj: Any, size: int, subclass: bool) -> None:
        # The collector skips empty slots. In an instance of a subclass it also finds the class and
        # the attributes, so only too few objects are a fault there.
        found = len(gc.get_referents(obj))
        if found < size or (not subclass and found != size):
            self.faults.append(f"{type(obj).__name__} of {size} with {gc.get_referents(obj)}")

    def attempt(self, function: Callable[[Any], Any], obj: Any) -> None:
        try:
            function(obj)
        except Exception as ex:
            self.faults.append(f"{function.__name__} of {type(obj).__name__}: {ex!r}")


ONE_LEVEL = {
    "FlattenOneLevelOutputEx": ("type", "path_entry_type", "kind"),
    "DictMetaData": ("original_keys",),
}


@contextlib.contextmanager
def hostile() -> Iterator[Reader]:
    """Collect at every allocation of a tracked object, and read all young objects."""
    reader = Reader()
    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(reader)
    # Without the GIL, CPython counts the allocations of a thread in steps of 512 and collects
    # between bytecodes. A second threshold of 0 stops the first from growing with the objects.
    gc.set_threshold(1, 0 if FREE_THREADED else 1000, 1000)
    try:
        yield reader
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(reader)


class Failure(Exception):
    """Raised on purpose."""


class FailAfter:
    """Raises at a given call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, *args: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise Failure
        return args[-1]


def walk_tree(tree: Any, same: Any, name: dict[str, Any]) -> None:
    leaves, treespec = optree.tree_flatten(tree, **name)
    optree.tree_leaves(tree, **name)
    optree.tree_structure(tree, **name)
    list(optree.tree_iter(tree, **name))
    optree.tree_flatten_with_path(tree, **name)
    optree.tree_flatten_with_accessor(tree, **name)
    optree.tree_flatten(tree, is_leaf=lambda x: False, none_is_leaf=True, **name)
    optree.all_leaves(leaves, **name)
    optree.tree_map(lambda *xs: xs, tree, tree, **name)
    optree.tree_map_(lambda x: [x], tree, **name)
    optree.tree_map_with_path(lambda path, x: [path, x], tree, **name)
    optree.tree_broadcast_map(lambda x, y: (x, y), tree, tree, **name)
    optree.tree_partition(lambda x: [x] != [1], tree, **name)
    treespec.unflatten(leaves)
    treespec.unflatten(iter(leaves))
    treespec.flatten_up_to(tree)


def walk_nodes(tree: Any, same: Any, name: dict[str, Any]) -> None:
    if not optree.tree_is_leaf(tree, **name):
        node = optree.tree_flatten_one_level(tree, **name)
        node.unflatten_func(node.metadata, tuple(node.children))
        getattr(node.metadata, "original_keys", None)
    treespec = optree.tree_structure(tree, **name)
    for child in treespec.children():
        child.one_level()


def walk_structure(tree: Any, same: Any, name: dict[str, Any]) -> None:
    treespec = optree.tree_structure(tree, **name)
    leaves = [0] * treespec.num_leaves
    other = optree.tree_structure(same, **name)
    assert treespec == other
    assert treespec.is_prefix(other)
    with contextlib.suppress(TypeError):  # unhashable keys
        hash(treespec)
    repr(treespec)
    treespec.paths()
    treespec.accessors()
    treespec.entries()
    treespec.compose(other)
    treespec.broadcast_to_common_suffix(other)
    treespec.transform(lambda node: node, lambda leaf: leaf)
    treespec.traverse(leaves, lambda node: node, lambda leaf: leaf)
    treespec.walk(leaves, lambda cls, data, children: [data, children], lambda leaf: leaf)
    copy.copy(treespec)
    state = treespec.__getstate__()
    treespec.__reduce__()
    made = SPEC.__new__(SPEC)
    made.__setstate__(state)
    assert made == treespec
    with contextlib.suppress(pickle.PicklingError, AttributeError):
        pickle.loads(pickle.dumps(treespec))


def fail_everywhere(tree: Any, same: Any, name: dict[str, Any]) -> None:
    """Make each user function fail at an early call and at a late one."""
    leaves, treespec = optree.tree_flatten(tree, **name)
    for calls in {0, treespec.num_leaves // 2, treespec.num_leaves - 1, treespec.num_nodes - 1}:
        if calls < 0:
            continue
        for action in (
            lambda: optree.tree_flatten(tree, is_leaf=lambda x: FAIL(x) is None, **name),
            lambda: optree.tree_map(FAIL, tree, **name),
            lambda: optree.tree_map_with_path(FAIL, tree, **name),
            lambda: optree.tree_map(lambda x: FAIL(x), tree, **name),
            lambda: treespec.unflatten(FAIL(x) for x in leaves),
            lambda: treespec.traverse(leaves, FAIL, FAIL),
            lambda: treespec.transform(FAIL, FAIL),
            lambda: list(optree.tree_iter(tree, is_leaf=lambda x: FAIL(x) is None, **name)),
        ):
            FAIL.calls = calls
            with contextlib.suppress(Failure):
                action()
    for mismatch in (3, (), [tree, tree], {"other": tree}, Point(1, None), OrderedDict(other=1)):
        with contextlib.suppress(ValueError):
            treespec.flatten_up_to(mismatch)
    for too_few_or_many in ([], [0] * (treespec.num_leaves + 1)):
        with contextlib.suppress(ValueError):
            treespec.unflatten(too_few_or_many)
    optree.prefix_errors(tree, [tree], **name)
    other = optree.tree_structure((OrderedDict(other=1), [1]))
    for method in (treespec.broadcast_to_common_suffix, treespec.is_prefix, treespec.is_suffix):
        with contextlib.suppress(ValueError):
            method(other)


FAIL = FailAfter(0)

# The first instances are compared with those of the standard library and of the compiler, which
# themselves show half-filled tuples to the collector.
optree.tree_map(
    lambda leaf: leaf,
    [Module(0, 1), Point(0, 1), Point3(0, 1), Layer(0, 1), Empty()],
    namespace=NAMESPACE,
)

# Wide and deep trees add no new code paths.
SMALL_TREES = [row for row in TREES if row.name not in {"deep", "wide", "wide_dict", "comb"}]


@pytest.mark.parametrize(
    "operations",
    [walk_tree, walk_nodes, walk_structure, fail_everywhere],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("row", SMALL_TREES, ids=[row.name for row in SMALL_TREES])
def test_the_collector_finds_nothing_half_made(
    row: TreeRow, operations: Callable[[Any, Any, dict[str, Any]], None]
) -> None:
    tree, same, name = row.make(), row.make(), {"namespace": row.namespace}
    optree.clear_caches()
    with hostile() as reader:
        operations(tree, same, name)  # cold
        operations(tree, same, name)
    assert not reader.faults
    assert reader.reads or FREE_THREADED


class Peeping:
    """A node whose functions look at all objects while they are called."""

    def __init__(self, *items: Any) -> None:
        self.items = items


def flatten_peeping(node: Peeping) -> Any:
    def parts() -> Iterator[Any]:
        yield (item for item in LOOK.around(node.items))
        yield [LOOK.once()]
        yield LOOK.around(range(len(node.items)))

    return parts()


def unflatten_peeping(metadata: Any, children: tuple[Any, ...]) -> Peeping:
    LOOK.once()
    return Peeping(*children)


class Look:
    """Reads all objects when called."""

    def __init__(self) -> None:
        self.reader = Reader()

    def once(self) -> None:
        self.reader("start", {})

    def around(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.reader("start", {})
            yield item
        self.reader("start", {})


LOOK = Look()


class PeepingKey(Unsortable):
    """A key that looks at all objects whenever it is hashed or compared."""

    def __hash__(self) -> int:
        LOOK.reader("start", {})
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        LOOK.reader("start", {})
        return super().__eq__(other)


@pytest.fixture
def peeping() -> Iterator[Look]:
    optree.register_pytree_node(Peeping, flatten_peeping, unflatten_peeping, namespace="peeping")
    LOOK.reader.faults.clear()
    gc.collect()
    gc.disable()
    yield LOOK
    gc.enable()
    optree.unregister_pytree_node(Peeping, namespace="peeping")


def test_functions_of_nodes_find_nothing_half_made(peeping: Look) -> None:
    tree = [Peeping(1, {"a": Peeping(2, 3)}), Peeping(), (Peeping(4),)]
    name = {"namespace": "peeping"}
    leaves, treespec = optree.tree_flatten(tree, **name)
    assert leaves == [1, 2, 3, 4]
    optree.tree_map(lambda *xs: xs, tree, tree, **name)
    optree.tree_flatten_with_accessor(tree, **name)
    optree.tree_flatten_one_level(tree[0], **name)
    treespec.unflatten(leaves)
    treespec.traverse(leaves)
    assert not peeping.reader.faults


def test_keys_find_nothing_half_made(peeping: Look) -> None:
    keys = [PeepingKey(name) for name in "bca"]
    mapping = dict.fromkeys(keys, 1)
    for tree in (mapping, OrderedDict(mapping), defaultdict(int, mapping)):
        leaves, treespec = optree.tree_flatten(tree)
        optree.tree_map(lambda *xs: xs, tree, dict.fromkeys(map(PeepingKey, "abc")))
        node = optree.tree_flatten_one_level(tree)
        node.unflatten_func(node.metadata, node.children)
        treespec.unflatten(leaves)
        made = SPEC.__new__(SPEC)
        made.__setstate__(treespec.__getstate__())
        assert made == treespec
        with pytest.raises(ValueError, match="key mismatch"):
            treespec.flatten_up_to(dict.fromkeys(map(PeepingKey, "abx")))
    assert not peeping.reader.faults


def test_attributes_find_no_half_filled_metadata(peeping: Look) -> None:
    @optree.dataclasses.dataclass(namespace="peeping attributes")
    class Fields:
        x: Any
        first: Any = optree.dataclasses.field(default=1, pytree_node=False)
        second: Any = optree.dataclasses.field(default=2, pytree_node=False)
        third: Any = optree.dataclasses.field(default=3, pytree_node=False)

        def __getattribute__(self, name: str) -> Any:
            LOOK.reader("start", {})
            return object.__getattribute__(self, name)

    optree.tree_map(lambda x: x, [Fields(1), Fields(2)], namespace="peeping attributes")
    assert not peeping.reader.faults


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda d: defaultdict(None, d)])
def test_the_original_keys_may_be_asked_for_while_they_are_made(make: Callable[[Any], Any]) -> None:
    answers: list[Any] = []

    def ask(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and armed:
            answers.append(getattr(metadata, "original_keys", None))

    gc.callbacks.append(ask)
    before = gc.get_threshold()
    try:
        for attempt in range(20):
            armed = False
            keys = [f"{make}-{attempt}-{i}" for i in range(20, 0, -1)]
            optree.clear_caches()
            metadata = optree.tree_flatten_one_level(make(dict.fromkeys(keys))).metadata
            metadata = metadata[1] if isinstance(metadata, tuple) else metadata
            hogs: list[Any] = [{} for _ in range(100)]
            gc.set_threshold(1)
            armed = True
            found = getattr(metadata, "original_keys", None)
            armed = False
            gc.set_threshold(*before)
            assert found is None or list(found) == keys
            assert all(answer is None or list(answer) == keys for answer in answers)
            answers.clear()
            del hogs
    finally:
        gc.callbacks.remove(ask)
        gc.set_threshold(*before)


class MakeClass:
    """A custom node whose only child is made when it is flattened."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def test_a_remembered_class_is_not_confused_with_another_at_its_address() -> None:
    optree.register_pytree_node(
        MakeClass,
        lambda box: ((box.make(),), None),
        lambda _, children: children[0],
        namespace="met",
    )
    addresses: list[int] = []
    kept: list[Any] = []

    def leaf() -> Any:
        cls = type("Leaf", (), {})
        addresses.append(id(cls))
        return cls()

    def pair() -> Any:
        gc.collect()
        for _ in range(300):
            cls = type("Pair", (Point,), {})
            if id(cls) in addresses:
                return cls(1, 2)
            kept.append(cls)
        return cls(1, 2)

    try:
        for function in (
            optree.tree_structure,
            lambda tree, **kw: optree.tree_map(lambda x: x, tree, **kw),
            lambda tree, **kw: list(optree.tree_iter(tree, **kw)),
        ):
            for _ in range(3):
                addresses.clear()
                kept.clear()
                made = function([MakeClass(leaf), MakeClass(pair)], namespace="met")
                leaves = (
                    made.num_leaves if isinstance(made, SPEC) else len(optree.tree_leaves(made))
                )
                assert leaves == 3
    finally:
        optree.unregister_pytree_node(MakeClass, namespace="met")


def test_lists_that_the_collector_finds_may_be_emptied() -> None:
    class Key(Unsortable):
        def __hash__(self) -> int:
            spoil()
            return super().__hash__()

        def __lt__(self, other: Any) -> bool:
            spoil()
            return self.name < other.name

    def spoil() -> None:
        if not armed:
            return
        for obj in gc.get_objects(generation=0):
            if type(obj) is list and len(obj) == 3 and all(type(item) is Key for item in obj):
                obj.clear()

    armed = False
    keys = [Key(name) for name in "bca"]
    mapping = dict.fromkeys(keys, 1)
    treespec = optree.tree_structure(mapping)
    state = treespec.__getstate__()
    other = dict.fromkeys([Key(name) for name in "xyz"])
    mixed = {**mapping, "text": 0}
    gc.collect()
    gc.disable()
    armed = True
    try:
        for action in (
            lambda: optree.tree_flatten(mapping),
            lambda: optree.tree_flatten(mixed),
            lambda: treespec.flatten_up_to(other),
            lambda: SPEC.__new__(SPEC).__setstate__(copy.copy(state)),
            lambda: treespec.broadcast_to_common_suffix(optree.tree_structure(other)),
            lambda: pickle.dumps(deque([treespec])),
        ):
            with contextlib.suppress(Exception):  # an error is as good as an answer
                action()
    finally:
        armed = False
        gc.enable()


class HashedByName:
    """A key that is neither a string nor a number, so the collector tracks its key layout."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return hash(self.name)


class Value:
    """A leaf that only the dict keeps alive."""


LARGE = 2**200


@pytest.mark.parametrize(
    "walk",
    [
        optree.tree_leaves,
        lambda tree, **name: list(optree.tree_iter(tree, **name)),
        lambda tree, **name: optree.tree_flatten_one_level(tree, **name).children,
        lambda tree, **name: optree.tree_leaves(optree.tree_map(lambda x: x, tree, **name), **name),
    ],
    ids=["leaves", "iter", "one_level", "map"],
)
@pytest.mark.parametrize("ordered", [False, True], ids=["sorted", "insertion ordered"])
@pytest.mark.parametrize(
    "make_keys",
    [
        lambda: [HashedByName(name) for name in "bca"],
        lambda: [LARGE + 0],
        lambda: [LARGE + 1, LARGE + 0],
        lambda: [(LARGE + 0,)],
        lambda: ["b", "a", "c"],
    ],
    ids=["objects", "one large int", "large ints", "tuple of a large int", "texts"],
)
@pytest.mark.parametrize("make", [dict, OrderedDict, lambda items: defaultdict(None, items)])
def test_a_dict_that_a_finalizer_empties_is_read_whole_or_empty(
    make: Callable[[Any], Any],
    make_keys: Callable[[], list[Any]],
    ordered: bool,
    walk: Callable[..., list[Any]],
) -> None:
    emptied: list[int] = []

    def empty(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and not emptied:
            emptied.append(len(mapping))
            mapping.clear()
            others.extend(bytearray(16 * size) for size in range(1, 40))  # reuse the memory

    before = gc.get_threshold()
    others: list[bytearray] = []
    with optree.dict_insertion_ordered(ordered, namespace="emptied"):
        for attempt in range(12):
            if attempt % 4 == 0:
                optree.clear_caches()
            mapping = make([(key, Value()) for key in make_keys()])
            size = len(mapping)
            emptied.clear()
            gc.collect()
            gc.callbacks.append(empty)
            gc.set_threshold(1, 0 if FREE_THREADED else 1000, 1000)
            try:
                found = walk(mapping, namespace="emptied")
            except (KeyError, RuntimeError):  # noticed by the iterator of an OrderedDict
                assert make is OrderedDict
                continue
            finally:
                gc.set_threshold(*before)
                gc.callbacks.remove(empty)
            assert [type(value) for value in found] in ([Value] * size, [])
            others.clear()
