# SPDX-License-Identifier: Apache-2.0
"""The table of trees used by the whole test suite: all container kinds, leaf kinds and key orders.

A row has a factory of trees, and two expectations written by hand from the specification: the
leaves in order, and the representation of the tree structure, both with ``None`` as a node. Every
law runs on every row. Add a row for each new kind of container.
"""

from __future__ import annotations

import builtins
import dataclasses
import os
import time
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest

import optree

NAMESPACE = "trees"

Point = namedtuple("Point", ["x", "y"])
Empty = namedtuple("Empty", [])


class Point3(Point):
    """A subclass of a namedtuple class: still a namedtuple node, of its own class."""

    __slots__ = ()


class Layer(NamedTuple):
    """A namedtuple written in class form."""

    weight: Any
    bias: Any = None


class ListSubclass(list):  # type: ignore[type-arg]
    """Never registered: instances are leaves."""


class DictSubclass(dict):  # type: ignore[type-arg]
    """Never registered: instances are leaves."""


class TupleSubclass(tuple):  # type: ignore[type-arg]
    """Never registered and without named fields: instances are leaves."""


class Opaque:
    """A leaf compared by identity."""

    __slots__ = ("__weakref__",)


class Unsortable:
    """A hashable key without an order."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Unsortable({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unsortable) and self.name == other.name

    def __hash__(self) -> int:
        return hash(("Unsortable", self.name))


class Pair:
    """A custom node registered in the global namespace."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left = left
        self.right = right

    def __getitem__(self, index: int) -> Any:
        return (self.left, self.right)[index]

    def __repr__(self) -> str:
        return f"Pair({self.left!r}, {self.right!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is Pair and (self.left, self.right) == (other.left, other.right)

    __hash__ = None  # type: ignore[assignment]


