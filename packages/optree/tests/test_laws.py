# SPDX-License-Identifier: Apache-2.0
"""Laws that hold for every tree: those of the table and generated ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import reference
import strategies
from hypothesis import given
from hypothesis import strategies as st
from trees import NAMESPACE, TREES, TreeRow, every_none_mode, every_tree, is_same

import optree

none_modes = st.booleans()


def check_flatten_agrees_with_the_reference(tree: Any, **options: Any) -> None:
    expected = reference.flatten(tree, **options)
    leaves, treespec = optree.tree_flatten(tree, **options)
    assert type(leaves) is list
    assert len(leaves) == len(expected.leaves)
    assert all(a is b for a, b in zip(leaves, expected.leaves))
    assert repr(treespec) == str(treespec) == expected.text
    assert treespec.num_leaves == len(treespec) == len(expected.leaves)
    assert treespec.num_nodes == expected.num_nodes
    assert treespec.none_is_leaf is options["none_is_leaf"]
    assert treespec.namespace == (options["namespace"] if expected.has_custom else "")
    assert treespec.paths() == expected.paths
    assert optree.tree_paths(tree, **options) == expected.paths
    paths, path_leaves, path_treespec = optree.tree_flatten_with_path(tree, **options)
    assert paths == expected.paths
    assert all(a is b for a, b in zip(path_leaves, leaves))
    assert path_treespec == treespec


def check_leaf_orders_agree(tree: Any, **options: Any) -> None:
    leaves = optree.tree_leaves(tree, **options)
    iterated = list(optree.tree_iter(tree, **options))
    collected: list[Any] = []
    assert optree.tree_map_(collected.append, tree, **options) is tree
    for other in (iterated, collected, optree.tree_flatten(tree, **options)[0]):
        assert len(other) == len(leaves)
        assert all(a is b for a, b in zip(other, leaves))
    assert optree.tree_structure(tree, **options) == optree.tree_flatten(tree, **options)[1]
    assert optree.all_leaves(leaves, is_leaf=lambda x: True, **options)


def check_round_trip(tree: Any, reversible: bool = True, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    rebuilt = [
        treespec.unflatten(leaves),
        treespec.unflatten(iter(leaves)),
        treespec.unflatten(tuple(leaves)),
        optree.tree_unflatten(treespec, (leaf for leaf in leaves)),
        treespec.traverse(leaves),
        treespec.traverse(leaves, lambda node: node, lambda leaf: leaf),
        treespec.walk(leaves),
        optree.tree_map(lambda leaf: leaf, tree, **options),
    ]
    for other in rebuilt:
        assert type(other) is type(tree)
        again, again_treespec = optree.tree_flatten(other, **options)
        assert again_treespec == treespec
        assert hash(again_treespec) == hash(treespec)
        assert all(a is b for a, b in zip(again, leaves))
        if reversible:
            assert is_same(other, tree)


def check_leaf_count_is_enforced(tree: Any, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    count = len(leaves)
    with pytest.raises(
        ValueError, match=rf"^Too many leaves for PyTreeSpec; expected: {count}\.(\n|$)"
    ):
        treespec.unflatten([*leaves, 0])
    if leaves:
        message = rf"^Too few leaves for PyTreeSpec; expected: {count}, got: {count - 1}\.$"
        with pytest.raises(ValueError, match=message):
            treespec.unflatten(leaves[:-1])


def check_map_composes(tree: Any, **options: Any) -> None:
    once = optree.tree_map(lambda leaf: (leaf,), tree, **options)
    wrapped = optree.tree_leaves(once, is_leaf=lambda x: type(x) is Wrapped, **options)
    assert len(wrapped) == len(optree.tree_leaves(once, **options))
    first = optree.tree_map(Wrapped, tree, **options)
    twice = optree.tree_map(lambda w: Wrapped(w.item), first, **options)
    fused = optree.tree_map(lambda leaf: Wrapped(Wrapped(leaf).item), tree, **options)
    assert is_same(twice, fused)
    items = [wrapped.item for wrapped in optree.tree_leaves(twice, **options)]
    assert all(a is b for a, b in zip(items, optree.tree_leaves(tree, **options)))
    assert len(items) == len(optree.tree_leaves(tree, **options))


class Wrapped:
    """A box around one leaf; boxes are equal if their items are identical."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return type(other) is Wrapped and self.item is other.item

    __hash__ = None  # type: ignore[assignment]


