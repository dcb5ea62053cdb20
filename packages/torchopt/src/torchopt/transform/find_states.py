# SPDX-License-Identifier: Apache-2.0
"""Find a state inside the states of chains, masks and partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchopt.transform.masked import mask_leaves
from torchopt.tree import tree_flatten

__all__ = ["map_states", "places"]


def map_states(state: Any, kind: type, change: Callable[[Any], Any]) -> tuple[Any, int]:
    """Return `state` with `change(node)` for each node of type `kind`, and their number."""
    found = 0

    def visit(node: Any) -> Any:
        nonlocal found
        if isinstance(node, kind):
            found += 1
            return change(node)
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*map(visit, node))
        if isinstance(node, (tuple, list)):
            return type(node)(map(visit, node))
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return node

    return visit(state), found


def places(values: Sequence[Any], tree: Any, where: Any, what: str) -> list[int]:
    """Return the leaf of `tree` that each of `values`, a role of a state, belongs to.

    A mask and a partition hand a part of the leaves to the transformation inside, in their order;
    its state does not say which.

    Args:
        values: One value for each leaf that the state is for.
        tree: Tree of tensors, None among the leaves.
        where: Tree of bools, a prefix of `tree`, or a function that returns one: the leaves that
            the state is for. None: all, or what the shapes leave open in one way only.
        what: The call, which messages start with.

    Raises:
        ValueError: There is none, or more than one, way to place them.
    """
    leaves = tree_flatten(tree, none_is_leaf=True)[0]
    if where is not None:
        kept = [i for i, keep in enumerate(mask_leaves(where, tree, what)) if keep]
        if len(kept) != len(values):
            raise ValueError(
                f"{what}: expected `where` to keep the {len(values)} leaves that the state is "
                f"for, got {len(kept)}"
            )
        return kept
    if len(values) == len(leaves):
        return list(range(len(leaves)))
    first = _placed(values, leaves, range(len(leaves)))
    # Placed as early and as late as possible: the same only where there is one way.
    last = _placed(values[::-1], leaves[::-1], range(len(leaves) - 1, -1, -1))
    if first is None or last is None or first != last[::-1]:
        ways = "no way" if first is None else "more than one way"
        raise ValueError(
            f"{what}: expected a state for {len(leaves)} leaves, got one for {len(values)}, as of "
            f"an optimizer inside masked or partition; by their shapes there is {ways} to place "
            "them: pass where=, the tree of bools that says which leaves it has"
        )
    return first


def _placed(
    values: Sequence[Any], leaves: Sequence[Any], indices: Sequence[int]
) -> list[int] | None:
    """Return the first leaf after the one before that has the shape of each value."""
    remaining = iter(zip(indices, leaves))
    out = []
    for value in values:
        shape = getattr(value, "shape", None)
        index = next((i for i, x in remaining if getattr(x, "shape", None) == shape), None)
        if index is None:
            return None
        out.append(index)
    return out
