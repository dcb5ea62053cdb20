# SPDX-License-Identifier: Apache-2.0
"""Find the members of a chain that can be one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchopt.base import GradientTransformation
from torchopt.transform.fused import Backend, Part
from torchopt.transform.leaf_rule import LeafRule, unlike_state
from torchopt.transform.plan import longest_plan
from torchopt.tree import flatten_up_to, tree_flatten, tree_unflatten
from torchopt.tree_function import is_traced

__all__ = ["TreePart", "in_lists", "in_trees", "parts_of", "rule_of"]


def rule_of(member: GradientTransformation) -> LeafRule | None:
    """Return the rule that a transformation runs, or None if it runs no rule."""
    rule = getattr(getattr(member.update, "__self__", None), "rule", None)
    return rule if isinstance(rule, LeafRule) else None


def in_lists(rule: LeafRule, state: Any, spec: Any) -> Any:
    """Return the state of a rule with each tree of the structure `spec` as a list."""
    try:
        trees = {f: getattr(state, f) for f in rule.leaf_fields}
    except AttributeError:
        raise TypeError(unlike_state(rule, state)) from None
    present = {f: x for f, x in trees.items() if x is not None or f not in rule.later_fields}
    lists = {f: flatten_up_to(spec, x, f"state.{f}") for f, x in present.items()}
    return state._replace(**lists) if lists else state


def in_trees(rule: LeafRule, state: Any, spec: Any) -> Any:
    """Return the state of a rule with each list as a tree of the structure `spec`."""
    trees = {f: tree_unflatten(spec, getattr(state, f)) for f in rule.leaf_fields}
    return state._replace(**trees) if trees else state


@dataclass(frozen=True)
class TreePart:
    """A `Part` with trees of gradients and states, and the rule of each member."""

    part: Part
    rules: tuple[LeafRule, ...]

    def update(
        self, updates: Any, members: tuple[Any, ...], params: Any | None, *, inplace: bool
    ) -> tuple[Any, tuple[Any, ...]] | None:
        """Return the result of `Part.update` for trees."""
        if self.part.backend == "reference" or is_traced():
            return None
        leaves, spec = tree_flatten(updates, none_is_leaf=True)
        pairs = list(zip(self.rules, members))
        if any(getattr(state, f, None) is None for rule, state in pairs for f in rule.leaf_fields):
            return None
        lists = tuple(in_lists(rule, state, spec) for rule, state in pairs)

        def flat_params() -> list[Any]:
            return flatten_up_to(spec, params, "params", spec_of="updates")

        read = None if params is None else flat_params
        found = self.part.update(leaves, lists, read, inplace=inplace)
        if found is None:
            return None
        states = tuple(in_trees(rule, state, spec) for rule, state in zip(self.rules, found[1]))
        return tree_unflatten(spec, found[0]), states


def parts_of(
    members: Sequence[GradientTransformation], backend: Backend = "auto"
) -> tuple[tuple[int, int, TreePart | None], ...]:
    """Return a chain in parts: (first member, member after the last, native call or None).

    A native call is worthwhile only for parts that contain a rule.
    """
    rules = [rule_of(member) for member in members]
    parts: list[tuple[int, int, TreePart | None]] = []
    start = 0
    while start < len(members):
        plan = longest_plan(rules[start:]) if rules[start] is not None else None
        if plan is None or not plan.rules or plan.size < 2:
            parts.append((start, start + 1, None))
            start += 1
            continue
        stop = start + plan.size
        inside = tuple(rule for rule in rules[start:stop] if rule is not None)
        parts.append((start, stop, TreePart(Part(plan, backend), inside)))
        start = stop
    return tuple(parts)
