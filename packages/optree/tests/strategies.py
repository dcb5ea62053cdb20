# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for trees over every container kind."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from trees import Layer, Mapping2, Pair, Point, Point3, Ring, Unsortable

# Derandomised: every run draws the same examples, so failures can be reproduced.
settings.register_profile("optree", deadline=None, derandomize=True, max_examples=120)
settings.load_profile("optree")

leaves = st.one_of(
    st.integers(-5, 5),
    st.text(max_size=2),
    st.floats(allow_nan=False),
    st.booleans(),
    st.frozensets(st.integers(0, 3), max_size=2),
)
keys = st.one_of(
    st.integers(-3, 3),
    st.text("abcé", max_size=2),
    st.none(),
    st.tuples(st.integers(0, 2), st.text("ab", max_size=1)),
    st.floats(0.25, 0.75),
    st.sampled_from([Unsortable("p"), Unsortable("q")]),
)
# Mostly one kind of key, as in real trees; sometimes mixed.
key_kinds = st.one_of(
    st.just(st.text("abcdé", max_size=2)), st.just(st.integers(-9, 9)), st.just(keys)
)


def mappings(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[Any, Any]]:
    return key_kinds.flatmap(lambda kind: st.dictionaries(kind, children, max_size=4))


def _deque(arguments: tuple[list[Any], int | None]) -> deque[Any]:
    items, slack = arguments
    return deque(items, maxlen=None if slack is None else len(items) + slack)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every built-in container kind and the custom ones over ``children``."""
    lists = st.lists(children, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        mappings(children),
        mappings(children).map(OrderedDict),
        st.tuples(st.sampled_from([None, int, list]), mappings(children)).map(
            lambda pair: defaultdict(*pair)
        ),
        st.tuples(lists, st.one_of(st.none(), st.integers(0, 2))).map(_deque),
        st.tuples(children, children).map(lambda pair: Point(*pair)),
        st.tuples(children, children).map(lambda pair: Point3(*pair)),
        st.tuples(children, children).map(lambda pair: Layer(*pair)),
        st.tuples(children, children).map(lambda pair: Pair(*pair)),
        lists.map(lambda items: Ring(*items)),
        mappings(children).map(Mapping2),
    )


trees = st.recursive(st.one_of(leaves, st.none()), containers, max_leaves=12)
"""Trees for the namespace ``trees.NAMESPACE``, with ``None`` at any place."""

trees_with_leaves = st.recursive(leaves, containers, max_leaves=12)
"""Trees without ``None``; empty containers still occur."""
