# SPDX-License-Identifier: Apache-2.0
"""Reference counts balance on success, on every error path, and over many repetitions."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
from trees import NAMESPACE, TREES, Box, Mapping2, Pair, Point, Ring

import optree

pytestmark = [
    pytest.mark.skipif(not hasattr(sys, "getrefcount"), reason="needs reference counts"),
    pytest.mark.skipif(
        not getattr(sys, "_is_gil_enabled", lambda: True)(),
        reason="free-threaded builds defer reference counts",
    ),
]


class Witness:
    """A leaf, key, metadata or factory whose references are counted."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def __hash__(self) -> int:
        return 77

    def __lt__(self, other: Witness) -> bool:
        return self.rank < other.rank

    def __call__(self) -> Any:
        raise AssertionError("a factory was called")


class Node:
    """A custom node whose functions misbehave on demand."""

    mode = ""

    def __init__(self, items: Any, metadata: Any) -> None:
        self.items = items
        self.metadata = metadata


class Failure(Exception):
    """Raised on purpose."""


def _failing_children(items: Any) -> Any:
    yield from items
    raise Failure


def flatten_node(node: Node) -> Any:
    mode = node.mode
    if mode == "raise":
        raise Failure
    if mode == "children":
        return _failing_children(node.items), node.metadata
    if mode == "entries":
        return list(node.items), node.metadata, _failing_children(node.items)
    if mode == "one":
        return (node.items,)
    if mode == "four":
        return node.items, node.metadata, None, node.items
    if mode == "int":
        return 3
    if mode == "children_int":
        return 3, node.metadata
    if mode == "short_entries":
        return node.items, node.metadata, (node.metadata,)
    if node.metadata.mode == "eq":
        # Equal objects are not compared when they are identical.
        metadata = Metadata()
        metadata.mode = "eq"
        return node.items, metadata
    return node.items, node.metadata, [(node.metadata, i) for i in range(len(node.items))]


def unflatten_node(metadata: Any, children: Any) -> Any:
    if metadata.mode == "unflatten":
        raise Failure
    return Node(list(children), metadata)


class Metadata:
    """Metadata whose comparison fails on demand."""

    mode = ""

    def __eq__(self, other: object) -> bool:
        if self.mode == "eq":
            raise Failure
        return isinstance(other, Metadata)

    def __repr__(self) -> str:
        if self.mode == "repr":
            raise Failure
        return "Metadata()"

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def registered() -> Any:
    optree.register_pytree_node(Node, flatten_node, unflatten_node, namespace="counted")
    yield
    optree.unregister_pytree_node(Node, namespace="counted")


class Case:
    """A tree of objects whose references are counted."""

    def __init__(self) -> None:
        self.leaf = Witness()
        self.keys = [Witness(2), Witness(1), Witness(3)]
        self.factory = Witness()
        self.metadata = Metadata()
        self.node = Node([self.leaf, [self.leaf]], self.metadata)
        mapping = {self.keys[0]: self.leaf, self.keys[1]: (self.leaf,), self.keys[2]: None}
        self.tree: Any = [
            self.leaf,
            (self.leaf, None),
            mapping,
            OrderedDict(mapping),
            defaultdict(self.factory, mapping),
            deque([self.leaf, self.leaf], maxlen=5),
            Point(self.leaf, {self.keys[1]: self.leaf}),
            Pair(self.leaf, self.leaf),
            self.node,
        ]
        self.counted: list[Any] = [
            self.leaf, *self.keys, self.factory, self.metadata, self.node, self.tree,
            mapping, Node, Pair, Point, Metadata, flatten_node, unflatten_node,
            *self.tree[1:],
        ]  # fmt: skip

    def counts(self) -> list[int]:
        return [sys.getrefcount(thing) for thing in self.counted]


