# SPDX-License-Identifier: Apache-2.0
"""Check a rival's answer before it is timed, against a plain recursive walk."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

from benchmarks.optree.trees import Leaf, Pair, Record

Tree = Any


class WrongAnswerError(AssertionError):
    """The answer of a rival differs from that of the walk."""


def expected_leaves(tree: Tree, rival: Any) -> list[Any]:
    """Return the leaves in the order that the rival documents.

    Args:
        tree: the tree to walk.
        rival: a module that states `NONE_IS_LEAF`, and how it orders mappings: `SORTS_DICT`
            and `SORTS_ORDERED_DICT`.
    """
    leaves: list[Any] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        children = children_of(node, rival)
        if children is not None:
            waiting += reversed(children)
        elif node is not None or rival.NONE_IS_LEAF:
            leaves.append(node)
    return leaves


def children_of(node: Tree, rival: Any) -> list[Tree] | None:
    """Return the children of a container in the rival's order, None for anything else."""
    if isinstance(node, dict):
        return [node[key] for key in keys_of(node, rival)]
    if isinstance(node, (tuple, list)):
        return list(node)
    if isinstance(node, (Pair, Record)):
        return [node.left, node.right]
    return None


def keys_of(node: dict[Any, Tree], rival: Any) -> list[Any]:
    """Return the keys of a mapping in the rival's order."""
    ordered = isinstance(node, OrderedDict)
    sort = rival.SORTS_ORDERED_DICT if ordered else rival.SORTS_DICT
    return sorted(node) if sort else list(node)


def check_core(rival: Any, tree: Tree) -> None:
    """Check flatten, unflatten and map of a rival on one tree.

    Raises:
        WrongAnswerError: one of them differs from the walk; the text says which and how.
    """
    expected = expected_leaves(tree, rival)
    leaves, spec = rival.parts(tree)
    same_objects("flatten", list(leaves), expected)
    rebuilt = rival.rebuild(spec, leaves)
    same_tree("unflatten", rebuilt, tree, rival)
    same_objects("unflatten", expected_leaves(rebuilt, rival), expected)
    mapped = rival.map_(_Box, tree)
    same_tree("map", mapped, tree, rival, leaf_type=_Box)
    same_objects("map", [box.content for box in expected_leaves(mapped, rival)], expected)


class _Box:
    """The result of the mapped function for a leaf."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


def same_objects(operation: str, got: list[Any], expected: list[Any]) -> None:
    """Raise unless both lists have the same objects in the same order."""
    if len(got) != len(expected):
        raise WrongAnswerError(f"{operation}: expected {len(expected)} leaves, got {len(got)}")
    for index, (one, other) in enumerate(zip(got, expected)):
        if one is not other:
            raise WrongAnswerError(f"{operation}: leaf {index} is {one!r}, expected {other!r}")


def same_tree(
    operation: str, got: Tree, expected: Tree, rival: Any, leaf_type: type | None = None
) -> None:
    """Raise unless types and keys are the same at all levels; leaves are compared separately.

    Args:
        operation: for the text of the error.
        got: the tree of the rival.
        expected: the tree that it should be like.
        rival: as for `expected_leaves`.
        leaf_type: the type of the leaves of `got`, if it is not that of `expected`.
    """
    waiting = [(got, expected)]
    while waiting:
        one, other = waiting.pop()
        if leaf_type is not None and isinstance(one, leaf_type):
            continue
        if type(one) is not type(other):
            raise WrongAnswerError(
                f"{operation}: expected a {type(other).__name__}, got a {type(one).__name__}"
            )
        children = children_of(one, rival)
        if children is None:
            continue
        if isinstance(one, dict) and one.keys() != other.keys():
            raise WrongAnswerError(f"{operation}: the keys differ, got {list(one)[:9]}")
        expected_children = children_of(other, rival)
        assert expected_children is not None
        if len(children) != len(expected_children):
            raise WrongAnswerError(f"{operation}: a {type(one).__name__} changed its length")
        waiting += zip(children, expected_children)


def digest(answer: Any) -> str:
    """Return a text that is the same for equal answers of two rivals.

    Containers are compared by type and content, everything else by its representation; any
    function equals any other, and so do pickles.
    """
    total = hashlib.sha256()
    _digest(answer, total)
    return total.hexdigest()[:16]


def _digest(answer: Any, total: Any) -> None:
    if isinstance(answer, dict):
        total.update(f"{type(answer).__name__}{len(answer)}".encode())
        for key, value in answer.items():
            total.update(repr(key).encode())
            _digest(value, total)
    elif isinstance(answer, (tuple, list)):
        total.update(f"{type(answer).__name__}{len(answer)}".encode())
        for item in answer:
            _digest(item, total)
    elif isinstance(answer, (Pair, Record)):
        total.update(type(answer).__name__.encode())
        _digest((answer.left, answer.right), total)
    elif isinstance(answer, Leaf):
        total.update(f"L{answer.number}".encode())
    elif isinstance(answer, bytes):
        total.update(b"bytes")  # a pickle names its own classes, its text may differ
    elif callable(answer):
        total.update(b"function")  # its representation is an address
    else:
        total.update(repr(answer).encode())
