# SPDX-License-Identifier: Apache-2.0
"""Pickles of tree structures: layout, validation, and files of the published package."""

from __future__ import annotations

import copy
import copyreg
import pickle
import re
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import pytest
from make_pickles import SKIPPED
from trees import NAMESPACE, TREES, Box, Pair, Point, Ring

import optree

PICKLES = Path(__file__).resolve().parent / "pickles"
FILES = sorted(PICKLES.glob("*.pickle"))
ROWS = {row.name: row for row in TREES}

structure = optree.tree_structure
LEAF_STATE = (1, 0, None, None, None, 1, 1, None)


def restore(state: Any) -> optree.PyTreeSpec:
    treespec = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    treespec.__setstate__(state)
    return treespec


def test_there_are_pickle_files_for_the_table() -> None:
    names = {path.name.rsplit("-", 1)[0] for path in FILES}
    since_3_15 = {name for name in ROWS if "frozendict" in name}
    assert names == set(ROWS) - SKIPPED - since_3_15


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_pickle_files_of_the_published_package_load(path: Path) -> None:
    row = ROWS[path.name.rsplit("-", 1)[0]]
    expected = structure(row.make(), none_is_leaf=len(row.name) % 2 == 0, namespace=row.namespace)
    loaded = pickle.loads(path.read_bytes())
    assert type(loaded) is optree.PyTreeSpec
    assert loaded == expected
    assert hash(loaded) == hash(expected)
    assert repr(loaded) == repr(expected)
    assert loaded.paths() == expected.paths()
    assert loaded.accessors() == expected.accessors()
    assert loaded.none_is_leaf is expected.none_is_leaf
    assert loaded.namespace == expected.namespace
    if not path.stem.endswith("-old"):
        assert loaded.__getstate__() == expected.__getstate__()
        protocol = int(path.stem[-1])
        again = pickle.loads(pickle.dumps(loaded, protocol))
        assert again == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reduce(protocol: int) -> None:
    treespec = structure({"b": 1, "a": [2, None]})
    function, arguments, state = treespec.__reduce_ex__(protocol)[:3]
    assert function is copyreg.__newobj__  # type: ignore[attr-defined]
    assert arguments == (optree.PyTreeSpec,)
    assert state == treespec.__getstate__()
    assert treespec.__reduce__()[:2] == (function, arguments)


def test_state_layout() -> None:
    tree = [
        (1,), {'b': 1, 'a': 2}, OrderedDict(b=1), defaultdict(int, {'b': 1}), deque([1], maxlen=4),
        Point(1, None), Pair(1, 2), Box('p', p=1),
    ]  # fmt: skip
    nodes, none_is_leaf, namespace = structure(tree, namespace=NAMESPACE).__getstate__()
    assert (none_is_leaf, namespace) == (False, NAMESPACE)
    assert type(nodes) is tuple
    assert nodes == (
        LEAF_STATE,
        (3, 1, None, None, None, 1, 2, None),
        LEAF_STATE,
        LEAF_STATE,
        (5, 2, ["a", "b"], None, None, 2, 3, {"b": None, "a": None}),
        LEAF_STATE,
        (7, 1, ["b"], None, None, 1, 2, None),
        LEAF_STATE,
        (8, 1, (int, ["b"]), None, None, 1, 2, {"b": None}),
        LEAF_STATE,
        (9, 1, 4, None, None, 1, 2, None),
        LEAF_STATE,
        (2, 0, None, None, None, 0, 1, None),
        (6, 2, Point, None, None, 1, 3, None),
        LEAF_STATE,
        LEAF_STATE,
        (0, 2, None, None, Pair, 2, 3, None),
        LEAF_STATE,
        (0, 1, "p", ("p",), Box, 1, 2, None),
        (4, 8, None, None, None, 10, 20, None),
    )
    assert list(nodes[4][7]) == ["b", "a"]
    assert [type(value) for value in nodes[4]][:2] == [int, int]