class Box:
    """A custom node with metadata, explicit entries and children from a generator."""

    def __init__(self, label: str, **items: Any) -> None:
        self.label = label
        self.items = items

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["items"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        return f"Box({self.label!r}, {self.items!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is Box and (self.label, self.items) == (other.label, other.items)

    __hash__ = None  # type: ignore[assignment]


class Mapping2(UserDict):  # type: ignore[type-arg]
    """A custom mapping node: its path entries are automatically of type ``MappingEntry``."""


class Ring:
    """A custom node registered by class, with the tree methods on the class."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __tree_flatten__(self) -> tuple[Iterable[Any], int]:
        return iter(self.items), len(self.items)

    @classmethod
    def __tree_unflatten__(cls, metadata: int, children: tuple[Any, ...]) -> Ring:
        assert metadata == len(children)
        return cls(*children)

    def __repr__(self) -> str:
        return f"Ring{self.items!r}"

    def __eq__(self, other: object) -> bool:
        return type(other) is Ring and self.items == other.items

    __hash__ = None  # type: ignore[assignment]


@optree.dataclasses.dataclass(namespace=NAMESPACE)
class Module:
    """A dataclass with children and metadata fields."""

    weight: Any
    bias: Any
    name: str = optree.dataclasses.field(default="fc", pytree_node=False)


def _flatten_box(box: Box) -> tuple[Iterator[Any], str, tuple[str, ...]]:
    return (value for value in box.items.values()), box.label, tuple(box.items)


def _unflatten_box(label: str, children: tuple[Any, ...]) -> Box:
    box = Box(label)
    names = label.split("+")
    assert type(children) is tuple
    box.items = {name: children[i] for i, name in enumerate(names)}
    return box


def _flatten_pair(pair: Pair) -> tuple[tuple[Any, Any], None]:
    return (pair.left, pair.right), None


def _unflatten_pair(metadata: None, children: tuple[Any, ...]) -> Pair:
    assert metadata is None
    assert type(children) is tuple
    return Pair(*children)


def _flatten_mapping(mapping: Mapping2) -> tuple[list[Any], list[Any], list[Any]]:
    keys = list(mapping.data)
    return [mapping.data[key] for key in keys], keys, keys


def _unflatten_mapping(keys: list[Any], children: tuple[Any, ...]) -> Mapping2:
    return Mapping2([(key, children[i]) for i, key in enumerate(keys)])


optree.register_pytree_node(Pair, _flatten_pair, _unflatten_pair, namespace="pairs")
optree.register_pytree_node(
    Pair, _flatten_pair, _unflatten_pair, namespace=optree.registry.__GLOBAL_NAMESPACE
)
optree.register_pytree_node(
    Box, _flatten_box, _unflatten_box, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE
)
optree.register_pytree_node(Mapping2, _flatten_mapping, _unflatten_mapping, namespace=NAMESPACE)
optree.register_pytree_node_class(Ring, path_entry_type=optree.SequenceEntry, namespace=NAMESPACE)


@dataclasses.dataclass(frozen=True)
class TreeRow:
    """One tree of the table.

    Attributes:
        name: Identifier in test ids.
        make: Builds a fresh, equal tree at every call.
        leaves: Expected leaves with ``None`` as a node, or None to skip this check.
        structure: Expected text between ``PyTreeSpec(`` and the flags, or None to skip this check.
        namespace: Namespace in which the tree is flattened.
        reversible: Whether rebuilding gives an equal tree; hidden fields of a structseq are lost.
    """

    name: str
    make: Callable[[], Any]
    leaves: list[Any] | None = None
    structure: str | None = None
    namespace: str = ""
    reversible: bool = True


SHARED_LEAF = Opaque()
FROZENDICT: Any = getattr(builtins, "frozendict", None)  # since Python 3.15
UNSORTABLE = (Unsortable("u"), Unsortable("a"))
STRUCT_TIME = time.struct_time(range(10, 19))
STAT = os.stat_result(range(20, 30))


def nested_lists(depth: int, leaf: Any = 0) -> Any:
    """Return ``leaf`` inside ``depth`` nested one-element lists."""
    tree = leaf
    for _ in range(depth):
        tree = [tree]
    return tree


def _moved() -> OrderedDict[str, int]:
    ordered = OrderedDict([("a", 1), ("b", 2), ("c", 3)])
    ordered.move_to_end("c")
    return ordered


def _reinserted() -> dict[str, int]:
    mapping = {"b": 1, "a": 2, "c": 3}
    mapping["b"] = mapping.pop("b")
    return mapping


def _transformer() -> dict[str, Any]:
    return {
        "embed": {"w": 0, "b": 1},
        "blocks": [{"w": 2 + 2 * i, "b": 3 + 2 * i} for i in range(4)],
        "head": Layer({"w": 100, "b": 101}, None),
    }


TREES: tuple[TreeRow, ...] = (
    # leaves
    TreeRow('int', lambda: 1, [1], '*'),
    TreeRow('str', lambda: 'text', ['text'], '*'),
    TreeRow('float_nan', lambda: [1.5, 2.5], [1.5, 2.5], '[*, *]'),
    TreeRow('bytes', lambda: b'xy', [b'xy'], '*'),
    TreeRow('opaque', lambda: SHARED_LEAF, [SHARED_LEAF], '*'),
    TreeRow('class_as_leaf', lambda: [list, dict], [list, dict], '[*, *]'),
    TreeRow('namedtuple_class_as_leaf', lambda: Point, [Point], '*'),
    TreeRow('range_set_frozenset', lambda: (range(2), {1}, frozenset({2})),
            [range(2), {1}, frozenset({2})], '(*, *, *)'),
    TreeRow('list_subclass', lambda: [ListSubclass([1, 2])], [ListSubclass([1, 2])], '[*]'),
    TreeRow('dict_subclass', lambda: (DictSubclass(a=1), Counter('aab')),
            [DictSubclass(a=1), Counter('aab')], '(*, *)'),
    TreeRow('tuple_subclass', lambda: [TupleSubclass((1, 2))], [TupleSubclass((1, 2))], '[*]'),
    # None
    TreeRow('none', lambda: None, [], 'None'),
    TreeRow('none_in_containers', lambda: [None, (None,), {'a': None, 'b': 1}],
            [1], "[None, (None,), {'a': None, 'b': *}]"),
    # empty containers
    TreeRow('empty_tuple', lambda: (), [], '()'),
    TreeRow('empty_list', list, [], '[]'),
    TreeRow('empty_dict', dict, [], '{}'),
    TreeRow('empty_ordereddict', lambda: OrderedDict(), [], 'OrderedDict()'),
    TreeRow('empty_defaultdict', lambda: defaultdict(None), [], 'defaultdict(None, {})'),
    TreeRow('empty_deque', lambda: deque(), [], 'deque()'),
    TreeRow('empty_deque_maxlen', lambda: deque(maxlen=3), [], 'deque(maxlen=3)'),
    TreeRow('empty_namedtuple', lambda: Empty(), [], 'Empty()'),
    TreeRow('empties_nested', lambda: [[], (), {}, [[]]], [], '[[], (), {}, [[]]]'),
    # one of each kind
    TreeRow('singleton_tuple', lambda: (1,), [1], '(*,)'),
    TreeRow('tuple', lambda: (1, 2, 3), [1, 2, 3], '(*, *, *)'),
    TreeRow('list', lambda: [1, 2, 3], [1, 2, 3], '[*, *, *]'),
    TreeRow('dict', lambda: {'b': 1, 'a': 2}, [2, 1], "{'a': *, 'b': *}"),
    TreeRow('ordereddict', lambda: OrderedDict([('b', 1), ('a', 2)]), [1, 2],
            "OrderedDict({'b': *, 'a': *})"),
    TreeRow('ordereddict_moved', _moved, [1, 2, 3], "OrderedDict({'a': *, 'b': *, 'c': *})"),
    TreeRow('defaultdict', lambda: defaultdict(int, b=1, a=2), [2, 1],
            "defaultdict(<class 'int'>, {'a': *, 'b': *})"),
    *[
        TreeRow('frozendict', lambda: FROZENDICT(b=1, a=2), [2, 1], "frozendict({'a': *, 'b': *})"),
        TreeRow('empty_frozendict', lambda: FROZENDICT(), [], 'frozendict()'),
        TreeRow('frozendict_nested', lambda: FROZENDICT(z=[FROZENDICT(c=1, b=(2, 3))], a=None),
                [2, 3, 1], "frozendict({'a': None, 'z': [frozendict({'b': (*, *), 'c': *})]})"),
    ] * (FROZENDICT is not None),
    TreeRow('deque', lambda: deque([1, 2]), [1, 2], 'deque([*, *])'),
    TreeRow('deque_maxlen', lambda: deque([1, 2], maxlen=3), [1, 2], 'deque([*, *], maxlen=3)'),
    TreeRow('deque_full', lambda: deque([1, 2], maxlen=2), [1, 2], 'deque([*, *], maxlen=2)'),
    TreeRow('namedtuple', lambda: Point(1, 2), [1, 2], 'Point(x=*, y=*)'),
    TreeRow('namedtuple_subclass', lambda: Point3(1, 2), [1, 2], 'Point3(x=*, y=*)'),
    TreeRow('namedtuple_class_form', lambda: Layer(1), [1], 'Layer(weight=*, bias=None)'),
    TreeRow('structseq', lambda: STRUCT_TIME, list(range(10, 19)),
            'time.struct_time(tm_year=*, tm_mon=*, tm_mday=*, tm_hour=*, tm_min=*, tm_sec=*, '
            'tm_wday=*, tm_yday=*, tm_isdst=*)'),
    TreeRow('structseq_unnamed', lambda: STAT, list(range(20, 30)), None, reversible=False),
    # dict keys
    TreeRow('keys_reinserted', _reinserted, [2, 1, 3], "{'a': *, 'b': *, 'c': *}"),
    TreeRow('keys_already_sorted', lambda: {'a': 1, 'b': 2, 'c': 3}, [1, 2, 3],
            "{'a': *, 'b': *, 'c': *}"),
    TreeRow('keys_int', lambda: {10: 'x', 9: 'y', -1: 'z'}, ['z', 'y', 'x'],
            '{-1: *, 9: *, 10: *}'),
    TreeRow('keys_int_float', lambda: {3.0: 1, 2: 2, True: 3}, [3, 2, 1],
            '{True: *, 2: *, 3.0: *}'),
    TreeRow('keys_int_str', lambda: {'a': 1, 2: 2}, [2, 1], "{2: *, 'a': *}"),
    TreeRow('keys_int_float_str', lambda: {'a': 1, 2: 2, 3.0: 3}, [3, 2, 1],
            "{3.0: *, 2: *, 'a': *}"),
    TreeRow('keys_none_str_int', lambda: {'a': 1, 1: 2, None: 3}, [3, 2, 1],
            "{None: *, 1: *, 'a': *}"),
    TreeRow('keys_tuple', lambda: {(1, 'b'): 1, (1, 'a'): 2, (0,): 3}, [3, 2, 1],
            "{(0,): *, (1, 'a'): *, (1, 'b'): *}"),
    TreeRow('keys_unsortable_one_class', lambda: {UNSORTABLE[0]: 1, UNSORTABLE[1]: 2}, [1, 2],
            "{Unsortable('u'): *, Unsortable('a'): *}"),
    TreeRow('keys_unsortable_and_str', lambda: {'b': 1, 3: 3, UNSORTABLE[0]: 2}, [3, 1, 2], None),
    TreeRow('keys_unsortable_defaultdict',
            lambda: defaultdict(list, {UNSORTABLE[0]: 1, UNSORTABLE[1]: 2}), [1, 2], None),
    TreeRow('keys_unicode', lambda: {'\u00e9': 1, 'e': 2, '\U0001f600': 3, '\uffff': 4, '': 5},
            [5, 2, 1, 4, 3], None),
    TreeRow('keys_complex', lambda: {2j: 1, 1j: 2}, [1, 2], '{2j: *, 1j: *}'),
    TreeRow('dict_order_nested', lambda: {'z': {'y': 1, 'x': 2}, 'a': {'c': 3, 'b': 4}},
            [4, 3, 2, 1], "{'a': {'b': *, 'c': *}, 'z': {'x': *, 'y': *}}"),
    # nests
    TreeRow('mixed', lambda: {'b': (2, [3, 4]), 'a': 1, 'c': None, 'd': deque([5], maxlen=2)},
            [1, 2, 3, 4, 5], "{'a': *, 'b': (*, [*, *]), 'c': None, 'd': deque([*], maxlen=2)}"),
    TreeRow('shared_children', lambda: (lambda shared: [shared, shared, (shared,)])([1, SHARED_LEAF]),  # noqa: E501
            [1, SHARED_LEAF] * 3, '[[*, *], [*, *], ([*, *],)]'),
    TreeRow('all_dict_kinds',
            lambda: [{'b': 1, 'a': 2}, OrderedDict(b=3, a=4), defaultdict(list, b=5, a=6)],
            [2, 1, 3, 4, 6, 5], None),
    TreeRow('namedtuple_nested', lambda: Point(Layer(1, [2]), Point3({'k': 3}, ())), [1, 2, 3],
            "Point(x=Layer(weight=*, bias=[*]), y=Point3(x={'k': *}, y=()))"),
    TreeRow('transformer', _transformer, None, None),
    TreeRow('deep', lambda: nested_lists(100, 7), [7], '[' * 100 + '*' + ']' * 100),
    TreeRow('wide', lambda: list(range(500)), list(range(500)), None),
    TreeRow('wide_dict', lambda: {f'k{i:03d}': i for i in reversed(range(200))},
            list(range(200)), None),
    TreeRow('comb', lambda: (lambda f: f(f, 40))(lambda f, n: (n, f(f, n - 1)) if n else ()),
            list(range(40, 0, -1)), None),
    # custom nodes
    TreeRow('custom_global', lambda: Pair(1, [2, None]), [1, 2],
            'CustomTreeNode(Pair[None], [*, [*, None]])'),
    TreeRow('custom_global_inside', lambda: {'b': Pair(1, Pair(2, 3)), 'a': (Pair(None, ()),)},
            [1, 2, 3], None),
    TreeRow('custom_in_namespace', lambda: Box('p+q', p=1, q={'z': 2, 'y': 3}), [1, 3, 2],
            "CustomTreeNode(Box['p+q'], [*, {'y': *, 'z': *}])", NAMESPACE),
    TreeRow('custom_empty', lambda: Ring(), [], 'CustomTreeNode(Ring[0], [])', NAMESPACE),
    TreeRow('custom_by_class', lambda: [Ring(1, (2, 3)), Ring(None)], [1, 2, 3],
            '[CustomTreeNode(Ring[2], [*, (*, *)]), CustomTreeNode(Ring[1], [None])]', NAMESPACE),
    TreeRow('custom_mapping', lambda: Mapping2({'b': 1, 'a': [2]}), [1, 2],
            "CustomTreeNode(Mapping2[['b', 'a']], [*, [*]])", NAMESPACE),
    TreeRow('dataclass', lambda: Module({'w': 1}, None, 'out'), [1],
            "CustomTreeNode(Module[(('name', 'out'),)], [{'w': *}, None])", NAMESPACE),
    TreeRow('custom_unseen_outside_namespace', lambda: [Pair(1, 2), {'k': 3}], [1, 2, 3], None,
            NAMESPACE),
    TreeRow('custom_mixed',
            lambda: {'m': Module(Ring(1, Box('r', r=2)), Pair(3, Mapping2(k=4))), 'l': [5]},
            [5, 1, 2, 3, 4], None, NAMESPACE),
    TreeRow('partial', lambda: optree.functools.partial(max, [1, 2], key=3), [1, 2, 3], None),
)  # fmt: skip

every_tree = pytest.mark.parametrize("row", TREES, ids=[row.name for row in TREES])
every_none_mode = pytest.mark.parametrize("none_is_leaf", [False, True], ids=["node", "leaf"])

KINDS = optree.PyTreeKind


def is_same(left: Any, right: Any) -> bool:
    """Whether two trees have equal types, orders and metadata everywhere, and the same leaves."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        if isinstance(left, defaultdict) and left.default_factory is not right.default_factory:
            return False
        left_keys, right_keys = list(left), list(right)
        return (
            len(left_keys) == len(right_keys)
            and all(a is b or a == b for a, b in zip(left_keys, right_keys))
            and all(is_same(left[key], right[key]) for key in left_keys)
        )
    if isinstance(left, deque):
        if left.maxlen != right.maxlen:
            return False
        left, right = list(left), list(right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    if type(left) in {Pair, Box, Ring, Mapping2, Module}:
        return is_same(vars(left), vars(right))
    if isinstance(left, optree.functools.partial):
        return (
            left.func is right.func
            and is_same(left.args, right.args)
            and is_same(dict(left.keywords), dict(right.keywords))
        )
    return bool(left == right)
