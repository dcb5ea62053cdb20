# SPDX-License-Identifier: Apache-2.0
"""Rebuilding trees: unflatten, traverse and walk."""

from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import pytest
from trees import NAMESPACE, Box, Empty, Layer, Pair, Point, Ring

import optree

TREE = {"b": (2, [3, 4]), "a": 1, "c": None}


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, deque, lambda x: dict.fromkeys(x), lambda x: (i for i in x), range],
    ids=["list", "tuple", "iterator", "deque", "dict", "generator", "range"],
)
def test_leaves_may_come_from_any_iterable(make: Any) -> None:
    treespec = optree.tree_structure([0, (0, {"k": 0})])
    leaves = make(3) if make is range else make([0, 1, 2])
    assert treespec.unflatten(leaves) == [0, (1, {"k": 2})]


def test_a_string_is_an_iterable_of_leaves() -> None:
    assert optree.tree_structure((0, [0])).unflatten("xy") == ("x", ["y"])


@pytest.mark.parametrize("leaves", [5, None, object()])
def test_leaves_must_be_iterable(leaves: Any) -> None:
    treespec = optree.tree_structure([0])
    for rebuild in (treespec.unflatten, treespec.traverse, treespec.walk):
        with pytest.raises(TypeError):
            rebuild(leaves)


def test_one_extra_item_is_pulled_from_an_iterator() -> None:
    source = iter(range(10))
    with pytest.raises(ValueError, match=r"^Too many leaves for PyTreeSpec; expected: 2\.(\n|$)"):
        optree.tree_structure([0, 0]).unflatten(source)
    assert next(source) == 3


def test_too_many_leaves_of_an_infinite_iterator() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    with pytest.raises(ValueError, match="^Too many leaves"):
        optree.tree_structure([0, 0]).unflatten(forever())


