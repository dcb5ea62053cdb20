# SPDX-License-Identifier: Apache-2.0
"""Hostile input (deep, cyclic, changing or raising objects) gives an error, never a crash."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest
from trees import NAMESPACE, Pair, Point, Ring, nested_lists

import optree

LIMIT = optree.MAX_RECURSION_DEPTH
TOO_DEEP = r"^Maximum recursion depth exceeded during flattening the tree\."

structure = optree.tree_structure


# depth --------------------------------------------------------------------------------------------

WRAPPERS = {
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dict": lambda x: {"k": x},
    "OrderedDict": lambda x: OrderedDict(k=x),
    "defaultdict": lambda x: defaultdict(int, k=x),
    "deque": lambda x: deque([x]),
    "namedtuple": lambda x: Point(x, None),
    "custom": lambda x: Pair(x, None),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))

FLATTENERS = {
    "flatten": optree.tree_flatten,
    "flatten_with_path": optree.tree_flatten_with_path,
    "flatten_with_accessor": optree.tree_flatten_with_accessor,
    "leaves": optree.tree_leaves,
    "structure": optree.tree_structure,
    "iter": lambda tree, **kw: list(optree.tree_iter(tree, **kw)),
    "paths": optree.tree_paths,
    "accessors": optree.tree_accessors,
    "map": lambda tree, **kw: optree.tree_map(lambda x: x, tree, **kw),
    "map_": lambda tree, **kw: optree.tree_map_(lambda x: x, tree, **kw),
    "map_with_path": lambda tree, **kw: optree.tree_map_with_path(lambda p, x: x, tree, **kw),
    "reduce": lambda tree, **kw: optree.tree_reduce(lambda a, b: a, tree, 0, **kw),
    "any": optree.tree_any,
    "broadcast_prefix": lambda tree, **kw: optree.broadcast_prefix(0, tree, **kw),
}
every_flatten = pytest.mark.parametrize("flatten", FLATTENERS.values(), ids=list(FLATTENERS))


def chain(wrap: Any, depth: int, leaf: Any = 0) -> Any:
    tree = leaf
    for _ in range(depth):
        tree = wrap(tree)
    return tree


@every_wrapper
@every_flatten
def test_depth_limit_is_exact(flatten: Any, wrap: Any) -> None:
    flatten(chain(wrap, LIMIT))
    with pytest.raises(RecursionError, match=TOO_DEEP):
        flatten(chain(wrap, LIMIT + 1))


@every_wrapper
def test_a_chain_at_the_limit_works_everywhere(wrap: Any) -> None:
    tree = chain(wrap, LIMIT, leaf=5)
    leaves, treespec = optree.tree_flatten(tree)
    assert leaves == [5]
    assert treespec == structure(tree)
    assert optree.tree_leaves(treespec.unflatten([6])) == [6]
    assert treespec.flatten_up_to(tree) == [5]
    assert len(treespec.paths()[0]) == LIMIT
    assert len(treespec.accessors()[0]) == LIMIT
    assert treespec.accessors()[0](tree) == 5
    assert repr(treespec).startswith("PyTreeSpec(")
    assert isinstance(hash(treespec), int)


@every_flatten
def test_cyclic_trees(flatten: Any) -> None:
    items: list[Any] = [0]
    items.append(items)
    mapping: dict[str, Any] = {"a": 0}
    mapping["self"] = (mapping,)
    queue: deque[Any] = deque()
    queue.append({"q": queue})
    pair = Pair(0, None)
    pair.right = pair
    for tree in (items, mapping, queue, pair):
        with pytest.raises(RecursionError, match=TOO_DEEP):
            flatten(tree)
    del items[:]
    mapping.clear()
    queue.clear()
    pair.right = None


def test_cyclic_trees_with_a_predicate() -> None:
    items: list[Any] = [1]
    items.append(items)
    visited = 0

    def predicate(x: Any) -> bool:
        nonlocal visited
        visited += 1
        return False

    with pytest.raises(RecursionError, match=TOO_DEEP):
        optree.tree_leaves(items, is_leaf=predicate)
    # The predicate sees the root, then the number and the list of each level.
    assert visited == 2 * LIMIT + 1
    del items[:]


def test_an_infinite_flatten_function() -> None:
    class Endless:
        pass

    optree.register_pytree_node(
        Endless, lambda n: ((Endless(),), None), lambda m, c: c, namespace="endless"
    )
    try:
        for flatten in FLATTENERS.values():
            with pytest.raises(RecursionError):
                flatten(Endless(), namespace="endless")
    finally:
        optree.unregister_pytree_node(Endless, namespace="endless")


def deep_treespec(depth: int) -> Any:
    """Return a structure of ``depth`` nested lists, also beyond the limit for trees."""
    block = structure(nested_lists(LIMIT // 2))
    treespec = optree.treespec_leaf()
    for _ in range(depth // (LIMIT // 2)):
        treespec = treespec.compose(block)
    return treespec


def test_structures_deeper_than_the_limit() -> None:
    depth = 2 * LIMIT
    treespec, twin = deep_treespec(depth), deep_treespec(depth)
    assert treespec.num_nodes == depth + 1
    assert treespec == twin
    assert hash(treespec) == hash(twin)
    assert treespec <= twin
    assert not treespec < twin
    assert repr(treespec) == f"PyTreeSpec({'[' * depth}*{']' * depth})"
    tree = treespec.unflatten([7])
    for _ in range(depth):
        (tree,) = tree
    assert tree == 7
    assert treespec.flatten_up_to(treespec.unflatten([7])) == [7]
    assert treespec.traverse([7], lambda n: n, lambda x: x) is not None
    assert treespec.walk([7], lambda cls, data, children: children[0]) == 7
    for walk in (treespec.paths, treespec.accessors):
        with pytest.raises(RecursionError, match="during walking the tree"):
            walk()
    import pickle

    assert pickle.loads(pickle.dumps(treespec)) == treespec
    assert treespec.transform(lambda n: n) == treespec
    shallow = structure([0])
    assert shallow.broadcast_to_common_suffix(treespec) == treespec
    assert treespec.broadcast_to_common_suffix(shallow) == treespec
    with pytest.raises(RecursionError, match="during broadcasting the treespecs"):
        treespec.broadcast_to_common_suffix(twin)
    assert treespec.child(0).num_nodes == depth
    assert treespec.compose(treespec).num_nodes == 2 * depth + 1


@pytest.mark.differs_from_published  # the process ends
@pytest.mark.parametrize("kilobytes", [128, 256, 1024])
def test_trees_too_deep_for_the_stack_of_the_thread_are_refused(kilobytes: int) -> None:
    code = """
