# SPDX-License-Identifier: Apache-2.0
"""Trees of tensors. Only this module imports optree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

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
from torchopt.errors import LeafTypeError, MismatchError

__all__ = [
    "PyTreeSpec",
    "advice_for",
    "describe_mismatch",
    "first_of_another_shape",
    "flatten_up_to",
    "is_smooth",
    "located",
    "optree",
    "prefix_leaves",
    "require_same_shapes",
    "require_tensor_tree",
    "require_tensors",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_",
    "tree_paths",
    "tree_structure",
    "tree_unflatten",
]


def flatten_up_to(
    spec: PyTreeSpec, tree: Any, what: str, *, spec_of: str | None = None
) -> list[Any]:
    """Return the subtrees of ``tree`` at the leaves of ``spec``.

    Args:
        spec: The structure.
        tree: A tree of which ``spec`` is a prefix.
        what: The start of a message, such as the argument that holds ``tree``.
        spec_of: The name of the tree of ``spec``, if that one is to blame when the two differ.

    Raises:
        ValueError: ``spec`` is not a prefix of ``tree``; the message names the first difference.
    """
    try:
        return spec.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        where, expected, got = _first_difference(spec, tree)
        if spec_of is not None:
            expected, got = got, expected
        advice = "pass trees of one structure, with None for a leaf that has no value"
        (wanted, _, size), (found, _, other) = expected.partition(" "), got.partition(" ")
        if {wanted, found} == {"list", "tuple"} and size == other:
            advice = f"convert it with {wanted}(...)"
        elif what.startswith("apply_updates") and (where, got) == ("$", "tuple of 2"):
            advice = "unpack what update returned: updates, state = update(...)"
        raise ValueError(
            f"{what}: expected {spec_of or 'a tree'} like {_shortened(tree if spec_of else spec)}; "
            f"at {where}: expected {expected}, got {got}; {advice}"
        ) from error


def _shortened(tree: Any, limit: int = 80) -> str:
    spec = tree if isinstance(tree, PyTreeSpec) else tree_structure(tree, none_is_leaf=True)
    text = str(spec).removeprefix("PyTreeSpec(").removesuffix(")").removesuffix(", NoneIsLeaf")
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _first_difference(spec: PyTreeSpec, tree: Any) -> tuple[str, str, str]:
    """Return where ``tree`` first differs from ``spec``, and what each of them has there.

    None is a leaf in both.
    """
    pending = [(optree.PyTreeAccessor(), spec, tree)]
    while pending:
        accessor, node, subtree = pending.pop()
        if node.is_leaf():
            continue
        where = accessor.codify("$")
        own = tree_structure(subtree, none_is_leaf=True)
        if own.is_leaf():
            return where, _described(node), _described_leaf(subtree)
        keys = own.entries() if _has_keys(node) and _has_keys(own) else None
        if keys is not None:
            missing = [k for k in node.entries() if k not in keys]
            extra = [k for k in keys if k not in node.entries()]
            if missing or extra:
                return where, *_described_keys(missing, extra)
        elif node.type is not own.type or node.num_children != own.num_children:
            return where, _described(node), _described(own)
        one_level = optree.tree_flatten_one_level(subtree, none_is_leaf=True)
        children = dict(zip(one_level.entries, one_level.children))
        steps = [
            (
                accessor + one_level.path_entry_type(entry, type(subtree), one_level.kind),
                child,
                value,
            )
            for child, entry in zip(node.children(), node.entries())
            if (value := children.get(entry, children)) is not children
        ]
        pending.extend(reversed(steps))
    return "$", "the same metadata of its nodes", "another"


def _has_keys(spec: PyTreeSpec) -> bool:
    return isinstance(spec.type, type) and issubclass(spec.type, dict)


def _described(spec: PyTreeSpec) -> str:
    if spec.is_leaf():
        return "a leaf"
    name = getattr(spec.type, "__name__", str(spec.type))
    return f"{name} of {spec.num_children}"


def _described_leaf(leaf: Any) -> str:
    shape = f" of shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else ""
    return f"{type(leaf).__name__}{shape}" if leaf is not None else "None"


def _listed(values: Sequence[Any], limit: int = 3) -> str:
    shown = ", ".join(repr(value)[:40] for value in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"


def _described_keys(missing: Sequence[Any], extra: Sequence[Any]) -> tuple[str, str]:
    if missing:
        return f"a dict with {_listed(missing)}", f"a dict without {_listed(missing)}"
    return f"a dict without {_listed(extra)}", f"a dict with {_listed(extra)}"


def located(error: MismatchError, spec: PyTreeSpec) -> MismatchError:
    """Return `error` with the path of its leaf in the tree, such as ``$['fc1'].bias``."""
    where = spec.accessors()[error.leaf].codify("$")
    return type(error)(error.leaf, error.reason, where)


def require_tensors(leaves: Sequence[Any], present: Sequence[int], what: str) -> None:
    """Raise LeafTypeError if one of the leaves with these indices is not a tensor."""
    for i in present:
        if not isinstance(leaves[i], Tensor):
            kind = f"{type(leaves[i]).__name__}; {advice_for(leaves[i])}"
            raise LeafTypeError(i, f"{what}: expected a tensor, got {kind}")


def advice_for(leaf: Any) -> str:
    """Return what to pass instead of a leaf that is not a tensor."""
    if isinstance(leaf, nn.Module):
        return "pass dict(module.named_parameters())"
    if callable(leaf):
        return "call it"
    return {
        "ndarray": "convert it with torch.from_numpy",
        "generator": "pass a tuple of what it yields",
        "NoneType": "pass None for its gradient as well",
    }.get(type(leaf).__name__, "convert it with torch.tensor, or pass None for a leaf without one")


def require_tensor_tree(tree: Any, what: str) -> None:
    """Raise LeafTypeError if a leaf of a tree is neither a tensor nor None.

    The message says where the leaf is and starts with ``what``.
    """
    leaves, spec = tree_flatten(tree, none_is_leaf=True)
    try:
        require_tensors(leaves, [i for i, x in enumerate(leaves) if x is not None], what)
    except LeafTypeError as error:
        raise located(error, spec) from None


def is_smooth(x: Any) -> TypeGuard[Tensor]:
    """Return whether x is a tensor that can be differentiated: floating-point or complex."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def describe_mismatch(expected: Any, got: Any) -> str | None:
    """Return how two tensors differ in shape or device, or None if they do not."""
    if expected.shape != got.shape:
        return f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if expected.device != got.device:
        return f"expected a tensor on {expected.device}, got one on {got.device}"
    return None


