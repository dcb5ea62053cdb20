# SPDX-License-Identifier: Apache-2.0
"""Mappings made by unflatten behave like any other mapping."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from trees import Unsortable

import optree


def _shuffle(mapping: OrderedDict[Any, Any], keys: list[Any]) -> None:
    mapping.move_to_end(keys[0])
    mapping.move_to_end(keys[-1], last=False)


def _replace(mapping: OrderedDict[Any, Any], keys: list[Any]) -> None:
    mapping[keys[0]] = "other"
    mapping["new"] = 1
    mapping.setdefault(keys[1], 2)


def _remove(mapping: OrderedDict[Any, Any], keys: list[Any]) -> None:
    del mapping[keys[1]]
    mapping.pop(keys[0])
    mapping[keys[0]] = "again"


def _pop_items(mapping: OrderedDict[Any, Any], keys: list[Any]) -> None:
    mapping.popitem()
    mapping.popitem(last=False)
    mapping.update(dict.fromkeys(keys, "more"))


def _clear(mapping: OrderedDict[Any, Any], keys: list[Any]) -> None:
    mapping.clear()
    mapping[keys[0]] = 0


@pytest.mark.parametrize("change", [_shuffle, _replace, _remove, _pop_items, _clear])
@pytest.mark.parametrize("size", [3, 6, 300])
@pytest.mark.parametrize(
    "key",
    [str, int, lambda i: (str(i), i), lambda i: "\u03bb" * i, lambda i: Unsortable(str(i))],
    ids=["str", "int", "tuple", "greek", "object"],
)
def test_rebuilt_ordered_dicts_can_be_changed_like_any_other(
    key: Callable[[int], Any], size: int, change: Callable[[Any, list[Any]], None]
) -> None:
    keys = [key(i) for i in range(size)]
    expected = OrderedDict((k, [i]) for i, k in enumerate(keys))
    leaves, spec = optree.tree_flatten(OrderedDict((k, i) for i, k in enumerate(keys)))
    for _ in range(3):  # the fast path starts once the keys have been seen
        rebuilt = optree.tree_unflatten(spec, [[leaf] for leaf in leaves])
        before = expected.copy()
        change(rebuilt, keys)
        change(before, keys)
        assert list(rebuilt.items()) == list(before.items())
        assert list(reversed(rebuilt)) == list(reversed(before))
        assert rebuilt == before
        assert list(dict.items(rebuilt.copy())) == list(before.items())
        assert optree.tree_leaves(rebuilt) == optree.tree_leaves(before)


def test_rebuilt_mappings_in_cycles_are_collected() -> None:
    class Owned:
        pass

    for make in (dict, OrderedDict):
        spec = optree.tree_structure(make([("a", 1), ("b", 2)]))
        owned = Owned()
        alive = weakref.ref(owned)
        rebuilt = optree.tree_unflatten(spec, [owned, []])
        rebuilt["b"].append(rebuilt)
        del owned, rebuilt
        gc.collect()
        assert alive() is None
