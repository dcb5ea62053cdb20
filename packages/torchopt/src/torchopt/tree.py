# SPDX-License-Identifier: Apache-2.0
"""Trees of tensors. The one module that imports optree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
from optree import (
    PyTreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_,
    tree_paths,
    tree_structure,
    tree_unflatten,
)
from torchopt.errors import MismatchError

__all__ = [
    "PyTreeSpec",
    "describe_mismatch",
    "first_of_another_shape",
    "flatten_up_to",
    "located",
    "optree",
    "prefix_leaves",
    "require_same_shapes",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_",
    "tree_paths",
    "tree_structure",
    "tree_unflatten",
]


def flatten_up_to(spec: PyTreeSpec, tree: Any, what: str) -> list[Any]:
    """Return what ``tree`` holds at the leaves of ``spec``.

    Raises:
        ValueError: ``tree`` does not begin like ``spec``; the message starts with ``what``.
    """
    try:
        return spec.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        # optree says the place in a note, where Python has notes (3.11).
        parts = [str(error).removesuffix(".") + ".", *getattr(error, "__notes__", [])]
        raise ValueError(
            f"{what}: expected a tree like {_shortened(str(spec))}, got one that differs from it: "
            f"{' '.join(parts)} Pass trees that were mapped from one another.",
        ) from error


def _shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def located(error: MismatchError, spec: PyTreeSpec) -> MismatchError:
    """Return `error` with the place of its leaf in the tree, such as ``$['fc1'].bias``."""
    where = spec.accessors()[error.leaf].codify("$")
    return MismatchError(error.leaf, error.reason, where)


def describe_mismatch(expected: Any, got: Any) -> str | None:
    """Return how two tensors differ in shape or device, or None where they do not."""
    if expected.shape != got.shape:
        return f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if expected.device != got.device:
        return f"expected a tensor on {expected.device}, got one on {got.device}"
    return None


def first_of_another_shape(expected: Sequence[Any], got: Sequence[Any]) -> int | None:
    """Return the first index where the shapes of two lists of tensors differ, or None.

    torch would broadcast, and what was meant for one tensor would silently be spread over another.
    """
    for index, (x, y) in enumerate(zip(expected, got)):
        if x.shape != y.shape:
            return index
    return None


def require_same_shapes(expected: Any, got: Any, what: str) -> None:
    """Raise unless the tensors of two trees have the same shapes; None goes with anything.

    Raises:
        ValueError: The trees differ; the message starts with ``what``.
        MismatchError: Tensors differ in shape.
    """
    leaves, spec = tree_flatten(expected, none_is_leaf=True)
    for index, (x, y) in enumerate(zip(leaves, flatten_up_to(spec, got, what))):
        if x is not None and y is not None and x.shape != y.shape:
            raise located(MismatchError(index, f"{what}: {describe_mismatch(x, y)}"), spec)


def prefix_leaves(prefix: Any, tree: Any, what: str) -> list[Any]:
    """Return one value for each leaf of ``tree``: that of ``prefix`` above it.

    Raises:
        ValueError: ``prefix`` is not a prefix of ``tree``; the message starts with ``what``.
    """
    try:
        # A value for each leaf: torch.compile follows this, and not optree.tree_broadcast_prefix.
        return tree_structure(tree, none_is_leaf=True).flatten_up_to(prefix)
    except (ValueError, TypeError):
        pass
    broadcast: Callable[..., Any] = optree.tree_broadcast_prefix
    try:
        return tree_leaves(broadcast(prefix, tree, none_is_leaf=True), none_is_leaf=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: expected a prefix of the tree of parameters: {error}") from error