def check_balance(action: Callable[[Case], Any], error: Any = None, setup: Any = None) -> None:
    """Run ``action`` several times and check that no reference count changes."""
    case = Case()
    if setup is not None:
        setup(case)

    def once() -> None:
        if error is None:
            action(case)
            return
        try:
            action(case)
        except error as caught:
            caught.__traceback__ = None
        else:
            raise AssertionError("expected an error")

    once()
    once()
    gc.collect()
    before = case.counts()
    for _ in range(20):
        once()
    gc.collect()
    after = case.counts()
    names = [type(thing).__name__ for thing in case.counted]
    drift = {
        f"{name} #{i}": b - a for i, (name, a, b) in enumerate(zip(names, before, after)) if a != b
    }
    assert drift == {}


OPTIONS: dict[str, Any] = {"namespace": "counted"}


def structure(case: Case) -> Any:
    return optree.tree_structure(case.tree, **OPTIONS)


def set_state(case: Case) -> Any:
    treespec = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    treespec.__setstate__(structure(case).__getstate__())
    treespec.__setstate__(structure(case).__getstate__())
    return repr(treespec)


def abandon_iterator(case: Case) -> Any:
    iterator = optree.tree_iter(case.tree, **OPTIONS)
    return [next(iterator) for _ in range(4)]


SUCCESS: dict[str, Callable[[Case], Any]] = {
    "flatten": lambda c: optree.tree_flatten(c.tree, **OPTIONS),
    "flatten_none_is_leaf": lambda c: optree.tree_flatten(c.tree, none_is_leaf=True, **OPTIONS),
    "flatten_is_leaf": lambda c: optree.tree_flatten(c.tree, is_leaf=lambda x: False, **OPTIONS),
    "flatten_with_path": lambda c: optree.tree_flatten_with_path(c.tree, **OPTIONS),
    "flatten_with_accessor": lambda c: optree.tree_flatten_with_accessor(c.tree, **OPTIONS),
    "leaves": lambda c: optree.tree_leaves(c.tree, **OPTIONS),
    "structure": structure,
    "iter": lambda c: list(optree.tree_iter(c.tree, **OPTIONS)),
    "iter_abandoned": abandon_iterator,
    "iter_unused": lambda c: optree.tree_iter(c.tree, **OPTIONS),
    "unflatten": lambda c: structure(c).unflatten(range(structure(c).num_leaves)),
    "unflatten_iterator": lambda c: structure(c).unflatten(iter([c.leaf] * len(structure(c)))),
    "traverse": lambda c: structure(c).traverse(
        [c.leaf] * len(structure(c)), lambda n: n, lambda x: x
    ),
    "walk": lambda c: structure(c).walk([c.leaf] * len(structure(c)), lambda *a: a),
    "flatten_up_to": lambda c: structure(c).flatten_up_to(c.tree),
    "map": lambda c: optree.tree_map(lambda x: c.leaf, c.tree, **OPTIONS),
    "map_two": lambda c: optree.tree_map(lambda x, y: y, c.tree, c.tree, **OPTIONS),
    "map_": lambda c: optree.tree_map_(lambda x: x, c.tree, **OPTIONS),
    "map_with_path": lambda c: optree.tree_map_with_path(lambda p, x: p, c.tree, **OPTIONS),
    "map_with_accessor": lambda c: optree.tree_map_with_accessor(lambda p, x: p, c.tree, **OPTIONS),
    "paths": lambda c: structure(c).paths(),
    "accessors": lambda c: structure(c).accessors(),
    "entries": lambda c: [child.entries() for child in structure(c).children()],
    "child": lambda c: [structure(c).child(i) for i in range(-9, 9)],
    "one_level": lambda c: [child.one_level() for child in structure(c).children()],
    "type": lambda c: [child.type for child in structure(c).children()],
    "repr": lambda c: repr(structure(c)),
    "hash": lambda c: hash(structure(c)),
    "eq": lambda c: structure(c) == structure(c),
    "prefix": lambda c: (structure(c) <= structure(c), structure(c) < structure(c)),
    "compose": lambda c: structure(c).compose(structure(c)),
    "transform": lambda c: structure(c).transform(lambda n: n, lambda n: structure(c)),
    "transform_copy": lambda c: structure(c).transform(),
    "broadcast": lambda c: structure(c).broadcast_to_common_suffix(structure(c)),
    "broadcast_leaf": lambda c: optree.treespec_leaf().broadcast_to_common_suffix(structure(c)),
    "getstate": lambda c: structure(c).__getstate__(),
    "setstate": set_state,
    "copy": lambda c: [__import__("copy").copy(structure(c))],
    "from_collection": lambda c: optree.treespec_from_collection(
        {c.keys[0]: structure(c), c.keys[1]: structure(c)}, **OPTIONS
    ),
    "flatten_one_level": lambda c: [
        optree.tree_flatten_one_level(x, **OPTIONS) for x in c.tree[1:]
    ],
    "broadcast_prefix": lambda c: optree.broadcast_prefix(c.leaf, c.tree, **OPTIONS),
    "broadcast_common": lambda c: optree.tree_broadcast_common(c.tree, c.leaf, **OPTIONS),
    "prefix_errors": lambda c: optree.prefix_errors(c.tree, c.tree, **OPTIONS),
    "reduce": lambda c: optree.tree_reduce(lambda a, b: b, c.tree, **OPTIONS),
    "partition": lambda c: optree.tree_partition(lambda x: True, c.tree, **OPTIONS),
    "transpose_map": lambda c: optree.tree_transpose_map(lambda x: (x, [x]), c.tree, **OPTIONS),
    "is_leaf": lambda c: [optree.tree_is_leaf(x, **OPTIONS) for x in c.tree],
    "insertion_ordered": lambda c: flatten_inserted(c),
}