def test_the_state_is_a_snapshot() -> None:
    treespec = structure({"b": 1, "a": defaultdict(int, c=2), "d": OrderedDict(e=3)})
    before = repr(treespec), copy.deepcopy(treespec.__getstate__())
    for node in treespec.__getstate__()[0]:
        for part in (node[2], node[7], node[2][1] if isinstance(node[2], tuple) else None):
            if isinstance(part, (list, dict)):
                part.clear()
    assert (repr(treespec), treespec.__getstate__()) == before
    state = treespec.__getstate__()
    loaded = restore(state)
    state[0][-1][2].append("x")
    state[0][-1][7].clear()
    assert (repr(loaded), loaded.__getstate__()) == before


def test_custom_metadata_is_shared() -> None:
    metadata: list[int] = [1]

    class Node:
        pass

    optree.register_pytree_node(
        Node, lambda n: ((1,), metadata), lambda m, c: Node(), namespace="shared"
    )
    try:
        treespec = structure(Node(), namespace="shared")
        assert treespec.__getstate__()[0][-1][2] is metadata
        assert restore(treespec.__getstate__()).__getstate__()[0][-1][2] is metadata
    finally:
        optree.unregister_pytree_node(Node, namespace="shared")


def test_a_handmade_payload_loads() -> None:
    import io

    class Pickler(pickle.Pickler):
        pass

    expected = structure({"a": (1, 2)})
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        buffer = io.BytesIO()
        buffer.write(pickle.PROTO + bytes([protocol]))
        buffer.write(b"coptree\nPyTreeSpec\n)" + pickle.NEWOBJ)
        state = pickle.dumps(expected.__getstate__(), 2)
        buffer.write(state[2:-1])
        buffer.write(pickle.BUILD + pickle.STOP)
        assert pickle.loads(buffer.getvalue()) == expected


def test_old_layout_without_original_keys() -> None:
    nodes, none_is_leaf, namespace = structure(
        {"b": 1, "a": defaultdict(int, d=1, c=2)}
    ).__getstate__()
    loaded = restore((tuple(node[:7] for node in nodes), none_is_leaf, namespace))
    assert loaded == structure({"a": defaultdict(int, c=1, d=2), "b": 3})
    assert loaded.unflatten([1, 2, 3]) == {"a": {"c": 1, "d": 2}, "b": 3}


