# SPDX-License-Identifier: Apache-2.0
"""Find a state inside those of chains, masks and partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchopt.transform.masked import mask_leaves
from torchopt.tree import tree_flatten

__all__ = ["map_states", "places"]


def map_states(state: Any, kind: type, change: Callable[[Any], Any], refused: str) -> Any:
    """Return `state` with `change(node)` for each node of type `kind`.

    Raises:
        ValueError: There is none; the message begins with `refused`.
    """
    found = False
    others: list[str] = []

    def visit(node: Any) -> Any:
        nonlocal found
        if isinstance(node, kind):
            found = True
            return change(node)
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            others.append(type(node).__name__)
            return type(node)(*map(visit, node))
        if isinstance(node, (tuple, list)):
            return type(node)(map(visit, node))
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return node

    changed = visit(state)
    if not found:
        got = " and ".join([*dict.fromkeys(others)][:3]) or type(state).__name__
        raise ValueError(f"{refused}, got {got}; pass what its init or update returned")
    return changed


def places(values: Sequence[Any], tree: Any, where: Any, what: str) -> list[int]:
    """Return for each of `values`, a field of a state, the index of its leaf in `tree`.

    Masks and partitions pass only some of the leaves to the transformation inside, in their order.
    The state of that transformation does not say which.

    Args:
        values: One value for each leaf of the state.
        tree: Tree of tensors, None among the leaves.
        where: The leaves of the state: a tree of bools that is a prefix of `tree`, or a function
            that returns one. None: all leaves, or those that the shapes determine.
        what: The call, with which messages start.

    Raises:
        ValueError: The shapes fit no choice of leaves, or more than one.
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
    # The choice is unique if placing as early and as late as possible gives the same leaves.
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
    """Return for each value the next leaf of its shape after that of the previous value."""
    remaining = iter(zip(indices, leaves))
    out = []
    for value in values:
        shape = getattr(value, "shape", None)
        index = next((i for i, x in remaining if getattr(x, "shape", None) == shape), None)
        if index is None:
            return None
        out.append(index)
    return out