def flatten_inserted(case: Case) -> Any:
    with optree.dict_insertion_ordered(True, namespace="counted"):
        return optree.tree_flatten(case.tree, **OPTIONS)


@pytest.mark.parametrize("action", SUCCESS.values(), ids=list(SUCCESS))
def test_successful_calls_balance(action: Callable[[Case], Any]) -> None:
    check_balance(action)


def fail(*args: Any) -> Any:
    raise Failure


class Countdown:
    """Raises at the n-th call."""

    def __init__(self, calls: int, result: Any = False) -> None:
        self.calls = calls
        self.result = result

    def __call__(self, *args: Any) -> Any:
        self.calls -= 1
        if self.calls == 0:
            raise Failure
        return args[-1] if self.result == "last" else self.result


FLATTENS: dict[str, Callable[..., Any]] = {
    "flatten": optree.tree_flatten,
    "flatten_with_path": optree.tree_flatten_with_path,
    "leaves": optree.tree_leaves,
    "structure": optree.tree_structure,
    "iter": lambda tree, **kw: list(optree.tree_iter(tree, **kw)),
    "map": lambda tree, **kw: optree.tree_map(lambda x: x, tree, **kw),
    "map_two": lambda tree, **kw: optree.tree_map(lambda x, y: x, tree, tree, **kw),
    "one_level": lambda tree, **kw: [optree.tree_flatten_one_level(x, **kw) for x in tree[1:]],
}
every_flatten = pytest.mark.parametrize("flatten", FLATTENS.values(), ids=list(FLATTENS))


@pytest.mark.parametrize(
    "mode",
    ["raise", "children", "entries", "one", "four", "int", "children_int", "short_entries"],
)
@every_flatten
def test_failing_flatten_functions_balance(flatten: Any, mode: str) -> None:
    def setup(case: Case) -> None:
        case.node.mode = mode

    check_balance(lambda c: flatten(c.tree, **OPTIONS), (Failure, RuntimeError, TypeError), setup)


@pytest.mark.parametrize("call", [1, 2, 7, 20, 30])
@every_flatten
def test_failing_predicates_balance(flatten: Any, call: int) -> None:
    if flatten is FLATTENS["one_level"]:
        pytest.skip("asks the predicate once")
    check_balance(lambda c: flatten(c.tree, is_leaf=Countdown(call), **OPTIONS), Failure)