import sys, threading
from collections import OrderedDict, defaultdict, deque, namedtuple
import optree

class Node:
    def __init__(self, child):
        self.child = child

optree.register_pytree_node(
    Node, lambda node: ((node.child,), None), lambda _, children: Node(*children), namespace='deep'
)
Pair = namedtuple('Pair', 'first')
MAKERS = [
    lambda tree: [tree], lambda tree: (tree,), lambda tree: {'k': tree}, Pair, Node,
    lambda tree: OrderedDict(k=tree), lambda tree: defaultdict(int, k=tree),
    lambda tree: deque([tree]),
]
FUNCTIONS = {
    'leaves': lambda tree: optree.tree_leaves(tree, namespace='deep'),
    'leaves_with_predicate': lambda tree: optree.tree_leaves(
        tree, is_leaf=lambda node: False, namespace='deep'
    ),
    'structure': lambda tree: optree.tree_structure(tree, namespace='deep'),
    'map': lambda tree: optree.tree_map(abs, tree, tree, namespace='deep'),
    'paths': lambda tree: optree.tree_flatten_with_path(tree, namespace='deep'),
    'accessors': lambda tree: optree.tree_flatten_with_accessor(tree, namespace='deep'),
    'iter': lambda tree: list(optree.tree_iter(tree, namespace='deep')),
}

def nest(makers, depth):
    levels = [-1]
    for i in range(depth):
        levels.append(makers[i % len(makers)](levels[-1]))
    return levels

