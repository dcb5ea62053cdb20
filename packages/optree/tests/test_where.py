# SPDX-License-Identifier: Apache-2.0
"""Errors about mismatches name the place in the tree, in a note after the published message."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import pytest

import optree

Layer = namedtuple("Layer", ["weight", "bias"])

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")


def model() -> Any:
    layers = [Layer(1, (2, 3)), Layer(4, (5, 6)), Layer([7, {"x": 8}], None)]
    return {"layers": layers, 5: OrderedDict(head=(9,)), "end": 10}


def replaced(path: tuple[Any, ...], value: Any) -> Any:
    """Return the model with the node at ``path`` replaced."""

    def rebuild(node: Any, rest: tuple[Any, ...]) -> Any:
        if not rest:
            return value
        key = rest[0]
        if isinstance(node, Layer):
            items = list(node)
            items[key] = rebuild(items[key], rest[1:])
            return Layer(*items)
        copy = list(node) if isinstance(node, tuple) else node.copy()
        copy[key] = rebuild(copy[key], rest[1:])
        return tuple(copy) if isinstance(node, tuple) else copy

    return rebuild(model(), path)


@pytest.mark.parametrize(
    ("path", "value", "place", "message"),
    [
        ((), [1], "$", "Expected an instance of dict, "),
        (("layers",), (1,), "$['layers']", "Expected an instance of list, got (1,)."),
        (
            ("layers", 1),
            3,
            "$['layers'][1]",
            "Expected an instance of collections.namedtuple",
        ),
        (
            ("layers", 1, 1),
            [5, 6],
            "$['layers'][1].bias",
            "Expected an instance of tuple",
        ),
        (("layers", 2, 1), 0, "$['layers'][2].bias", "Expected None, got 0."),
        (
            ("layers", 2, 0, 1),
            {"y": 8},
            "$['layers'][2].weight[1]",
            "dictionary key mismatch",
        ),
        ((5,), {"tail": (9,)}, "$[5]", "dictionary key mismatch; expected key(s): ['head']"),
        ((5, "head"), (9, 9), "$[5]['head']", "tuple arity mismatch; expected: 1, got: 2"),
    ],
)
def test_a_mismatch_names_its_place(
    path: tuple[Any, ...], value: Any, place: str, message: str
) -> None:
    other = replaced(path, value)
    spec = optree.tree_structure(model())
    calls = (
        lambda: spec.flatten_up_to(other),
        lambda: optree.tree_map(lambda x, y: (x, y), model(), other),
    )
    for call in calls:
        with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
            call()
        assert caught.value.__notes__ == [f"The trees differ at {place}."]


def test_errors_of_user_code_get_no_note() -> None:
    class Key:
        def __init__(self, broken: bool) -> None:
            self.broken = broken

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            if self.broken:
                raise KeyError("broken")
            return True

    spec = optree.tree_structure({Key(broken=False): 1})
    with pytest.raises(KeyError, match="broken") as caught:
        spec.flatten_up_to({Key(broken=True): 1})
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("leaves", [[1, 2], (1, 2), {"a": 1}], ids=str)
def test_the_arguments_of_unflatten_swapped(leaves: Any) -> None:
    spec = optree.tree_structure([0, 0])
    for second, remedy in ((spec, "swap the arguments"), ([1, 2], "pass the spec")):
        with pytest.raises(AttributeError, match="has no attribute 'unflatten'") as caught:
            optree.tree_unflatten(leaves, second)
        assert remedy in caught.value.__notes__[0]


def test_the_number_of_leaves_that_were_too_many() -> None:
    spec = optree.tree_structure([0, 0])
    for leaves, got in (([1, 2, 3], "Got 3;"), (iter([1, 2, 3]), "Got at least 3;")):
        with pytest.raises(ValueError, match=r"^Too many leaves.*expected: 2\.") as caught:
            optree.tree_unflatten(spec, leaves)
        assert caught.value.__notes__[0].startswith(got)


@pytest.mark.parametrize("returned", [None, 3])
def test_a_flatten_function_that_returns_no_pair(returned: Any) -> None:
    class Box:
        pass

    optree.register_pytree_node(
        Box, lambda box: returned, lambda metadata, children: Box(), namespace="no pair"
    )
    try:
        with pytest.raises(TypeError, match="object is not iterable") as caught:
            optree.tree_flatten([Box()], namespace="no pair")
        (note,) = caught.value.__notes__
        assert "Box" in note
        assert "(children, metadata)" in note
    finally:
        optree.unregister_pytree_node(Box, namespace="no pair")