@pytest.mark.parametrize("call", [1, 2, 7, 15])
@pytest.mark.parametrize(
    'apply',
    [
        lambda f, c: optree.tree_map(f, c.tree, **OPTIONS),
        lambda f, c: optree.tree_map(f, c.tree, c.tree, **OPTIONS),
        lambda f, c: optree.tree_map_(f, c.tree, **OPTIONS),
        lambda f, c: optree.tree_map_with_path(f, c.tree, **OPTIONS),
        lambda f, c: structure(c).traverse([c.leaf] * len(structure(c)), None, f),
        lambda f, c: structure(c).traverse([c.leaf] * len(structure(c)), f),
        lambda f, c: structure(c).walk([c.leaf] * len(structure(c)), f, f),
        lambda f, c: structure(c).transform(None, f),
        lambda f, c: structure(c).transform(f),
        lambda f, c: optree.tree_reduce(f, c.tree, **OPTIONS),
    ],
    ids=['map', 'map_two', 'map_', 'with_path', 'traverse_leaf', 'traverse_node', 'walk',
         'transform_leaf', 'transform_node', 'reduce'],
)  # fmt: skip
def test_failing_functions_balance(apply: Any, call: int) -> None:
    check_balance(lambda c: apply(Countdown(call, "last"), c), Failure)


def set_metadata_mode(mode: str) -> Callable[[Case], None]:
    def setup(case: Case) -> None:
        case.metadata.mode = mode

    return setup


def test_failing_unflatten_functions_balance() -> None:
    setup = set_metadata_mode("unflatten")
    count = len(structure(Case()))
    for action in (
        lambda c: structure(c).unflatten([c.leaf] * count),
        lambda c: structure(c).unflatten(iter([c.leaf] * count)),
        lambda c: structure(c).traverse([c.leaf] * count),
        lambda c: optree.tree_map(lambda x: x, c.tree, **OPTIONS),
    ):
        check_balance(action, Failure, setup)


def test_failing_comparisons_balance() -> None:
    setup = set_metadata_mode("eq")
    for action in (
        lambda c: structure(c) == structure(c),
        lambda c: structure(c) <= structure(c),
        lambda c: structure(c).flatten_up_to(c.tree),
        lambda c: structure(c).broadcast_to_common_suffix(structure(c)),
        lambda c: optree.tree_map(lambda *xs: xs, c.tree, c.tree, **OPTIONS),
    ):
        check_balance(action, Failure, setup)


def test_failing_repr_balances() -> None:
    check_balance(lambda c: repr(structure(c)), Failure, set_metadata_mode("repr"))


def _generator(case: Case, count: int) -> Any:
    for _ in range(count):
        yield case.leaf
    raise Failure


@pytest.mark.parametrize("method", ["unflatten", "traverse", "walk"])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_wrong_leaf_counts_balance(method: str, count: int) -> None:
    def rebuild(case: Case, leaves: Any) -> Any:
        return getattr(structure(case), method)(leaves)

    check_balance(lambda c: rebuild(c, [c.leaf] * count), ValueError)
    check_balance(lambda c: rebuild(c, iter([c.leaf] * count)), ValueError)
    check_balance(lambda c: rebuild(c, _generator(c, count)), Failure)
    extra = len(structure(Case())) + 1 + count
    check_balance(lambda c: rebuild(c, [c.leaf] * extra), ValueError)
    check_balance(lambda c: rebuild(c, iter([c.leaf] * extra)), ValueError)
    check_balance(lambda c: rebuild(c, 5), TypeError)


