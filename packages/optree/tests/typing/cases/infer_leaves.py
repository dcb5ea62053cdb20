# SPDX-License-Identifier: Apache-2.0
"""The leaf type is found in every kind of container, however deep the leaves are."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from typing_extensions import assert_type

import optree
from optree import PyTree, PyTreeAccessor, PyTreeSpec


class Point(NamedTuple):
    x: int
    y: int


class Pair:
    """A node because of its methods: `CustomTreeNode` is a protocol."""

    def __tree_flatten__(self) -> tuple[tuple[int, int], None]:
        return (1, 2), None

    @classmethod
    def __tree_unflatten__(cls, metadata: None, children: tuple[int, int]) -> Pair:
        return cls()


def leaves_of_one_container(
    in_list: list[int],
    in_tuple: tuple[int, ...],
    in_dict: dict[str, int],
    in_ordered: OrderedDict[str, int],
    in_defaultdict: defaultdict[str, int],
    in_deque: deque[int],
) -> None:
    assert_type(optree.tree_leaves(in_list), list[int])
    assert_type(optree.tree_leaves(in_tuple), list[int])
    assert_type(optree.tree_leaves(in_dict), list[int])
    assert_type(optree.tree_leaves(in_ordered), list[int])
    assert_type(optree.tree_leaves(in_defaultdict), list[int])
    assert_type(optree.tree_leaves(in_deque), list[int])
    assert_type(optree.tree_leaves(Point(1, 2)), list[int])
    assert_type(optree.tree_leaves(Pair()), list[int])


def leaves_of_leaves(number: int, text: str, raw: bytes) -> None:
    # Strings and bytes are sequences in Python but leaves in optree.
    assert_type(optree.tree_leaves(number), list[int])
    assert_type(optree.tree_leaves(text), list[str])
    assert_type(optree.tree_leaves(raw), list[bytes])
    assert_type(optree.tree_leaves([text]), list[str])


def leaves_of_nested_containers(
    params: dict[str, list[dict[str, float]]],
    optional: list[float | None],
    tree: PyTree[float],
) -> None:
    assert_type(optree.tree_leaves(params), list[float])
    assert_type(optree.tree_leaves(optional), list["float | None"])
    assert_type(optree.tree_leaves(tree), list[float])
    assert_type(optree.tree_iter(params), Iterator[float])
    assert_type(
        optree.tree_leaves_with_path(params),
        list[tuple[tuple[Any, ...], float]],
    )


def leaves_of_sequences_in_sequences(
    rows: list[list[float]],
    pairs: list[tuple[float, float]],
    batches: dict[str, list[tuple[float, ...]]],
    blocks: list[list[list[float]]],
    models: list[dict[str, list[float]]],
) -> None:
    assert_type(optree.tree_leaves(rows), list[float])
    assert_type(optree.tree_leaves(pairs), list[float])
    assert_type(optree.tree_leaves(batches), list[float])
    assert_type(optree.tree_leaves(blocks), list[float])
    assert_type(optree.tree_leaves(models), list[float])


def flatten_and_unflatten(params: dict[str, list[float]]) -> None:
    assert_type(optree.tree_flatten(params), tuple[list[float], PyTreeSpec])
    assert_type(
        optree.tree_flatten_with_path(params),
        tuple[list[tuple[Any, ...]], list[float], PyTreeSpec],
    )
    assert_type(
        optree.tree_flatten_with_accessor(params),
        tuple[list[PyTreeAccessor], list[float], PyTreeSpec],
    )
    leaves, spec = optree.tree_flatten(params)
    assert_type(optree.tree_unflatten(spec, leaves), PyTree[float])
    assert_type(spec.unflatten(str(leaf) for leaf in leaves), PyTree[str])
    assert_type(optree.tree_structure(params), PyTreeSpec)


def wrong_arguments(params: dict[str, list[float]], spec: PyTreeSpec) -> None:
    optree.tree_flatten(params, none_is_leaf=None)  # type: ignore[call-overload]
    optree.tree_flatten(params, namespace=0)  # type: ignore[call-overload]
    optree.tree_unflatten(params, spec)  # type: ignore[arg-type]
    optree.tree_leaves(tree=params)  # type: ignore[call-overload]