def work(done):
    for makers in [*([maker] for maker in MAKERS), MAKERS]:
        for depth in (20, 300, optree.MAX_RECURSION_DEPTH - 10):
            levels = nest(makers, depth)
            for name, function in FUNCTIONS.items():
                try:
                    function(levels[-1])
                except RecursionError as error:
                    assert 'Maximum recursion depth exceeded' in str(error), error
                    assert depth > 20, name
                    done.append(depth)
                except TypeError as error:  # abs() of two numbers
                    assert name == 'map', error
            while levels:  # the outermost first: CPython's own deallocation is not under test
                levels.pop()

done = []
failures = []
def guarded():
    try:
        work(done)
    except BaseException as error:
        failures.append(error)
        raise
threading.stack_size(int(sys.argv[1]) * 1024)
thread = threading.Thread(target=guarded)
thread.start()
thread.join()
assert not failures
print(len(done) > 0)
"""
    run = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-c', code, str(kilobytes)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if kilobytes == 128:
        assert run.stdout.strip() == "True"


@pytest.mark.differs_from_published  # a 256 KiB stack is too small for it
def test_very_deep_structures_do_not_exhaust_the_stack() -> None:
    code = """
import gc, pickle, threading
import optree

def build():
    leaf = optree.treespec_leaf()
    tree = 0
    for _ in range(optree.MAX_RECURSION_DEPTH // 2):
        tree = [{'k': tree}]
    block = optree.tree_structure(tree, is_leaf=None) if False else None
    spec = leaf
    level = optree.tree_structure([{'k': 0}])
    for _ in range(9):
        level = level.compose(level)
    for _ in range(64):
        spec = spec.compose(level)
    return spec

def work():
    a, b = build(), build()
    assert a.num_nodes > 60000, a.num_nodes
    assert a == b and hash(a) == hash(b) and a <= b
    assert len(repr(a)) > 100000
    nested = a.unflatten([1])
    assert a.flatten_up_to(nested) == [1]
    for error in (a.paths, a.accessors, lambda: a.broadcast_to_common_suffix(b),
                  lambda: optree.tree_leaves(nested)):
        try:
            error()
        except RecursionError:
            pass
        else:
            raise AssertionError(error)
    # Take the nested containers apart by hand: CPython's own deallocation is not under test.
    while isinstance(nested, (list, dict)):
        nested = nested.pop() if isinstance(nested, list) else nested.pop('k')
    state = a.__getstate__()
    c = optree.PyTreeSpec.__new__(optree.PyTreeSpec)
    c.__setstate__(state)
    assert c == a
    del a, b, c, state
    gc.collect()

threading.stack_size(256 * 1024)
failures = []
def guarded():
    try:
        work()
    except BaseException as error:
        failures.append(error)
        raise
thread = threading.Thread(target=guarded)
thread.start()
thread.join()
assert not failures
print('fine')
"""
    done = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-c', code], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "fine"), done.stderr


@pytest.mark.differs_from_published  # which ends the process
def test_specs_that_hold_specs_do_not_exhaust_the_stack() -> None:
    code = """
import sys, threading
import optree

class Box:
    def __init__(self, spec):
        self.spec = spec

optree.register_pytree_node(
    Box, lambda box: ((), box.spec), lambda spec, _: Box(spec), namespace='box')

def nested(make):
    spec = optree.treespec_leaf()
    for _ in range(2000):
        spec = optree.tree_structure(make(spec), namespace='box')
    return spec

sys.setrecursionlimit(10**6)
a, b, keys = nested(Box), nested(Box), nested(lambda spec: {spec: 1})

def work():
    for use in (lambda: repr(a), lambda: a == b, lambda: hash(keys)):
        try:
            use()
            print('fine')
        except RecursionError:
            print('RecursionError')

threading.stack_size(256 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    done = subprocess.run(
        [sys.executable, '-X', 'faulthandler', '-c', code], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == 3 * ["RecursionError"]


# trees changed by user code -----------------------------------------------------------------------


def test_a_list_shrunk_while_flattening() -> None:
    for count in (2, 3, 100):
        items: list[Any] = list(range(count))

        def shrink(x: Any, items: list[Any] = items) -> bool:
            if x == 0:
                del items[1:]
            return False

        with pytest.raises(IndexError, match=r"^list index out of range$"):
            optree.tree_flatten(items, is_leaf=shrink)
        items[:] = range(count)
        with pytest.raises(IndexError, match=r"^list index out of range$"):
            optree.tree_leaves([items], is_leaf=shrink)


def test_a_list_grown_while_flattening() -> None:
    items: list[Any] = [0, 1, 2]

    def grow(x: Any) -> bool:
        if isinstance(x, int) and len(items) < 100:
            items.append(x)
        return False

    assert optree.tree_leaves(items, is_leaf=grow)[:3] == [0, 1, 2]


def test_a_list_replaced_while_flattening() -> None:
    items: list[Any] = [[1], [2], [3]]

    def replace(x: Any) -> bool:
        if x == [1]:
            items[1] = "new"
            gc.collect()
        return False

    assert optree.tree_leaves(items, is_leaf=replace) == [1, "new", 3]


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda m: defaultdict(int, m)])
@pytest.mark.parametrize("change", ["clear", "popitem", "grow", "replace"])
def test_a_dictionary_changed_while_flattening(make: Any, change: str) -> None:
    mapping = make({f"k{i}": object() for i in range(50)})
    values = list(mapping.values())
    done = False

    def meddle(x: Any) -> bool:
        nonlocal done
        if not done and x is values[0]:
            done = True
            if change == "clear":
                mapping.clear()
            elif change == "popitem":
                mapping.popitem()
            elif change == "grow":
                mapping.update({i: i for i in range(1000)})
            else:
                for key in mapping:
                    mapping[key] = [1]
            gc.collect()
        return False

    try:
        leaves = optree.tree_leaves(mapping, is_leaf=meddle)
    except (KeyError, RuntimeError):
        assert change in {"clear", "popitem", "grow"}
    else:
        assert leaves[0] is values[0]
        assert len(leaves) >= 50


@pytest.mark.differs_from_published
@pytest.mark.parametrize("make", [dict, lambda m: defaultdict(int, m)])
def test_a_dictionary_losing_a_key_is_a_key_error_or_a_snapshot(make: Any) -> None:
    mapping = make({"a": 0, "b": 1, "c": 2})

    def meddle(x: Any) -> bool:
        if x == 0:
            del mapping["c"]
        return False

    try:
        leaves = optree.tree_leaves(mapping, is_leaf=meddle)
    except KeyError as error:
        assert error.args == ("c",)  # noqa: PT017
    else:
        assert leaves == [0, 1, 2]


@pytest.mark.differs_from_published
def test_a_key_that_changes_the_dictionary_when_compared() -> None:
    mapping: dict[Any, Any] = {}

    class Key:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def __lt__(self, other: Key) -> bool:
            mapping.clear()
            gc.collect()
            return self.rank < other.rank

    mapping.update({Key(i): [i] for i in (3, 1, 2)})
    try:
        leaves = optree.tree_leaves(mapping)
    except (KeyError, RuntimeError):
        pass
    else:
        assert leaves == [1, 2, 3]
    mapping.update({Key(i): [i] for i in (3, 1, 2)})
    try:
        treespec = structure(mapping)
    except (KeyError, RuntimeError):
        pass
    else:
        assert treespec.num_children == 3


def test_a_deque_changed_while_flattening() -> None:
    queue: deque[Any] = deque([0, [1], 2])

    def meddle(x: Any) -> bool:
        if x == 0:
            queue.clear()
            queue.extend(range(10))
        return False

    try:  # noqa: SIM105
        assert optree.tree_leaves(queue, is_leaf=meddle) == [0, 1, 2]
    except (IndexError, RuntimeError):
        pass


def test_trees_changed_while_matching() -> None:
    class Meta:
        def __init__(self, action: Any = None) -> None:
            self.action = action

        def __eq__(self, other: object) -> bool:
            if isinstance(other, Meta) and other.action is not None:
                other.action()
            return True

        __hash__ = None  # type: ignore[assignment]

    class Node:
        def __init__(self, action: Any = None) -> None:
            self.action = action

    optree.register_pytree_node(
        Node, lambda n: ((), Meta(n.action)), lambda m, c: Node(), namespace="matching"
    )
    try:
        for container in ([], deque()):
            treespec = structure(type(container)([1, 2, [3], Node()]), namespace="matching")
            tree = type(container)([1, 2, [3]])
            tree.append(Node(tree.clear))
            try:
                found = treespec.flatten_up_to(tree)
            except (IndexError, ValueError, RuntimeError):
                pass
            else:
                assert found == [1, 2, 3]
        mapping: dict[str, Any] = {"a": 1, "b": [2]}
        mapping["c"] = Node(mapping.clear)
        treespec = structure({"a": 1, "b": [2], "c": Node()}, namespace="matching")
        try:
            found = treespec.flatten_up_to(mapping)
        except (KeyError, ValueError, RuntimeError):
            pass
        else:
            assert found == [1, 2]
    finally:
        optree.unregister_pytree_node(Node, namespace="matching")


def test_leaves_list_changed_while_rebuilding() -> None:
    class Node:
        pass

    leaves = [1, 2, 3, 4]

    def unflatten(metadata: Any, children: Any) -> Any:
        del leaves[:]
        gc.collect()
        return children

    optree.register_pytree_node(Node, lambda n: ((0,), None), unflatten, namespace="draining")
    try:
        treespec = structure([0, Node(), 0, 0], namespace="draining")
        try:
            result = treespec.unflatten(leaves)
        except (ValueError, IndexError):
            pass
        else:
            assert result == [1, (2,), 3, 4]
    finally:
        optree.unregister_pytree_node(Node, namespace="draining")


def test_nothing_half_built_is_seen_by_the_collector() -> None:
    def look() -> None:
        for thing in gc.get_objects():
            if type(thing) in (list, tuple, dict, deque):
                repr_of_length = len(thing)
                for item in list(thing)[:3]:
                    assert repr_of_length >= 0
                    type(item)

    class Meta:
        def __eq__(self, other: object) -> bool:
            look()
            return True

        __hash__ = None  # type: ignore[assignment]

    class Node:
        pass

    def flatten(node: Node) -> Any:
        look()
        return (1, 2), Meta()

    def unflatten(metadata: Any, children: Any) -> Node:
        look()
        return Node()

    optree.register_pytree_node(Node, flatten, unflatten, namespace="looking")
    try:
        tree = [1, (2, Node()), {"a": 3, "b": Node()}, deque([4, Node()])]
        leaves, treespec = optree.tree_flatten(tree, namespace="looking")
        treespec.unflatten(leaves)
        treespec.flatten_up_to(tree)
        optree.tree_map(lambda *xs: look(), tree, tree, namespace="looking")
        treespec.traverse(leaves, lambda n: look(), lambda x: look())
        optree.tree_flatten_with_path(tree, namespace="looking")
        list(optree.tree_iter(tree, namespace="looking"))
    finally:
        optree.unregister_pytree_node(Node, namespace="looking")


# raising objects ----------------------------------------------------------------------------------


class Touchy:
    """A leaf that refuses every special method a container might call."""

    def _refuse(self, *args: Any) -> Any:
        raise AssertionError("a leaf was touched")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse  # type: ignore  # noqa: PGH003
    __bool__ = __len__ = __iter__ = __repr__ = __str__ = __getattr__ = _refuse  # type: ignore  # noqa: PGH003
    __getitem__ = __contains__ = _refuse


def test_leaves_are_never_touched() -> None:
    touchy = Touchy()
    tree = [
        touchy,
        {"b": touchy, "a": (touchy, None)},
        Point(touchy, deque([touchy])),
        Ring(touchy),
    ]
    options: dict[str, Any] = {"namespace": NAMESPACE}
    leaves, treespec = optree.tree_flatten(tree, **options)
    assert len(leaves) == 6
    assert all(leaf is touchy for leaf in leaves)
    treespec.unflatten(leaves)
    treespec.flatten_up_to(tree)
    list(optree.tree_iter(tree, **options))
    optree.tree_map(lambda a, b: a, tree, tree, **options)
    optree.tree_map_with_path(lambda p, a: a, tree, **options)
    optree.broadcast_prefix(touchy, tree, **options)
    optree.tree_broadcast_common(tree, touchy, **options)
    optree.tree_broadcast_map(lambda a, b: a, tree, touchy, **options)
    assert optree.prefix_errors(touchy, tree, **options) == []
    assert optree.tree_is_leaf(touchy)


def test_objects_lying_about_their_class() -> None:
    class Liar:
        __class__ = list  # type: ignore[assignment]

    liar = Liar()
    assert isinstance(liar, list)
    assert optree.tree_leaves([liar])[0] is liar
    with pytest.raises(ValueError, match="^Expected an instance of list, got "):
        structure([1]).flatten_up_to(liar)


def test_metaclasses_with_hostile_attributes() -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            if name in ("_fields", "_make", "_asdict", "n_fields", "__bases__"):
                raise LookupError(name)
            return super().__getattribute__(name)

        def __eq__(cls, other: object) -> bool:
            raise LookupError("class eq")

        def __hash__(cls) -> int:
            raise LookupError("class hash")

    class Hostile(metaclass=Meta):
        pass

    hostile = Hostile()
    assert optree.tree_leaves([hostile])[0] is hostile


def test_a_raising_hash_of_keys_propagates() -> None:
    class Key:
        broken = False

        def __hash__(self) -> int:
            if Key.broken:
                raise LookupError("hash")
            return 1

    mapping = {Key(): 1}
    leaves, treespec = optree.tree_flatten(mapping)
    Key.broken = True
    with pytest.raises(LookupError, match="^hash$"):
        treespec.unflatten(leaves)
    with pytest.raises(LookupError, match="^hash$"):
        hash(treespec)
    Key.broken = False
    assert treespec.unflatten(leaves) == mapping


def test_a_raising_equality_of_keys_propagates() -> None:
    class Key:
        broken = False

        def __init__(self, name: str) -> None:
            self.name = name

        def __hash__(self) -> int:
            return 1

        def __lt__(self, other: Key) -> bool:
            return self.name < other.name

        def __eq__(self, other: object) -> bool:
            if Key.broken:
                raise LookupError("eq")
            return isinstance(other, Key) and self.name == other.name

    a, b = {Key("a"): 1, Key("b"): 2}, {Key("a"): 1, Key("b"): 2}
    treespec, other = structure(a), structure(b)
    assert treespec == other
    Key.broken = True
    for action in (
        lambda: treespec == other,
        lambda: treespec <= other,
        lambda: treespec.flatten_up_to(b),
        lambda: treespec.broadcast_to_common_suffix(other),
    ):
        with pytest.raises(LookupError, match="^eq$"):
            action()
    Key.broken = False
    assert treespec == other


def test_a_raising_default_factory_is_never_called() -> None:
    def factory() -> Any:
        raise AssertionError("called")

    tree = defaultdict(factory, a=1)
    leaves, treespec = optree.tree_flatten(tree)
    assert treespec.unflatten(leaves) == tree
    assert treespec.flatten_up_to(defaultdict(factory, a=2)) == [2]


# size ---------------------------------------------------------------------------------------------


def test_a_million_leaves() -> None:
    tree = [list(range(1000)) for _ in range(1000)]
    leaves, treespec = optree.tree_flatten(tree)
    assert len(leaves) == treespec.num_leaves == 1_000_000
    assert treespec.num_nodes == 1_001_001
    assert treespec.unflatten(leaves) == tree
    assert leaves[-1] is tree[-1][-1]
    assert treespec == structure(tree)
    assert sum(1 for _ in optree.tree_iter(tree)) == 1_000_000


def test_a_wide_flat_list() -> None:
    tree = list(range(300_000))
    leaves, treespec = optree.tree_flatten(tree)
    assert leaves == tree
    assert leaves is not tree
    assert treespec.num_children == 300_000
    assert treespec.entry(-1) == 299_999


def test_many_unequal_keys() -> None:
    tree = {i * 7919 % 100_003: i for i in range(20_000)}
    leaves, treespec = optree.tree_flatten(tree)
    assert treespec.entries() == sorted(tree)
    assert list(treespec.unflatten(leaves).items()) == list(tree.items())


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (optree.tree_transpose, (None, {}), "none_is_leaf"),
        (optree.tree_transpose, (optree.tree_structure([0]), {}), "none_is_leaf"),
        (optree.treespec_is_one_level, (), "num_nodes"),
    ],
)
def test_objects_that_are_not_specs_raise_the_published_error(
    function: Any, arguments: tuple[Any, ...], name: str
) -> None:
    with pytest.raises(AttributeError, match=rf"^'int' object has no attribute '{name}'$"):
        function(3, *arguments)
