# SPDX-License-Identifier: Apache-2.0
"""Python versions of functions of the extension module, for ``torch.compile()`` to trace.

TorchDynamo traces Python code. It cannot trace the functions of the extension module that the
public functions call, but it accepts a Python function to trace in their place. PyTorch has such
replacements for the functions that optree 0.20 called; this module adds those for the others.

They are registered when TorchDynamo first looks up an entry of the registry, see
:mod:`optree.registry`. Until then nothing here imports torch.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any, Callable

import optree
import optree._C as _C

if TYPE_CHECKING:
    from collections.abc import Iterable


def leaves(
    tree: Any,
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> list[Any]:
    """Return the leaves of a tree."""
    return optree.tree_leaves(tree, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace)


def structure(
    tree: Any,
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> optree.PyTreeSpec:
    """Return the spec of a tree."""
    return optree.tree_structure(tree, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace)


def is_leaf(
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> bool:
    """Return whether an object is a leaf."""
    return optree.tree_is_leaf(tree, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace)


def all_leaves(
    iterable: Iterable[Any],
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> bool:
    """Return whether all items are leaves."""
    for item in iterable:
        if not optree.tree_is_leaf(item, is_leaf, none_is_leaf=none_is_leaf, namespace=namespace):
            return False
    return True


def map(  # noqa: A001
    func: Callable[..., Any],
    tree: Any,
    rests: tuple[Any, ...],
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> Any:
    """Return the tree of the results of a function."""
    flat, treespec = optree.tree_flatten(
        tree,
        is_leaf,
        none_is_leaf=none_is_leaf,
        namespace=namespace,
    )
    flat_args = [flat] + [treespec.flatten_up_to(rest) for rest in rests]
    return treespec.unflatten(builtins.map(func, *flat_args))


def map_(
    func: Callable[..., Any],
    tree: Any,
    rests: tuple[Any, ...],
    is_leaf: Callable[[Any], bool] | None,
    none_is_leaf: bool,
    namespace: str,
    /,
) -> Any:
    """Call a function for its side effects and return the tree."""
    flat, treespec = optree.tree_flatten(
        tree,
        is_leaf,
        none_is_leaf=none_is_leaf,
        namespace=namespace,
    )
    flat_args = [flat] + [treespec.flatten_up_to(rest) for rest in rests]
    for args in zip(*flat_args):
        func(*args)
    return tree


def call_rows(func: Callable[..., Any], columns: list[list[Any]], /) -> list[Any]:
    """Return the results of a function for the rows of a table."""
    return [func(*args) for args in zip(*columns)]


def prototype_of(function: Any, /) -> Any:
    """Return the Python definition of a builtin of :mod:`optree.ops`."""
    return function.__self__.prototype


def register() -> None:
    """Make TorchDynamo trace the functions of this module in place of their namesakes."""
    import torch

    for original, polyfill in (
        (_C.leaves, leaves),
        (_C.structure, structure),
        (_C.is_leaf, is_leaf),
        (_C.all_leaves, all_leaves),
        (_C.map, map),
        (_C.map_, map_),
        (_C.call_rows, call_rows),
        (optree.tree_flatten_one_level, prototype_of(optree.tree_flatten_one_level)),
    ):
        torch.compiler.substitute_in_graph(original, skip_signature_check=True)(polyfill)