def first_of_another_shape(expected: Sequence[Any], got: Sequence[Any]) -> int | None:
    """Return the first index where the shapes of two lists of tensors differ, or None.

    Without this check, torch would silently broadcast the update of one tensor to another.
    """
    for index, (x, y) in enumerate(zip(expected, got)):
        if x.shape != y.shape:
            return index
    return None


def require_same_shapes(expected: Any, got: Any, what: str) -> None:
    """Raise unless the tensors of two trees have the same shapes; None matches anything.

    Raises:
        ValueError: The trees differ; the message starts with ``what``.
        MismatchError: Tensors differ in shape.
    """
    leaves, spec = tree_flatten(expected, none_is_leaf=True)
    for index, (x, y) in enumerate(zip(leaves, flatten_up_to(spec, got, what))):
        if x is not None and y is not None and x.shape != y.shape:
            raise located(MismatchError(index, f"{what}: {describe_mismatch(x, y)}"), spec)


def prefix_leaves(prefix: Any, tree: Any, what: str) -> list[Any]:
    """Return the values of ``prefix``, each repeated for all leaves of ``tree`` below it.

    Raises:
        ValueError: ``prefix`` is not a prefix of ``tree``; the message starts with ``what``.
    """
    try:
        # First the case of one value per leaf: torch.compile can trace this, but not
        # optree.tree_broadcast_prefix.
        return tree_structure(tree, none_is_leaf=True).flatten_up_to(prefix)
    except (ValueError, TypeError):
        pass
    broadcast: Callable[..., Any] = optree.tree_broadcast_prefix
    try:
        return tree_leaves(broadcast(prefix, tree, none_is_leaf=True), none_is_leaf=True)
    except (ValueError, TypeError) as error:
        where, expected, got = _first_difference(tree_structure(prefix, none_is_leaf=True), tree)
        advice = "one value applies to everything below it"
        if isinstance(prefix, dict) and isinstance(tree, (tuple, list)):
            advice = (
                "an optimizer of a module has a tuple of its tensors, those of a sub-module sorted "
                "by name: give one value for each, or a function of that tuple"
            )
        raise ValueError(
            f"{what}: expected a prefix of the tree of parameters {_shortened(tree, 40)}; at "
            f"{where}: expected {got}, got {expected}; {advice}"
        ) from error