@pytest.mark.parametrize("make", [list, iter, tuple], ids=["list", "iterator", "tuple"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_leaves(make: Any, count: int) -> None:
    message = rf"^Too few leaves for PyTreeSpec; expected: 3, got: {count}\.$"
    with pytest.raises(ValueError, match=message):
        optree.tree_structure(TREE).compose(optree.tree_structure(1)).one_level().unflatten(
            make(range(count))
        )


def test_leafless_trees() -> None:
    for tree in ((), [], {}, None, [(), {}], Empty(), OrderedDict(), deque(maxlen=2)):
        treespec = optree.tree_structure(tree)
        assert treespec.unflatten([]) == tree
        with pytest.raises(
            ValueError, match=r"^Too many leaves for PyTreeSpec; expected: 0\.(\n|$)"
        ):
            treespec.unflatten([1])


def test_single_leaf() -> None:
    treespec = optree.tree_structure(0)
    leaf = object()
    assert treespec.unflatten([leaf]) is leaf
    with pytest.raises(ValueError, match=r"^Too few leaves for PyTreeSpec; expected: 1, got: 0\.$"):
        treespec.unflatten([])


def test_every_rebuilt_container_is_new() -> None:
    treespec = optree.tree_structure([[], {}, (1, [2])])
    first, second = treespec.unflatten([1, 2]), treespec.unflatten([1, 2])
    assert first == second
    assert first is not second
    for a, b in zip(first, second):
        assert a is not b
    first[1]["new"] = 1
    assert second[1] == {}
    assert treespec.unflatten([1, 2]) == second


DICT_KEYS = {
    "one text": ["a"],
    "texts": ["b", "a", "c"],
    "fills the smallest dict": list("edcba"),
    "one more": list("fedcba"),
    "large": [f"k{i * 7 % 300}" for i in range(300)],
    "large enough for two-byte indices": [f"k{i * 7 % 3000}" for i in range(3000)],
    "numbers": [3, 1, 2, 1000],
    "texts and numbers": ["b", 1, "a", 2],
    "beyond ASCII": ["ä", "字", "a"],
    "emptied and refilled": None,
}


def _dict_of(name: str) -> dict[Any, Any]:
    keys = DICT_KEYS[name]
    if keys is not None:
        return dict.fromkeys(keys, 0)
    refilled: dict[Any, Any] = dict.fromkeys(range(50), 0)
    refilled.clear()
    refilled.update(c=0, b=0)
    del refilled["c"]
    refilled["a"] = 0
    return refilled


@pytest.mark.parametrize("name", DICT_KEYS)
@pytest.mark.parametrize("leaf", [float, list, object], ids=lambda leaf: str(leaf.__name__))
def test_a_rebuilt_dict_is_a_dict_like_any_other(name: str, leaf: Any) -> None:
    source = _dict_of(name)
    values = [leaf() for _ in source]
    leaves, treespec = optree.tree_flatten(source)
    order = optree.tree_leaves({key: index for index, key in enumerate(source)})
    by_position = sorted(zip(order, values), key=lambda pair: pair[0])
    expected = {key: value for key, (_, value) in zip(source, by_position)}
    for _ in range(2):  # the second is built from what the first left in the cache
        made = treespec.unflatten(values)
        assert type(made) is dict
        assert list(made.items()) == list(expected.items())
        assert gc.is_tracked(made) == gc.is_tracked(expected)
        assert {key: made[key] is value for key, value in expected.items()} == dict.fromkeys(
            source, True
        )
        grown, ordinary = made, dict(expected)
        for step in range(2 * len(source) + 10):
            grown[f"new {step}"] = ordinary[f"new {step}"] = step
            if step % 3 == 0:
                assert grown.popitem() == ordinary.popitem()
        for key in list(source)[::2]:
            assert grown.pop(key) is ordinary.pop(key)
        assert list(grown.items()) == list(ordinary.items())
        assert "absent" not in grown
        assert copy.copy(grown) == ordinary
        grown.clear()
        assert grown == {}
    assert list(treespec.unflatten(leaves).items()) == list(source.items())


def test_rebuilding_dicts_agrees_with_the_checks_of_the_memory_allocator() -> None:
    script = """
import optree
for keys in (["b", "a"], list(range(40)), [f"k{i}" for i in range(3000)]):
    tree = {key: [object()] for key in keys}
    leaves, treespec = optree.tree_flatten(tree)
    for _ in range(50):
        made = treespec.unflatten(leaves)
        assert made == tree
        made["more"] = 1
        made.clear()
"""
    environment = dict(os.environ, PYTHONMALLOC="debug")
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="free-threaded builds of Python crash when an allocation fails",
)
def test_rebuilding_without_memory_raises_and_drops_what_was_made() -> None:
    testing = pytest.importorskip("_testcapi", reason="CPython's own test module")
    # More dicts than the free list of Python holds.
    tree = {f"{i}": {"y": object(), "x": [1.5]} for i in range(100)}
    leaves, treespec = optree.tree_flatten(tree)
    assert treespec.unflatten(leaves) == tree
    counts = [sys.getrefcount(leaf) for leaf in leaves]
    failures = 0
    for allocation in range(400):
        made = None
        gc.disable()
        testing.set_nomemory(allocation, allocation + 1)
        try:
            made = treespec.unflatten(leaves)
        except MemoryError:
            failures += 1
        finally:
            testing.remove_mem_hooks()
            gc.enable()
        del made
        assert [sys.getrefcount(leaf) for leaf in leaves] == counts
    assert failures > 100
    assert treespec.unflatten(leaves) == tree


def test_metadata_is_restored() -> None:
    tree = (
        deque([1, 2], maxlen=5),
        defaultdict(list, {"b": 1, "a": 2}),
        OrderedDict([("b", 1), ("a", 2)]),
        {"z": 1, "y": 2},
        Point(1, 2),
        time.gmtime(0),
    )
    leaves, treespec = optree.tree_flatten(tree)
    rebuilt = treespec.unflatten([leaf + 1 for leaf in leaves])
    assert rebuilt[0] == deque([2, 3])
    assert rebuilt[0].maxlen == 5
    assert rebuilt[1].default_factory is list
    assert list(rebuilt[1].items()) == [("b", 2), ("a", 3)]
    assert list(rebuilt[2].items()) == [("b", 2), ("a", 3)]
    assert list(rebuilt[3].items()) == [("z", 2), ("y", 3)]
    assert rebuilt[4] == Point(2, 3)
    assert type(rebuilt[5]) is time.struct_time
    assert rebuilt[5].tm_year == 1971


def test_children_reach_the_unflatten_function_as_a_tuple() -> None:
    received: list[Any] = []

    class Node:
        pass

    def unflatten(metadata: Any, children: Any) -> str:
        received.append((metadata, children))
        return "rebuilt"

    optree.register_pytree_node(Node, lambda n: ([1, [2]], "m"), unflatten, namespace="tuple")
    try:
        treespec = optree.tree_structure([Node()], namespace="tuple")
        assert treespec.unflatten([10, 20]) == ["rebuilt"]
    finally:
        optree.unregister_pytree_node(Node, namespace="tuple")
    assert received == [("m", (10, [20]))]
    assert type(received[0][1]) is tuple
    # A structure outlives the registration it was made with.
    assert treespec.unflatten([10, 20]) == ["rebuilt"]
    assert treespec.children()[0].type is Node


def test_exceptions_of_user_code_propagate() -> None:
    class Node:
        pass

    def unflatten(metadata: Any, children: Any) -> Any:
        raise LookupError("unflatten")

    optree.register_pytree_node(Node, lambda n: ([1], None), unflatten, namespace="raises")
    try:
        treespec = optree.tree_structure([0, Node(), 0], namespace="raises")
    finally:
        optree.unregister_pytree_node(Node, namespace="raises")
    for rebuild in (treespec.unflatten, treespec.traverse):
        with pytest.raises(LookupError, match="^unflatten$"):
            rebuild([1, 2, 3])

    def leaves() -> Iterator[int]:
        yield 1
        raise LookupError("leaves")

    for rebuild in (treespec.unflatten, treespec.traverse, treespec.walk):
        with pytest.raises(LookupError, match="leaves"):
            rebuild(leaves())


def test_a_namedtuple_class_with_its_own_new_is_called() -> None:
    class Checked(Point):
        __slots__ = ()

        def __new__(cls, x: Any, y: Any) -> Checked:
            if x == "bad":
                raise LookupError("new")
            return super().__new__(cls, x, (y, "seen"))

    treespec = optree.tree_structure(Checked(1, 2), is_leaf=lambda x: type(x) is tuple)
    assert treespec.unflatten([1, 2]) == (1, (2, "seen"))
    assert type(treespec.unflatten([1, 2])) is Checked
    with pytest.raises(LookupError, match="^new$"):
        treespec.unflatten(["bad", 2])


def test_a_namedtuple_class_with_its_own_init_is_initialised() -> None:
    initialised: list[Any] = []

    class WithInit(Point):
        def __init__(self, *args: Any) -> None:
            initialised.append(args)

    treespec = optree.tree_structure(WithInit(1, 2))
    initialised.clear()
    assert treespec.unflatten([3, 4]) == (3, 4)
    assert initialised == [(3, 4)]


def test_a_namedtuple_class_patched_later_is_called_as_patched() -> None:
    class Patched(Point):
        pass

    treespec = optree.tree_structure(Patched(1, 2))
    assert treespec.unflatten([1, 2]) == (1, 2)
    Patched.__new__ = lambda cls, x, y: tuple.__new__(cls, (y, x))  # type: ignore[method-assign]
    assert treespec.unflatten([1, 2]) == (2, 1)


def test_tree_unflatten_calls_the_method_of_any_object() -> None:
    class Spec:
        def unflatten(self, leaves: Any) -> Any:
            return "mine", leaves

    assert optree.tree_unflatten(Spec(), [1]) == ("mine", [1])
    assert optree.tree_unflatten(leaves=[1], treespec=Spec()) == ("mine", [1])
    with pytest.raises(AttributeError):
        optree.tree_unflatten([1], [1])


# traverse -----------------------------------------------------------------------------------------


def test_traverse_maps_leaves_then_nodes_in_postorder() -> None:
    log: list[Any] = []
    treespec = optree.tree_structure(TREE)

    def f_node(node: Any) -> Any:
        log.append(("node", node))
        return node

    def f_leaf(leaf: Any) -> Any:
        log.append(("leaf", leaf))
        return leaf * 10

    result = treespec.traverse([1, 2, 3, 4], f_node, f_leaf)
    assert result == {"b": (20, [30, 40]), "a": 10, "c": None}
    assert log == [
        ('leaf', 1), ('leaf', 2), ('leaf', 3), ('leaf', 4), ('node', [30, 40]),
        ('node', (20, [30, 40])), ('node', None), ('node', result),
    ]  # fmt: skip
    assert list(result) == ["b", "a", "c"]


def test_traverse_uses_the_results_as_children() -> None:
    treespec = optree.tree_structure([(1, 2), {"a": 3}])
    assert treespec.traverse([1, 2, 3], lambda node: str(node)) == "['(1, 2)', \"{'a': 3}\"]"
    assert treespec.traverse([1, 2, 3], f_leaf=str) == [("1", "2"), {"a": "3"}]
    assert treespec.traverse([1, 2, 3], f_node=sum_values) == 6


def sum_values(node: Any) -> int:
    return sum(node.values() if isinstance(node, dict) else node)


@pytest.mark.parametrize("method", ["traverse", "walk"])
def test_leaf_count_of_traverse_and_walk(method: str) -> None:
    rebuild = getattr(optree.tree_structure([1, (2, 3)]), method)
    for function in (None, lambda *args: args):
        with pytest.raises(ValueError, match=r"^Too few leaves for PyTreeSpec\.$"):
            rebuild([1, 2], function)
        with pytest.raises(ValueError, match=r"^Too many leaves for PyTreeSpec\.$"):
            rebuild([1, 2, 3, 4], function)


@pytest.mark.parametrize("method", ["traverse", "walk"])
def test_functions_of_traverse_and_walk_must_be_callable(method: str) -> None:
    rebuild = getattr(optree.tree_structure([1]), method)
    with pytest.raises(TypeError, match="'f_node', got 3"):
        rebuild([1], 3)
    with pytest.raises(TypeError, match="'f_leaf', got 3"):
        rebuild([1], None, 3)
    with pytest.raises(TypeError, match="'f_leaf', got 'x'"):
        rebuild([1], f_leaf="x")


@pytest.mark.parametrize("method", ["traverse", "walk"])
@pytest.mark.parametrize("which", ["f_node", "f_leaf"])
@pytest.mark.parametrize("error", [LookupError, StopIteration, KeyboardInterrupt])
def test_exceptions_of_the_functions_propagate(
    method: str, which: str, error: type[BaseException]
) -> None:
    def function(*args: Any) -> Any:
        raise error("mine")

    treespec = optree.tree_structure([1, (2,)])
    with pytest.raises(error, match="^mine$"):
        getattr(treespec, method)([1, 2], **{which: function})


# walk ---------------------------------------------------------------------------------------------


def test_walk_hands_out_types_metadata_and_children() -> None:
    nodes: list[Any] = []

    def f_node(cls: type, metadata: Any, children: tuple[Any, ...]) -> str:
        assert type(children) is tuple
        nodes.append((cls, metadata, children))
        return cls.__name__

    tree = [
        (1,),
        {"b": 2, "a": 3},
        OrderedDict(b=4),
        defaultdict(int, b=5),
        deque([6], maxlen=3),
        deque([7]),
        Point(8, None),
        Pair(9, 10),
        Box("p", p=11),
    ]
    leaves, treespec = optree.tree_flatten(tree, namespace=NAMESPACE)
    assert treespec.walk(leaves, f_node, str) == "list"
    assert nodes == [
        (tuple, None, ('1',)),
        (dict, ['a', 'b'], ('3', '2')),
        (OrderedDict, ['b'], ('4',)),
        (defaultdict, (int, ['b']), ('5',)),
        (deque, 3, ('6',)),
        (deque, None, ('7',)),
        (type(None), None, ()),
        (Point, Point, ('8', 'NoneType')),
        (Pair, None, ('9', '10')),
        (Box, 'p', ('11',)),
        (list, None, ('tuple', 'dict', 'OrderedDict', 'defaultdict', 'deque', 'deque', 'Point',
                      'Pair', 'Box')),
    ]  # fmt: skip


def test_walk_without_a_node_function_rebuilds() -> None:
    treespec = optree.tree_structure(TREE)
    assert treespec.walk([1, 2, 3, 4]) == TREE
    assert treespec.walk([1, 2, 3, 4], None, float) == {"b": (2.0, [3.0, 4.0]), "a": 1.0, "c": None}


def test_walk_without_a_leaf_function_keeps_leaves() -> None:
    result = optree.tree_structure([1, (2,)]).walk([7, 8], lambda cls, metadata, children: children)
    assert result == (7, (8,))


@pytest.mark.differs_from_published
def test_walk_hands_out_copies_of_its_keys() -> None:
    treespec = optree.tree_structure([{"b": 1, "a": 2}, defaultdict(int, a=1), OrderedDict(z=1)])
    before = repr(treespec)

    def vandalise(cls: type, metadata: Any, children: Any) -> Any:
        if cls is defaultdict:
            metadata[1].append("x")
        elif metadata is not None:
            metadata.append("x")
        return cls

    assert treespec.walk([1, 2, 3, 4], vandalise) is list
    assert repr(treespec) == before
    assert treespec.unflatten([1, 2, 3, 4]) == [{"b": 2, "a": 1}, {"a": 3}, {"z": 4}]


# flatten_up_to ------------------------------------------------------------------------------------

UP_TO_ERRORS: list[tuple[Any, Any, str]] = [
    (None, 1, 'Expected None, got 1.'),
    ((1,), [1], 'Expected an instance of tuple, got [1].'),
    ((1, 2), Point(1, 2), 'Expected an instance of tuple, got Point(x=1, y=2).'),
    ([1], (1,), 'Expected an instance of list, got (1,).'),
    ([1], None, 'Expected an instance of list, got None.'),
    (deque([1]), [1], 'Expected an instance of collections.deque, got [1].'),
    (Point(1, 2), (1, 2), 'Expected an instance of collections.namedtuple, got (1, 2).'),
    (time.gmtime(0), (1,), 'Expected an instance of PyStructSequence type, got (1,).'),
    ((1,), (1, 2), 'tuple arity mismatch; expected: 1, got: 2; tuple: (1, 2).'),
    ([1, 2], [1], 'list arity mismatch; expected: 2, got: 1; list: [1].'),
    (deque([1]), deque(), 'deque arity mismatch; expected: 1, got: 0; deque: deque([]).'),
    (Point(1, 2), Layer(1, 2), f'namedtuple type mismatch; expected type: {Point!r}, got type: '
     f'{Layer!r}; tuple: Layer(weight=1, bias=2).'),
    ({'a': 1, 'b': 2}, {'a': 1}, "dictionary key mismatch; expected key(s): ['a', 'b'], got "
     "key(s): ['a'], missing key(s): ['b']; dict: {'a': 1}."),
    ({'a': 1}, {'b': 1, 'a': 2}, "dictionary key mismatch; expected key(s): ['a'], got key(s): "
     "['a', 'b'], extra key(s): ['b']; dict: {'b': 1, 'a': 2}."),
    ({'a': 1, 'b': 2}, {'c': 1, 'a': 2}, "dictionary key mismatch; expected key(s): ['a', 'b'], got "  # noqa: E501
     "key(s): ['a', 'c'], missing key(s): ['b'], extra key(s): ['c']; dict: {'c': 1, 'a': 2}."),
    (OrderedDict(a=1), {'b': 1}, "dictionary key mismatch; expected key(s): ['a'], got key(s): "
     "['b'], missing key(s): ['a'], extra key(s): ['b']; OrderedDict: {'b': 1}."),
    (defaultdict(int, a=1), {}, "dictionary key mismatch; expected key(s): ['a'], got key(s): [], "
     "missing key(s): ['a']; defaultdict: {}."),
    ([1, [2]], [1, 2], 'Expected an instance of list, got 2.'),
    # The rightmost mismatch is the one reported.
    ([[1], (2,)], [1, 2], 'Expected an instance of tuple, got 2.'),
    (([1], [2]), ((1,), (2,)), 'Expected an instance of list, got (2,).'),
]  # fmt: skip


@pytest.mark.parametrize(("spec_of", "tree", "message"), UP_TO_ERRORS)
def test_flatten_up_to_errors(spec_of: Any, tree: Any, message: str) -> None:
    treespec = optree.tree_structure(spec_of)
    with pytest.raises(ValueError, match="^" + re.escape(message)) as info:
        treespec.flatten_up_to(tree)
    # The documented text comes first; further lines may name the place.
    assert str(info.value).splitlines()[0].startswith(message[:40])
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        optree.tree_map(lambda *xs: xs, spec_of, tree)


def test_flatten_up_to_a_non_dictionary() -> None:
    for spec_of in ({"a": 1}, OrderedDict(a=1), defaultdict(int, a=1)):
        with pytest.raises(
            ValueError,
            match=r"^Expected an instance of dict, (frozendict, )?collections\.OrderedDict, or "
            r"collections\.defaultdict, got \[1\]\.",
        ):
            optree.tree_structure(spec_of).flatten_up_to([1])


def test_dictionary_kinds_are_interchangeable_and_read_by_the_keys_of_the_structure() -> None:
    treespec = optree.tree_structure({"b": 0, "a": 0})
    for other in (
        {"a": 1, "b": 2},
        OrderedDict([("b", 2), ("a", 1)]),
        defaultdict(list, b=2, a=1),
    ):
        assert treespec.flatten_up_to(other) == [1, 2]
    ordered = optree.tree_structure(OrderedDict([("b", 0), ("a", 0)]))
    assert ordered.flatten_up_to({"a": 1, "b": 2}) == [2, 1]


def test_a_defaultdict_gains_no_keys() -> None:
    other: defaultdict[str, int] = defaultdict(int, a=1)
    with pytest.raises(ValueError, match="^dictionary key mismatch"):
        optree.tree_structure({"a": 0, "b": 0}).flatten_up_to(other)
    assert other == {"a": 1}


def test_deque_length_limit_is_ignored() -> None:
    treespec = optree.tree_structure(deque([1, 2], maxlen=2))
    assert treespec.flatten_up_to(deque([3, 4], maxlen=7)) == [3, 4]
    assert treespec.flatten_up_to(deque([3, 4])) == [3, 4]


def test_custom_mismatches() -> None:
    treespec = optree.tree_structure(Ring(1, 2), namespace=NAMESPACE)
    with pytest.raises(ValueError, match="^Custom node type mismatch; expected type: .*; value: "):
        treespec.flatten_up_to(Pair(1, 2))
    with pytest.raises(
        ValueError, match="^Mismatch custom node data; expected: 2, got: 3; value: "
    ):
        treespec.flatten_up_to(Ring(1, 2, 3))

    class Node:
        count = 2

    optree.register_pytree_node(
        Node, lambda n: (range(n.count), None), lambda m, c: Node(), namespace="arity"
    )
    try:
        treespec = optree.tree_structure(Node(), namespace="arity")
        longer = Node()
        longer.count = 3
        with pytest.raises(
            ValueError, match="^Custom type arity mismatch; expected: 2, got: 3; value: "
        ):
            treespec.flatten_up_to(longer)
    finally:
        optree.unregister_pytree_node(Node, namespace="arity")
    with pytest.raises(ValueError, match="^Custom node type mismatch"):
        treespec.flatten_up_to(Node())


def test_leaves_of_the_structure_take_whole_subtrees() -> None:
    subtrees = [[1], {"a": None}, None, Pair(1, 2)]
    found = optree.tree_structure([0, 0, 0, 0]).flatten_up_to(subtrees)
    assert found == subtrees
    assert all(a is b for a, b in zip(found, subtrees))
    assert found is not subtrees
    assert optree.tree_structure(0).flatten_up_to(subtrees)[0] is subtrees


def test_none_matching() -> None:
    treespec = optree.tree_structure([None, 0])
    assert treespec.flatten_up_to([None, 1]) == [1]
    none_leaf = optree.tree_structure([None, 0], none_is_leaf=True)
    assert none_leaf.flatten_up_to([3, None]) == [3, None]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("size", [63, 64, 65, 1000])
def test_long_rows_of_leaves_keep_their_references(kind: Any, size: int, nested: bool) -> None:
    leaves = [object() for _ in range(size)]
    before = [sys.getrefcount(leaf) for leaf in leaves]
    tree: Any = [None, list(leaves), ()] if nested else list(leaves)
    treespec = optree.tree_structure(tree)
    del tree
    rebuilt = treespec.unflatten(kind(leaves))
    row = rebuilt[1] if nested else rebuilt
    assert type(row) is list
    assert gc.is_tracked(row)
    assert len(row) == size
    assert all(a is b for a, b in zip(row, leaves))
    row.append(0)  # reallocates, so that the list no longer shares its memory
    del row, rebuilt
    gc.collect()
    assert [sys.getrefcount(leaf) for leaf in leaves] == before


def test_leaves_that_a_collection_takes_away_are_missed() -> None:
    class Taking:
        def __init__(self, leaves: list[Any]) -> None:
            self.leaves, self.cycle = leaves, self

        def __del__(self) -> None:
            self.leaves.clear()

    treespec = optree.tree_structure([0] * 500)
    threshold = gc.get_threshold()
    for _ in range(20):
        leaves: list[Any] = [object() for _ in range(500)]
        Taking(leaves)
        gc.set_threshold(1)
        try:
            rebuilt = treespec.unflatten(leaves)
        except ValueError as error:
            assert "Too few leaves for PyTreeSpec" in str(error)  # noqa: PT017
        else:
            assert len(rebuilt) == 500
        finally:
            gc.set_threshold(*threshold)