MANY = [f"k{7 * i % 40}" for i in range(40)]
WIDE: dict[str, Any] = {
    "sorted": dict.fromkeys(sorted(MANY), 0),
    "permuted": dict.fromkeys(MANY, 0),
    "ints": dict.fromkeys(range(40, 0, -1), 0),
    "large ints": dict.fromkeys(range(2**70, 0, -(2**65)), 0),
    "other characters": dict.fromkeys([f"{k}{'é日'[i % 2]}" for i, k in enumerate(MANY)], 0),
    "ints and texts": dict.fromkeys([*MANY, 3, 1, 2], 0),
    "booleans": dict.fromkeys([*range(40, 1, -1), True, False], 0),
    "not comparable": dict.fromkeys([1j * i for i in range(40, 0, -1)], 0),
    "defaultdict, sorted": defaultdict(int, dict.fromkeys(sorted(MANY), 0)),
    "defaultdict, permuted": defaultdict(int, dict.fromkeys(MANY, 0)),
    "OrderedDict": OrderedDict.fromkeys(MANY, 0),
    "inside": [{"b": dict.fromkeys(MANY, 0), "a": dict.fromkeys(MANY, 0)}, {"z": 1}],
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("in_order", [True, False], ids=["insertion", "sorted"])
def test_wide_dictionaries(name: str, protocol: int, in_order: bool) -> None:
    tree = WIDE[name]
    with optree.dict_insertion_ordered(in_order, namespace="wide"):
        treespec = structure(tree, namespace="wide")
        expected = treespec.unflatten(range(treespec.num_leaves))
    for loaded in (
        pickle.loads(pickle.dumps(treespec, protocol)),
        restore(treespec.__reduce_ex__(protocol)[2]),
        restore(pickle.loads(pickle.dumps(treespec.__getstate__(), protocol))),
        copy.copy(treespec),
        copy.deepcopy(treespec),
    ):
        assert loaded == treespec
        assert loaded.paths() == treespec.paths()
        rebuilt = loaded.unflatten(range(loaded.num_leaves))
        assert repr(rebuilt) == repr(expected)
        assert loaded.__getstate__() == treespec.__getstate__()
        assert repr(loaded.__getstate__()) == repr(treespec.__getstate__())


def test_pickles_have_the_original_keys_of_a_wide_dictionary_as_a_list() -> None:
    node = structure(WIDE["permuted"]).__reduce_ex__(2)[2][0][-1]  # type: ignore[index]
    assert (node[2], node[7]) == (sorted(MANY), MANY)
    node = structure(WIDE["sorted"]).__reduce_ex__(2)[2][0][-1]  # type: ignore[index]
    assert node[2] == sorted(MANY)
    assert node[7] is node[2]
    for name in ("sorted", "permuted"):
        treespec = structure(WIDE[name])
        assert treespec.__reduce__()[2] == treespec.__getstate__()  # type: ignore[misc]
        assert treespec.__getstate__()[0][-1][7] == dict.fromkeys(MANY)
    size = {name: len(pickle.dumps(structure(WIDE[name]))) for name in ("sorted", "permuted")}
    assert size["sorted"] < size["permuted"] - len(MANY)


@pytest.mark.parametrize(
    ("keys", "original", "message"),
    [
        (["a", "a"], ["a", "a"], "the keys of a dictionary node are not distinct."),
        (["a", "b"], ["a", "a"], "the original keys do not match the keys."),
        (["a", "b"], ["a", "c"], "the original keys do not match the keys."),
        (["a", "b"], ["a"], "the number of original keys does not match the number of keys."),
        (["a", "b"], [*"abc"], "the number of original keys does not match the number of keys."),
        (["a", "b"], [["a"], "b"], "the original keys of a dictionary node are not hashable."),
    ],
)
def test_lists_of_original_keys_are_validated(
    keys: list[Any], original: list[Any], message: str
) -> None:
    state = ((LEAF_STATE, LEAF_STATE, (5, 2, keys, None, None, 2, 3, original)), False, "")
    with pytest.raises(RuntimeError, match=f"^Malformed pickled PyTreeSpec: {message}$"):
        restore(state)


def test_original_order_survives() -> None:
    treespec = structure({"b": 1, "a": 2})
    loaded = pickle.loads(pickle.dumps(treespec))
    assert list(loaded.unflatten([1, 2])) == ["b", "a"]
    assert list(copy.deepcopy(treespec).unflatten([1, 2])) == ["b", "a"]


def node(kind: int, arity: int, data: Any = None, entries: Any = None, cls: Any = None,
         leaves: int = 1, nodes: int = 2, keys: Any = None) -> tuple[Any, ...]:  # fmt: skip
    return kind, arity, data, entries, cls, leaves, nodes, keys


LEAVES = (LEAF_STATE, LEAF_STATE)
MALFORMED: list[tuple[str, Any, str]] = [
    ('not_a_tuple', 3,
     'the state is not a 3-tuple'),
    ('empty', (),
     'the state is not a 3-tuple'),
    ('two_items', ((LEAF_STATE,), False),
     'the state is not a 3-tuple'),
    ('four_items', ((LEAF_STATE,), False, '', 1),
     'the state is not a 3-tuple'),
    ('no_nodes', ((), False, ''),
     'the nodes do not form exactly one tree'),
    ('two_roots', (LEAVES, False, ''),
     'the nodes do not form exactly one tree'),
    ('nodes_not_tuples', ((3,), False, ''),
     'a node state is not a tuple'),
    ('short_node', ((LEAF_STATE[:6],), False, ''),
     'a node state has 6 items, not 7 or 8'),
    ('long_node', (((*LEAF_STATE, None),), False, ''),
     'a node state has 9 items, not 7 or 8'),
    ('namespace_int', ((LEAF_STATE,), False, 3),
     'the namespace is not a str'),
    ('kind_negative', (((-1, *LEAF_STATE[1:]),), False, ''),
     'the kind of a node is out of range'),
    ('kind_too_big', (((12, *LEAF_STATE[1:]),), False, ''),
     'the kind of a node is out of range'),
    ('kind_text', ((('1', *LEAF_STATE[1:]),), False, ''),
     'the kind of a node is not an integer'),
    ('arity_negative', ((node(4, -1, leaves=0, nodes=1),), False, ''),
     'the arity of a node is negative'),
    ('arity_too_big', ((LEAF_STATE, node(4, 2)), False, ''),
     'a node has more children than there are nodes before it'),
    ('arity_huge', ((LEAF_STATE, node(4, 2**62)), False, ''),
     'a tree holds at most 4294967294 leaves and as many nodes'),
    ('arity_overflow', ((LEAF_STATE, node(4, 2**80)), False, ''),
     'the arity of a node is out of range'),
    ('leaf_with_arity', ((LEAF_STATE, node(1, 1)), False, ''),
     'a leaf has children'),
    ('leaf_with_data', (((1, 0, 'x', None, None, 1, 1, None),), False, ''),
     'a leaf has node data'),
    ('leaf_counts_two', (((1, 0, None, None, None, 2, 1, None),), False, ''),
     'the counts of a node do not match its children'),
    ('leaf_counts_zero_nodes', (((1, 0, None, None, None, 1, 0, None),), False, ''),
     'the counts of a node are out of range'),
    ('leaf_negative_count', (((1, 0, None, None, None, -1, 1, None),), False, ''),
     'the counts of a node are out of range'),
    ('none_when_none_is_leaf', (((2, 0, None, None, None, 0, 1, None),), True, ''),
     'a None node stands where None is a leaf'),
    ('none_with_arity', ((LEAF_STATE, node(2, 1)), False, ''),
     'a None node has children'),
    ('list_with_data', ((LEAF_STATE, node(4, 1, 'x')), False, ''),
     'a list node has node data'),
    ('tuple_with_data', ((LEAF_STATE, node(3, 1, ())), False, ''),
     'a tuple node has node data'),
    ('list_with_entries', ((LEAF_STATE, node(4, 1, None, (0,))), False, ''),
     'a node that is not custom has entries'),
    ('list_with_class', ((LEAF_STATE, node(4, 1, None, None, list)), False, ''),
     'a node that is not custom has a custom type'),
    ('list_with_keys', ((LEAF_STATE, node(4, 1, keys={})), False, ''),
     'the original keys are present for the wrong kind of node'),
    ('wrong_leaf_count', ((LEAF_STATE, node(4, 1, leaves=2)), False, ''),
     'the counts of a node do not match its children'),
    ('wrong_node_count', ((LEAF_STATE, node(4, 1, nodes=3)), False, ''),
     'the counts of a node do not match its children'),
    ('dict_without_original', ((LEAF_STATE, node(5, 1, ['a'])), False, ''),
     'the original keys are present for the wrong kind of node'),
    ('dict_keys_missing', ((LEAF_STATE, node(5, 1, None, keys={'a': None})), False, ''),
     'the keys of a dictionary node are not a list'),
    ('dict_too_few_keys', ((LEAF_STATE, node(5, 1, [], keys={})), False, ''),
     'the number of keys does not match the arity'),
    ('dict_duplicate_keys', ((*LEAVES, node(5, 2, ['a', 'a'], None, None, 2, 3, {'a': None})),
                             False, ''),
     'the keys of a dictionary node are not distinct'),
    ('dict_other_original', ((LEAF_STATE, node(5, 1, ['a'], keys={'b': None})), False, ''),
     'the original keys do not match the keys'),
    ('dict_unhashable_key', ((LEAF_STATE, node(5, 1, [[]], keys={'b': None})), False, ''),
     'the keys of a dictionary node are not hashable'),
    ('ordereddict_with_original', ((LEAF_STATE, node(7, 1, ['a'], keys={'a': None})), False, ''),
     'the original keys are present for the wrong kind of node'),
    ('ordereddict_duplicate', ((*LEAVES, node(7, 2, ['a', 'a'], None, None, 2, 3)), False, ''),
     'the keys of a dictionary node are not distinct'),
    ('defaultdict_data', ((LEAF_STATE, node(8, 1, ['a'], keys={'a': None})), False, ''),
     'the node data of a defaultdict node is not a pair'),
    ('defaultdict_factory', ((LEAF_STATE, node(8, 1, (3, ['a']), keys={'a': None})), False, ''),
     'the default factory of a defaultdict node is not callable'),
    ('namedtuple_arity', ((LEAF_STATE, node(6, 1, Point)), False, ''), 'does not match the arity'),
    ('namedtuple_class', ((LEAF_STATE, node(6, 1, list)), False, ''),
     'is not a namedtuple class'),
    ('namedtuple_instance', ((*LEAVES, node(6, 2, Point(1, 2), None, None, 2, 3)), False, ''),
     'the node data of a namedtuple node is not a class'),
    ('counts_of_a_state_twice', ((LEAF_STATE, *2 * (node(3, 1),)), False, ''),
     'the counts of a node do not match its children'),
    ('structseq_arity', ((LEAF_STATE, node(10, 1, __import__('time').struct_time)), False, ''),
     'does not match the arity'),
    ('structseq_class', ((LEAF_STATE, node(10, 1, tuple)), False, ''),
     'is not a PyStructSequence class'),
    ('deque_maxlen_small', ((*LEAVES, node(9, 2, 1, None, None, 2, 3)), False, ''),
     'the maxlen of a deque node is less than its arity'),
    ('deque_maxlen_text', ((LEAF_STATE, node(9, 1, 'x')), False, ''),
     'the maxlen of a deque node is not an integer'),
    ('deque_maxlen_negative', ((node(9, 0, -1, None, None, 0, 1),), False, ''),
     'the maxlen of a deque node is less than its arity'),
    ('custom_without_class', ((LEAF_STATE, node(0, 1)), False, ''),
     'the custom type of a custom node is not a class'),
    ('custom_builtin', ((LEAF_STATE, node(0, 1, None, None, list)), False, ''),
     'the custom type is a built-in type'),
    ('custom_entries_count', ((*LEAVES, node(0, 2, None, (0,), Pair, 2, 3)), False, ''),
     'the number of entries does not match the arity'),
    ('custom_entries_kind', ((*LEAVES, node(0, 2, None, 3, Pair, 2, 3)), False, ''),
     'the entries of a custom node are not a tuple'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "message"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED]
)
def test_malformed_states_are_rejected(state: Any, message: str) -> None:
    too_many = message.startswith("a tree holds at most")
    with pytest.raises(OverflowError if too_many else RuntimeError) as info:
        restore(state)
    start = "" if too_many else "Malformed pickled PyTreeSpec: .*"
    assert re.search(f"^{start}{re.escape(message)}", str(info.value))


def test_unknown_custom_types() -> None:
    class Node:
        pass

    for namespace, where in (("foo", "in namespace 'foo'."), ("", "in the global namespace.")):
        message = f"Unknown custom type in pickled PyTreeSpec: {Node!r} {where}"
        with pytest.raises(RuntimeError, match="^" + re.escape(message) + "$"):
            restore(((LEAF_STATE, node(0, 1, None, None, Node)), False, namespace))


def test_custom_types_fall_back_to_the_global_namespace() -> None:
    state = ((*LEAVES, node(0, 2, None, None, Pair, 2, 3)), False, "nowhere")
    assert restore(state) == structure(Pair(1, 2), namespace="nowhere")
    assert restore((state[0], False, "pairs")) == structure(Pair(1, 2), namespace="pairs")


@pytest.mark.skipif(optree._C.OPTREE_HAS_FROZENDICT, reason="this Python has frozendict")
def test_frozendict_nodes_need_a_python_with_frozendict() -> None:
    message = (
        "Cannot restore a PyTreeSpec containing a `frozendict` node: this build of optree was "
        "compiled without `frozendict` support (requires Python 3.15+)."
    )
    state = ((LEAF_STATE, node(11, 1, ["a"], keys={"a": None})), False, "")
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        restore(state)


def test_defaultdict_state_may_be_a_list() -> None:
    state = ((LEAF_STATE, node(8, 1, [int, ["a"]], keys={"a": None})), False, "")
    assert restore(state) == structure(defaultdict(int, a=1))


def test_local_classes_do_not_pickle() -> None:
    local = namedtuple("local", ["x"])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(pickle.PicklingError, match=r"Can't pickle .*:"):
            pickle.dumps(structure(local(1)), protocol)


def test_setstate_replaces_everything() -> None:
    treespec = structure([1])
    other = pickle.loads(pickle.dumps(structure({"a": 1})))
    assert other == structure({"a": 1})
    assert treespec == structure([1])


def test_a_failed_setstate_leaves_a_usable_object() -> None:
    treespec = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    with pytest.raises(RuntimeError, match="not a 3-tuple"):
        treespec.__setstate__(())
    treespec.__setstate__(structure([1]).__getstate__())
    assert treespec == structure([1])


BARE = """
    import copy, gc, pickle, sys
    import optree

    bare = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    action = {action}
    try:
        print(type(action(bare)).__name__)
    except Exception as error:
        print(type(error).__name__)
    gc.collect()
"""


@pytest.mark.differs_from_published
@pytest.mark.parametrize(
    'action',
    [
        'repr', 'hash', 'len', 'lambda s: s == s', 'lambda s: s == optree.tree_structure(1)',
        'lambda s: s <= s', 'lambda s: s.unflatten([])', 'lambda s: s.flatten_up_to(1)',
        'lambda s: s.paths()', 'lambda s: s.accessors()', 'lambda s: s.entries()',
        'lambda s: s.children()', 'lambda s: s.entry(0)', 'lambda s: s.child(0)',
        'lambda s: s.one_level()', 'lambda s: s.is_leaf()', 'lambda s: s.is_one_level()',
        'lambda s: s.type', 'lambda s: s.kind', 'lambda s: s.num_nodes', 'lambda s: s.num_children',
        'lambda s: s.namespace', 'lambda s: s.none_is_leaf', 'lambda s: s.compose(s)',
        'lambda s: s.transform(lambda n: n, lambda n: n)', 'lambda s: s.walk([])',
        'lambda s: s.traverse([])', 'lambda s: s.broadcast_to_common_suffix(s)',
        'lambda s: s.__getstate__()', 'pickle.dumps', 'copy.copy', 'copy.deepcopy',
        'lambda s: optree.treespec_list([s])', 'lambda s: optree.tree_structure(1).compose(s)',
        'lambda s: optree.tree_structure([1]).broadcast_to_common_suffix(s)',
        'lambda s: optree.tree_structure([1]).transform(lambda n: s)',
    ],
)  # fmt: skip
def test_a_bare_structure_never_crashes(action: str) -> None:
    code = textwrap.dedent(BARE.format(action=action))
    done = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-c', code], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if action == "repr":
        assert done.stdout.strip() in {"str", "InternalError"}


def test_ring_of_custom_nodes_pickles() -> None:
    treespec = structure([Ring(1, Ring(2)), Box("p", p=1)], namespace=NAMESPACE)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(treespec, protocol))
        assert loaded == treespec
        assert loaded.unflatten([1, 2, 3]) == [Ring(1, Ring(2)), Box("p", p=3)]