@pytest.mark.parametrize("position", range(9))
def test_mismatched_trees_balance(position: int) -> None:
    def other(case: Case) -> list[Any]:
        tree = list(case.tree)
        tree[position] = frozenset() if position else [1, case.leaf]
        return tree

    if position:
        check_balance(lambda c: structure(c).flatten_up_to(other(c)), ValueError)
        check_balance(
            lambda c: optree.tree_map(lambda *x: x, c.tree, other(c), **OPTIONS), ValueError
        )
    check_balance(lambda c: structure(c).flatten_up_to(c.tree[:position]), ValueError)
    check_balance(lambda c: structure(c) == optree.tree_structure(other(c), **OPTIONS))
    check_balance(lambda c: structure(c) <= optree.tree_structure(other(c), **OPTIONS))
    changed = [(), 1, {}, OrderedDict(x=1), defaultdict(None, x=1), deque(), Point(1, 2), 1, 1]

    def incompatible(case: Case) -> Any:
        tree = list(case.tree)
        tree[position] = Ring(changed[position])
        return optree.tree_structure(tree, namespace=NAMESPACE)

    check_balance(
        lambda c: optree.tree_structure(c.tree[:8] + [[1]]).broadcast_to_common_suffix(  # noqa: RUF005
            optree.tree_structure([*c.tree[:7], {c.keys[0]: c.leaf}, (2,)])
        ),
        ValueError,
    )


def test_key_mismatches_balance() -> None:
    def run(case: Case) -> Any:
        mapping = case.tree[2]
        fewer = {case.keys[0]: 1}
        return optree.tree_structure(mapping).flatten_up_to(fewer)

    check_balance(run, ValueError)
    check_balance(
        lambda c: optree.tree_structure(c.tree[2]).broadcast_to_common_suffix(
            optree.tree_structure({c.keys[0]: 1})
        ),
        ValueError,
    )


def test_unsortable_keys_balance() -> None:
    class Loose:
        def __lt__(self, other: object) -> bool:
            raise Failure

    case_keys = [Loose(), Loose()]
    mapping = dict.fromkeys(case_keys, 1)
    before = [sys.getrefcount(key) for key in case_keys]
    for _ in range(20):
        for flatten in (optree.tree_flatten, optree.tree_leaves, optree.tree_flatten_one_level):
            with pytest.raises(Failure):
                flatten(mapping)
    gc.collect()
    assert [sys.getrefcount(key) for key in case_keys] == before


def test_depth_errors_balance() -> None:
    def deep(case: Case) -> Any:
        tree: Any = case.leaf
        for _ in range(optree.MAX_RECURSION_DEPTH + 1):
            tree = [case.leaf, tree]
        return tree

    for flatten in (optree.tree_flatten, optree.tree_flatten_with_path, optree.tree_leaves,
                    lambda t: list(optree.tree_iter(t))):  # fmt: skip
        check_balance(lambda c, flatten=flatten: flatten(deep(c)), RecursionError)


@pytest.mark.parametrize(
    'state',
    [
        lambda c: (),
        lambda c: (((1, 0, c.leaf, None, None, 1, 1, None),), False, ''),
        lambda c: (((1, 0, None, None, None, 1, 1, None), (5, 1, [c.keys[0]], None, None, 1, 2, {})),  # noqa: E501
                   False, ''),
        lambda c: (((1, 0, None, None, None, 1, 1, None),
                    (5, 1, [c.keys[0]], None, None, 1, 2, {c.keys[1]: None})), False, ''),
        lambda c: (((1, 0, None, None, None, 1, 1, None),
                    (8, 1, (c.factory, [c.keys[0]]), None, None, 9, 2, {c.keys[0]: None})), False, ''),  # noqa: E501
        lambda c: (((1, 0, None, None, None, 1, 1, None),
                    (0, 1, c.metadata, (c.leaf, c.leaf), Pair, 1, 2, None)), False, ''),
        lambda c: (((0, 0, c.metadata, None, Witness, 0, 1, None),), False, 'counted'),
    ],
)  # fmt: skip
def test_malformed_states_balance(state: Any) -> None:
    def run(case: Case) -> None:
        optree.PyTreeSpec.__new__(optree.PyTreeSpec).__setstate__(state(case))

    check_balance(run, (RuntimeError, ValueError, TypeError))


