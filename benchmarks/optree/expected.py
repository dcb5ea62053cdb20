# SPDX-License-Identifier: Apache-2.0
"""Check the answers of operations outside the matrix against a plain recursive walk.

The libraries return the same information in different forms: paths of keys or of objects that hold
keys, specs of their own classes. The checks read these forms. They do not depend on any library.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from benchmarks.optree.answers import (
    WrongAnswerError,
    children_of,
    expected_leaves,
    keys_of,
    same_objects,
    same_tree,
)
from benchmarks.optree.operations import Inputs
from benchmarks.optree.trees import Tree

__all__ = ["CHECKS", "check_other"]

# How optree's mode of torch treats trees; torch's own modules do so always.
TORCH = SimpleNamespace(NONE_IS_LEAF=True, SORTS_DICT=False, SORTS_ORDERED_DICT=False)


def check_other(rival: Any, operation: str, answer: Any, inputs: Inputs) -> None:
    """Check one answer.

    Raises:
        WrongAnswerError: it differs from the walk.
        KeyError: there is no check for the operation.
    """
    CHECKS[operation](rival, answer, inputs, operation)


def _require(condition: bool, operation: str, what: str) -> None:
    if not condition:
        raise WrongAnswerError(f"{operation}: expected {what}")


def _leaves(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    same_objects(operation, list(answer), expected_leaves(inputs.tree, rival))


def _flattened(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    """Check the leaves of (leaves, spec), and the tree that both make."""
    leaves, spec = (answer, inputs.tree) if not rival.HAS_SPECS else answer
    _leaves(rival, leaves, inputs, operation)
    if operation != "custom_flatten" or rival.DISTRIBUTIONS != ("optree",):  # a namespace's spec
        same_tree(operation, rival.rebuild(spec, leaves), inputs.tree, rival)


def _torch_mode(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    same_objects(operation, list(answer[0]), expected_leaves(inputs.tree, TORCH))


def _up_to(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    same_objects(operation, list(answer), expected_leaves(inputs.other, rival))


def _structure(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    leaves = expected_leaves(inputs.tree, rival)
    rebuilt = rival.rebuild(answer, leaves)
    same_tree(operation, rebuilt, inputs.tree, rival)
    same_objects(operation, expected_leaves(rebuilt, rival), leaves)


def _tree(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    same_tree(operation, answer, inputs.tree, rival)
    _leaves(rival, expected_leaves(answer, rival), inputs, operation)


def _mapped(value: Callable[[Any, Any], Any]) -> Callable[..., None]:
    """Return a check of a map: `value` of a leaf and of that of the other tree."""

    def check(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
        same_tree(operation, answer, inputs.tree, rival, leaf_type=bool)
        pairs = zip(*(expected_leaves(x, rival) for x in (inputs.tree, inputs.other)), strict=True)
        expected = [value(leaf, other) for leaf, other in pairs]
        same_objects(operation, expected_leaves(answer, rival), expected)

    return check


def _in_place(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    _require(answer is inputs.tree, operation, "the tree itself")


def _iterated(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    # The statement drains the iterator into a deque that keeps nothing.
    found = next(getattr(rival, name) for name in ("optree", "pytree") if hasattr(rival, name))
    _leaves(rival, found.tree_iter(inputs.tree), inputs, operation)
    _require(len(answer) == 0, operation, "an empty deque")


def key_of(entry: Any) -> Any:
    """Return the key, index or field of an entry of a path."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return entry