def check_map_of_many_trees(tree: Any, **options: Any) -> None:
    leaves = optree.tree_leaves(tree, **options)
    tripled = optree.tree_map(lambda *args: Wrapped(args), tree, tree, tree, **options)
    triples = [w.item for w in optree.tree_leaves(tripled, **options)]
    assert len(triples) == len(leaves)
    assert all(len(t) == 3 and all(x is leaf for x in t) for t, leaf in zip(triples, leaves))
    with_path = optree.tree_map_with_path(lambda *args: Wrapped(args), tree, tree, **options)
    found = [w.item for w in optree.tree_leaves(with_path, **options)]
    assert [item[0] for item in found] == optree.tree_paths(tree, **options)
    assert all(item[1] is item[2] is leaf for item, leaf in zip(found, leaves))
    with_accessor = optree.tree_map_with_accessor(lambda a, x: Wrapped((a, x)), tree, **options)
    accessors = [w.item[0] for w in optree.tree_leaves(with_accessor, **options)]
    assert accessors == optree.tree_accessors(tree, **options)


def check_accessors_reach_the_leaves(tree: Any, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    accessors = treespec.accessors()
    assert accessors == optree.tree_accessors(tree, **options)
    triple = optree.tree_flatten_with_accessor(tree, **options)
    assert triple[0] == accessors
    assert triple[2] == treespec
    assert [accessor.path for accessor in accessors] == treespec.paths()
    for accessor, leaf in zip(accessors, leaves):
        reached = [accessor(tree), reference.follow(tree, accessor)]
        assert all(x is leaf for x in reached)
        if all(type(entry) is not optree.FlattenedEntry for entry in accessor):
            names = {"tree": tree}
            code = accessor.codify("tree")
            if "Unsortable" not in code:
                assert eval(code, names) is leaf


def check_specs_navigate(tree: Any, **options: Any) -> None:
    treespec = optree.tree_structure(tree, **options)
    entries, children = treespec.entries(), treespec.children()
    assert len(entries) == len(children) == treespec.num_children
    assert sum(child.num_leaves for child in children) == treespec.num_leaves - treespec.is_leaf()
    assert sum(child.num_nodes for child in children) == treespec.num_nodes - 1
    paths = [(entry, *path) for entry, child in zip(entries, children) for path in child.paths()]
    assert paths == ([] if treespec.is_leaf() else treespec.paths())
    for index in range(-len(entries), len(entries)):
        assert treespec.entry(index) is entries[index] or treespec.entry(index) == entries[index]
        assert treespec.child(index) == children[index]
    one_level = treespec.one_level()
    if treespec.is_leaf():
        assert one_level is None
        assert treespec.type is None
    else:
        assert one_level is not None
        assert one_level.is_one_level()
        assert one_level.type is treespec.type is type(tree)
        assert one_level.kind == treespec.kind
        assert one_level.entries() == entries
        assert all(child.is_leaf() for child in one_level.children())


def check_prefix_laws(tree: Any, **options: Any) -> None:
    treespec = optree.tree_structure(tree, **options)
    leaf = optree.treespec_leaf(none_is_leaf=options["none_is_leaf"])
    for smaller in (treespec, leaf, treespec.one_level() or leaf):
        assert smaller.is_prefix(treespec)
        assert smaller <= treespec
        assert treespec >= smaller
        assert treespec.is_suffix(smaller)
        # Strict: at least one leaf of the prefix corresponds to a subtree that is not a leaf.
        strict = smaller != treespec if smaller is not treespec else False
        assert smaller.is_prefix(treespec, strict=True) is strict
        assert (smaller < treespec) is strict
        assert (treespec > smaller) is strict
        assert smaller.broadcast_to_common_suffix(treespec) == treespec
        assert treespec.broadcast_to_common_suffix(smaller) == treespec
    assert not treespec < treespec
    assert treespec == treespec
    assert not treespec != treespec  # noqa: SIM202


def check_flatten_up_to_itself(tree: Any, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    subtrees = treespec.flatten_up_to(tree)
    assert type(subtrees) is list
    assert len(subtrees) == len(leaves)
    assert all(a is b for a, b in zip(subtrees, leaves))
    replaced = [[leaf, ()] for leaf in leaves]
    found = treespec.flatten_up_to(treespec.unflatten(replaced))
    assert all(a is b for a, b in zip(found, replaced))


def check_compose_counts(tree: Any, **options: Any) -> None:
    outer = optree.tree_structure(tree, **options)
    inner = optree.tree_structure([1, {"k": 2, "j": (3,)}], none_is_leaf=options["none_is_leaf"])
    composed = outer.compose(inner)
    assert composed.num_leaves == outer.num_leaves * inner.num_leaves
    assert composed.num_nodes == (
        outer.num_nodes - outer.num_leaves + outer.num_leaves * inner.num_nodes
    )
    assert composed.paths() == [o + i for o in outer.paths() for i in inner.paths()]
    assert outer.is_prefix(composed)
    grown = outer.transform(None, lambda leaf: inner)
    assert grown == composed
    assert hash(grown) == hash(composed)
    assert outer.compose(optree.treespec_leaf(none_is_leaf=options["none_is_leaf"])) == outer
    copied = outer.transform()
    assert copied == outer
    assert copied.transform(lambda node: node, lambda leaf: leaf) == outer


def check_leaves_come_with_their_paths(tree: Any, **options: Any) -> None:
    pairs = optree.tree_leaves_with_path(tree, **options)
    paths, leaves, _ = optree.tree_flatten_with_path(tree, **options)
    assert [path for path, _ in pairs] == paths
    assert [id(x) for _, x in pairs] == [id(leaf) for leaf in leaves]


def check_transpose_twice(tree: Any, **options: Any) -> None:
    outer = optree.tree_structure(tree, **options)
    if outer.num_leaves == 0:
        return
    inner = optree.tree_structure({"p": 0, "q": [0, 0]}, none_is_leaf=options["none_is_leaf"])
    numbers = list(range(outer.num_leaves * inner.num_leaves))
    nested = outer.compose(inner).unflatten(numbers)
    swapped = optree.tree_transpose(outer, inner, nested)
    assert optree.tree_structure(swapped, **options) == inner.compose(outer)
    back = optree.tree_transpose(inner, outer, swapped)
    assert optree.tree_leaves(back, **options) == numbers
    assert optree.tree_structure(back, **options) == outer.compose(inner)


def check_broadcast_laws(tree: Any, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    marker = Wrapped(None)
    replicated = optree.broadcast_prefix(marker, tree, **options)
    assert len(replicated) == len(leaves)
    assert all(x is marker for x in replicated)
    shaped = optree.tree_broadcast_prefix(marker, tree, **options)
    assert optree.tree_structure(shaped, **options) == treespec
    same = optree.broadcast_prefix(tree, tree, **options)
    assert len(same) == len(leaves)
    assert all(a is b for a, b in zip(same, leaves))
    left, right = optree.tree_broadcast_common(tree, marker, **options)
    assert optree.tree_structure(left, **options) == optree.tree_structure(right, **options)
    left_leaves, right_leaves = optree.broadcast_common(tree, tree, **options)
    assert all(a is b is c for a, b, c in zip(left_leaves, right_leaves, leaves))
    mapped = optree.tree_broadcast_map(lambda a, b: Wrapped((a, b)), tree, marker, **options)
    items = [w.item for w in optree.tree_leaves(mapped, **options)]
    assert all(a is leaf and b is marker for (a, b), leaf in zip(items, leaves))
    assert optree.prefix_errors(tree, tree, **options) == []
    assert optree.prefix_errors(marker, tree, **options) == []


def check_walk_sees_every_node(tree: Any, **options: Any) -> None:
    leaves, treespec = optree.tree_flatten(tree, **options)
    seen: list[Any] = []
    result = treespec.walk(
        leaves,
        lambda cls, metadata, children: seen.append(cls) or len(children),
        lambda leaf: 0,
    )
    assert len(seen) == treespec.num_nodes - treespec.num_leaves
    assert result == treespec.num_children
    types: list[Any] = []
    treespec.transform(lambda node: types.append(node.type) or node)
    assert types == seen


def check_reductions(tree: Any, **options: Any) -> None:
    leaves = optree.tree_leaves(tree, **options)
    ids = [id(leaf) for leaf in leaves]
    assert optree.tree_reduce(lambda n, leaf: [*n, id(leaf)], tree, [], **options) == ids
    key = optree.tree_max(tree, default=None, key=lambda leaf: ids.index(id(leaf)), **options)
    assert key is max(leaves, default=None, key=lambda leaf: ids.index(id(leaf)))
    first = optree.tree_min(tree, default=None, key=lambda leaf: ids.index(id(leaf)), **options)
    assert first is (leaves[0] if leaves else None)
    assert optree.tree_all(tree, **options) is all(leaves)
    assert optree.tree_any(tree, **options) is any(leaves)


def check_copies_are_equal(tree: Any, **options: Any) -> None:
    treespec = optree.tree_structure(tree, **options)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(treespec, protocol))
        assert loaded == treespec
        assert hash(loaded) == hash(treespec)
        assert repr(loaded) == repr(treespec)
        assert loaded.__getstate__() == treespec.__getstate__()
        assert loaded.paths() == treespec.paths()
        assert loaded.accessors() == treespec.accessors()
    for copied in (copy.copy(treespec), copy.deepcopy(treespec), treespec.transform()):
        assert copied is not treespec
        assert copied == treespec
        assert hash(copied) == hash(treespec)
        assert repr(copied) == repr(treespec)


CHECKS = {
    name[len("check_") :]: check
    for name, check in sorted(globals().items())
    if name.startswith("check_")
}
every_law = pytest.mark.parametrize("law", CHECKS.values(), ids=list(CHECKS))


@every_law
@every_none_mode
@every_tree
def test_law_on_the_table(law: Any, row: TreeRow, none_is_leaf: bool) -> None:
    options: dict[str, Any] = {"none_is_leaf": none_is_leaf, "namespace": row.namespace}
    if law is check_round_trip:
        options["reversible"] = row.reversible
    law(row.make(), **options)


@every_law
def test_law_on_generated_trees(law: Any) -> None:
    @given(strategies.trees, none_modes)
    def run(tree: Any, none_is_leaf: bool) -> None:
        law(tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE)

    run()


@every_tree
def test_leaves_are_the_ones_written_in_the_table(row: TreeRow) -> None:
    if row.leaves is None:
        pytest.skip("no leaves written by hand in this row")
    assert optree.tree_leaves(row.make(), namespace=row.namespace) == row.leaves


@every_tree
def test_structure_is_the_one_written_in_the_table(row: TreeRow) -> None:
    if row.structure is None:
        pytest.skip("no structure written by hand in this row")
    treespec = optree.tree_structure(row.make(), namespace=row.namespace)
    kept = f", namespace='{treespec.namespace}'" if treespec.namespace else ""
    assert repr(treespec) == f"PyTreeSpec({row.structure}{kept})"


@given(strategies.trees, none_modes)
def test_insertion_order_mode_agrees_with_the_reference(tree: Any, none_is_leaf: bool) -> None:
    expected = reference.flatten(
        tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE, insertion_ordered=True
    )
    with optree.dict_insertion_ordered(True, namespace=NAMESPACE):
        leaves, treespec = optree.tree_flatten(tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE)
        iterated = list(optree.tree_iter(tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE))
        rebuilt = treespec.unflatten(leaves)
    assert len(leaves) == len(expected.leaves)
    assert all(a is b is c for a, b, c in zip(leaves, expected.leaves, iterated))
    assert treespec.paths() == expected.paths
    assert treespec.namespace == NAMESPACE
    assert is_same(rebuilt, tree)


@given(strategies.trees, none_modes, st.data())
def test_a_predicate_stops_where_the_reference_stops(
    tree: Any, none_is_leaf: bool, data: st.DataObject
) -> None:
    visited: list[Any] = []
    reference.flatten(
        tree,
        is_leaf=lambda x: bool(visited.append(x)),
        none_is_leaf=none_is_leaf,
        namespace=NAMESPACE,
    )
    stop = data.draw(st.sampled_from(visited))
    options = {"none_is_leaf": none_is_leaf, "namespace": NAMESPACE}
    expected_visits: list[Any] = []
    visits: list[Any] = []

    def predicate(record: list[Any]) -> Any:
        return lambda x: record.append(x) or x is stop

    expected = reference.flatten(tree, is_leaf=predicate(expected_visits), **options)
    leaves, treespec = optree.tree_flatten(tree, is_leaf=predicate(visits), **options)
    assert [id(x) for x in visits] == [id(x) for x in expected_visits]
    assert [id(x) for x in leaves] == [id(x) for x in expected.leaves]
    assert treespec.paths() == expected.paths
    assert repr(treespec) == expected.text
    visits.clear()
    iterated = list(optree.tree_iter(tree, is_leaf=predicate(visits), **options))
    assert [id(x) for x in iterated] == [id(x) for x in expected.leaves]
    assert [id(x) for x in visits] == [id(x) for x in expected_visits]


@given(strategies.trees, strategies.trees, none_modes)
def test_equality_prefix_and_hash_agree_across_trees(
    left: Any, right: Any, none_is_leaf: bool
) -> None:
    options = {"none_is_leaf": none_is_leaf, "namespace": NAMESPACE}
    a = optree.tree_structure(left, **options)
    b = optree.tree_structure(right, **options)
    assert (a == b) is (b == a) is not (a != b)
    assert (a == b) == (
        reference.flatten(left, **options).text == reference.flatten(right, **options).text
    )
    if a == b:
        assert hash(a) == hash(b)
        assert a <= b <= a
    assert (a <= b) is (b >= a) is a.is_prefix(b) is b.is_suffix(a)
    if a < b:
        assert a <= b
        assert a.broadcast_to_common_suffix(b).num_leaves == b.num_leaves
    fits = a <= b
    try:
        subtrees = a.flatten_up_to(right)
    except ValueError:
        fits_tree = False
    else:
        fits_tree = True
        assert len(subtrees) == a.num_leaves
    # Custom metadata and None are compared the same way by both relations.
    assert fits_tree is fits
    assert fits is (optree.prefix_errors(left, right, **options) == [])


@given(strategies.trees_with_leaves, strategies.trees_with_leaves)
def test_common_suffix_is_above_both_and_symmetric_in_shape(left: Any, right: Any) -> None:
    a = optree.tree_structure(left, namespace=NAMESPACE)
    b = optree.tree_structure(right, namespace=NAMESPACE)
    try:
        common = a.broadcast_to_common_suffix(b)
    except ValueError:
        with pytest.raises(ValueError, match=r"^PyTreeSpecs have incompatible |[Mm]ismatch"):
            b.broadcast_to_common_suffix(a)
        return
    assert a <= common
    assert b <= common
    other = b.broadcast_to_common_suffix(a)
    assert other <= common <= other
    assert sorted(map(repr, other.paths())) == sorted(map(repr, common.paths()))
    left_leaves, right_leaves = optree.broadcast_common(left, right, namespace=NAMESPACE)
    assert len(left_leaves) == len(right_leaves) == common.num_leaves


@given(strategies.trees, none_modes)
def test_one_level_flatten_agrees_with_the_treespec(tree: Any, none_is_leaf: bool) -> None:
    options = {"none_is_leaf": none_is_leaf, "namespace": NAMESPACE}
    treespec = optree.tree_structure(tree, **options)
    if treespec.is_leaf():
        with pytest.raises(ValueError, match=r"^Cannot flatten leaf-type: "):
            optree.tree_flatten_one_level(tree, **options)
        return
    level = optree.tree_flatten_one_level(tree, **options)
    assert list(level.entries) == treespec.entries()
    assert level.type is treespec.type
    assert level.kind == treespec.kind
    structures = [optree.tree_structure(child, **options) for child in level.children]
    assert structures == treespec.children()
    assert is_same(level.unflatten_func(level.metadata, tuple(level.children)), tree)


@given(strategies.trees, none_modes)
def test_partition_puts_each_leaf_on_exactly_one_side(tree: Any, none_is_leaf: bool) -> None:
    options: dict[str, Any] = {"none_is_leaf": none_is_leaf, "namespace": NAMESPACE}
    fill = Wrapped(None)
    leaves = optree.tree_leaves(tree, **options)
    yes, no = optree.tree_partition(
        lambda leaf: isinstance(leaf, int), tree, fillvalue=fill, **options
    )
    for leaf, in_yes, in_no in zip(
        leaves, optree.tree_leaves(yes, **options), optree.tree_leaves(no, **options)
    ):
        expected = (leaf, fill) if isinstance(leaf, int) else (fill, leaf)
        assert in_yes is expected[0]
        assert in_no is expected[1]


@given(strategies.trees)
def test_replace_nones_leaves_no_none(tree: Any) -> None:
    sentinel = Wrapped(None)
    replaced = optree.tree_replace_nones(sentinel, tree, namespace=NAMESPACE)
    before = optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
    after = optree.tree_leaves(replaced, none_is_leaf=True, namespace=NAMESPACE)
    assert len(before) == len(after)
    assert all(
        (new is sentinel) if old is None else (new is old) for old, new in zip(before, after)
    )


def test_structures_of_the_table_have_pairwise_different_hashes_when_unequal() -> None:
    treespecs = [
        optree.tree_structure(row.make(), none_is_leaf=none_is_leaf, namespace=row.namespace)
        for row in TREES
        for none_is_leaf in (False, True)
    ]
    for a in treespecs:
        for b in treespecs:
            assert (a == b) == (hash(a) == hash(b)), (a, b)