def test_arguments_of_wrong_type_balance() -> None:
    check_balance(lambda c: optree.tree_flatten(c.tree, 3), TypeError)
    check_balance(lambda c: optree.tree_flatten(c.tree, namespace=c.leaf), TypeError)
    check_balance(lambda c: optree._C.flatten(c.tree, unknown=c.leaf), TypeError)
    check_balance(lambda c: optree._C.flatten(), TypeError)
    check_balance(lambda c: structure(c).entry(c.leaf), TypeError)
    check_balance(lambda c: structure(c).child(100), IndexError)
    check_balance(lambda c: structure(c).compose(c.leaf), TypeError)
    check_balance(lambda c: structure(c) == c.leaf)


def test_registration_balances() -> None:
    class Cls:
        pass

    def flatten(node: Any) -> Any:
        return (), None

    def unflatten(metadata: Any, children: Any) -> Any:
        return Cls()

    namespace = "".join(["reg", "istration"])
    counted = [Cls, flatten, unflatten, namespace, optree.SequenceEntry]

    def once() -> None:
        optree.register_pytree_node(
            Cls, flatten, unflatten, path_entry_type=optree.SequenceEntry, namespace=namespace
        )
        with pytest.raises(ValueError, match="is already registered"):
            optree.register_pytree_node(Cls, flatten, unflatten, namespace=namespace)
        with pytest.raises(ValueError, match="is not registered"):
            optree.unregister_pytree_node(Cls, namespace="elsewhere")
        optree.tree_structure(Cls(), namespace=namespace)
        optree.unregister_pytree_node(Cls, namespace=namespace)

    once()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in counted]
    for _ in range(20):
        once()
    gc.collect()
    assert [sys.getrefcount(thing) for thing in counted] == before


# collection ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("classes_can_die")
def test_unregistered_classes_are_collected() -> None:
    class Cls:
        pass

    optree.register_pytree_node(
        Cls,
        lambda n: ((), None),
        lambda m, c: Cls(),  # noqa: F821
        namespace="temporary",
    )
    treespec = optree.tree_structure([Cls()], namespace="temporary")
    optree.unregister_pytree_node(Cls, namespace="temporary")
    watched = weakref.ref(Cls)
    del Cls
    gc.collect()
    assert watched() is not None
    del treespec
    gc.collect()
    assert watched() is None


@pytest.mark.usefixtures("classes_can_die")
def test_leaf_and_namedtuple_classes_are_collected() -> None:
    from collections import namedtuple

    def use() -> list[weakref.ref[Any]]:
        local = namedtuple("local", ["x"])

        class Plain:
            pass

        class Sub(tuple):  # type: ignore[type-arg]
            pass

        tree = [local(1), Plain(), Sub()]
        leaves, treespec = optree.tree_flatten(tree)
        treespec.unflatten(leaves)
        repr(treespec)
        optree.tree_accessors(tree)
        assert optree.is_namedtuple(local)
        assert not optree.is_structseq(Plain)
        return [weakref.ref(cls) for cls in (local, Plain, Sub)]

    watched = use()
    gc.collect()
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]


def test_a_reused_class_address_is_not_confused() -> None:
    from collections import namedtuple

    for i in range(200):
        if i % 2:
            cls: Any = namedtuple("cls", ["x", "y"])
            assert optree.tree_leaves(cls(1, 2)) == [1, 2]
        else:
            cls = type("cls", (tuple,), {})
            tree = cls((1, 2))
            assert optree.tree_leaves(tree)[0] is tree
        del cls
        gc.collect(0 if i % 20 else 2)


def test_structures_hold_their_metadata() -> None:
    key, factory = Witness(), Witness()
    watched = weakref.ref(key), weakref.ref(factory)
    treespec = optree.tree_structure(defaultdict(factory, {key: 1}))
    del key, factory
    gc.collect()
    assert all(ref() is not None for ref in watched)
    del treespec
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_structures_do_not_hold_leaves_or_containers() -> None:
    case = Case()
    leaf, node = weakref.ref(case.leaf), weakref.ref(case.node)
    treespec = optree.tree_structure(case.tree, **OPTIONS)
    del case
    gc.collect()
    assert leaf() is None
    assert node() is None
    assert treespec.num_leaves > 10