def expected_paths(tree: Tree, rival: Any, path: Any = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of the leaves; a field of a namedtuple is (index, name)."""
    children = children_of(tree, rival)
    if children is None:
        if tree is not None or rival.NONE_IS_LEAF:
            yield path
        return
    entries: list[Any] = list(range(len(children)))
    if isinstance(tree, dict):
        entries = keys_of(tree, rival)
    elif hasattr(tree, "_fields"):
        entries = list(enumerate(tree._fields))
    for entry, child in zip(entries, children, strict=True):
        yield from expected_paths(child, rival, (*path, entry))


def _with_path(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    if not rival.HAS_SPECS:
        pairs = answer  # dm-tree: a list of (path, leaf)
    elif len(answer) == 2:
        pairs = answer[0]  # jax, torch: (list of (path, leaf), spec)
    else:
        pairs = zip(answer[0], answer[1], strict=True)  # optree: (paths, leaves, spec)
    paths, leaves = zip(*pairs, strict=True)
    _leaves(rival, leaves, inputs, operation)
    expected = list(expected_paths(inputs.tree, rival))
    _require(len(paths) == len(expected), operation, f"{len(expected)} paths")
    for path, wanted in zip(paths, expected, strict=True):
        keys = [key_of(entry) for entry in path]
        fits = len(keys) == len(wanted) and all(
            key in entry if isinstance(entry, tuple) else key == entry
            for key, entry in zip(keys, wanted, strict=True)
        )
        _require(fits, operation, f"the path {wanted}, got {keys}")


def _prefix(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    tree, expected = inputs.tree, []
    for key in keys_of(tree, rival):
        expected += [list(tree).index(key)] * len(expected_leaves(tree[key], rival))
    _require(list(answer) == expected, operation, "the number of the child for each leaf")


def _transposed(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    _require(type(answer) is tuple and len(answer) == 2, operation, "a pair of trees")
    for tree in answer:
        _tree(rival, tree, inputs, operation)


def _reduced(value: Callable[[list[Any]], Any]) -> Callable[..., None]:
    """Return a check of a number: `value` of all numbers."""

    def check(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
        expected = value(expected_leaves(inputs.numbers, rival))
        _require(answer == expected, operation, f"{expected}, got {answer}")

    return check


def _constant(value: bool) -> Callable[..., None]:
    def check(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
        _require(answer is value, operation, f"{value}, got {answer!r}")

    return check


def _hash(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    _require(answer == hash(inputs.other_spec), operation, "the hash of an equal spec")


def _composed(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    numbers = list(range(2 * len(expected_leaves(inputs.tree, rival))))
    rebuilt = rival.rebuild(answer, numbers)
    _require(expected_leaves(rebuilt, rival) == numbers, operation, f"{len(numbers)} leaves")


def _text(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    count = len(expected_leaves(inputs.tree, rival))
    fits = isinstance(answer, str) and answer.count("*") == count
    _require(fits, operation, f"a text with a star for each of {count} leaves")


def _dumped(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    _require(pickle.loads(answer) == inputs.spec, operation, "the pickle of an equal spec")


def _loaded(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    _require(answer == inputs.spec, operation, "an equal spec")


def _one_level(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    same_objects(operation, list(answer[0]), children_of(inputs.tree, rival) or [])


def _without_nones(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    expected = [0 if x is None else x for x in expected_leaves(inputs.tree, _none_is_leaf(rival))]
    same_objects(operation, expected_leaves(answer, _none_is_leaf(rival)), expected)


def _parted(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    true, false = (expected_leaves(x, _none_is_leaf(rival)) for x in answer)
    every = expected_leaves(inputs.tree, _none_is_leaf(rival))
    same_objects(operation, true, [x if callable(x) else None for x in every])
    same_objects(operation, false, [None if callable(x) else x for x in every])


def _none_is_leaf(rival: Any) -> Any:
    return SimpleNamespace(**{k: getattr(rival, k) for k in vars(TORCH)} | {"NONE_IS_LEAF": True})


def _paths(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    spec, leaves = inputs.spec, expected_leaves(inputs.tree, rival)
    _with_path(rival, (answer, leaves, spec), inputs, operation)


def _accessors(rival: Any, answer: Any, inputs: Inputs, operation: str) -> None:
    accessors = answer[0] if isinstance(answer, tuple) else answer
    found = [accessor(inputs.tree) for accessor in accessors]
    _leaves(rival, found, inputs, operation)


CHECKS: dict[str, Callable[..., None]] = {
    "leaves": _leaves,
    "structure": _structure,
    "iterate": _iterated,
    "map_two": _mapped(lambda leaf, other: leaf is other),
    "map_in_place": _in_place,
    "with_path": _with_path,
    "with_accessor": _accessors,
    "map_with_path": _tree,
    "paths": _paths,
    "accessors": _accessors,
    "flatten_up_to": _up_to,
    "broadcast_prefix": _prefix,
    "transpose": _transposed,
    "reduce": _reduced(sum),
    "sum": _reduced(sum),
    "max": _reduced(max),
    "all": _constant(True),
    "any": _constant(False),
    "spec_equal": _constant(True),
    "spec_hash": _hash,
    "spec_prefix": _constant(True),
    "spec_compose": _composed,
    "spec_repr": _text,
    "pickle_dump": _dumped,
    "pickle_load": _loaded,
    "one_level": _one_level,
    "replace_nones": _without_nones,
    "partition": _parted,
    "is_leaf_c": _flattened,
    "is_leaf_python": _flattened,
    "torch_mode": _torch_mode,
    "custom_flatten": _flattened,
    "custom_unflatten": _tree,
    "custom_map": _mapped(lambda leaf, _: callable(leaf)),
}