@pytest.mark.parametrize("through", ["key", "factory", "metadata", "entry"])
def test_cycles_through_structures_are_collected(through: str) -> None:
    witness = Witness()
    metadata: Any = Metadata()
    entry_box: list[Any] = []
    if through == "key":
        treespec = optree.tree_structure({witness: 1})
    elif through == "factory":
        treespec = optree.tree_structure(defaultdict(witness, a=1))
    elif through == "metadata":
        treespec = optree.tree_structure(Node([1], metadata), **OPTIONS)
        metadata.witness = witness
    else:

        class Entries:
            pass

        optree.register_pytree_node(
            Entries,
            lambda n: ((1,), None, (witness,)),  # noqa: F821
            lambda m, c: None,
            namespace="entries",
        )
        treespec = optree.tree_structure(Entries(), namespace="entries")
        optree.unregister_pytree_node(Entries, namespace="entries")
    witness.treespec = treespec  # type: ignore[attr-defined]
    watched = weakref.ref(witness)
    del witness, treespec, metadata, entry_box
    if through == "entry":
        del Entries
    gc.collect()
    gc.collect()
    assert watched() is None


def tracked() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
def test_tracked_objects_stay_flat(row: Any) -> None:
    tree = row.make()
    options = {"namespace": row.namespace}
    repeat = 3 if row.name in {"deep", "wide", "wide_dict", "comb"} else 30

    def cycle() -> None:
        for _ in range(repeat):
            leaves, treespec = optree.tree_flatten(tree, **options)
            treespec.unflatten(leaves)
            treespec.flatten_up_to(tree)
            treespec.accessors()
            treespec.paths()
            pickle.loads(pickle.dumps(treespec))
            list(optree.tree_iter(tree, **options))
            optree.tree_map(lambda x: x, tree, **options)
            repr(treespec)
            hash(treespec)
            treespec.transform(lambda n: n, lambda n: n)
            try:  # noqa: SIM105
                treespec.unflatten([*leaves, 0])
            except ValueError:
                pass

    cycle()
    before = tracked()
    cycle()
    assert tracked() - before <= 2


def test_tracked_objects_stay_flat_over_a_thousand_rounds() -> None:
    case = Case()
    mapping = Mapping2(a=Box("p", p=1))

    def cycle(count: int) -> None:
        for _ in range(count):
            leaves, treespec = optree.tree_flatten(case.tree, **OPTIONS)
            treespec.unflatten(leaves)
            optree.tree_map(lambda a, b: a, case.tree, case.tree, **OPTIONS)
            optree.tree_leaves(mapping, namespace=NAMESPACE)
            try:  # noqa: SIM105
                optree.tree_map(fail, case.tree, **OPTIONS)
            except Failure:
                pass
            try:  # noqa: SIM105
                treespec.flatten_up_to([])
            except ValueError:
                pass

    cycle(50)
    before = tracked()
    total = getattr(sys, "gettotalrefcount", None)
    references = total() if total is not None else 0
    cycle(1000)
    assert tracked() - before <= 2
    if total is not None:
        assert total() - references < 100


def test_allocated_blocks_stay_flat() -> None:
    case = Case()

    def cycle() -> None:
        for _ in range(300):
            leaves, treespec = optree.tree_flatten(case.tree, **OPTIONS)
            treespec.compose(treespec)
            treespec.unflatten(leaves)
            treespec.paths()
            repr(treespec)
            treespec == treespec  # noqa: B015
            optree.tree_leaves(case.tree, is_leaf=lambda x: False, **OPTIONS)

    cycle()
    gc.collect()
    before = sys.getallocatedblocks()
    cycle()
    gc.collect()
    assert sys.getallocatedblocks() - before < 100
