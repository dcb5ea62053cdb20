# SPDX-License-Identifier: Apache-2.0
"""Members of a chain as one native call, where they match a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.fused_rule import as_number
from torchopt.kernels.missing import why_missing
from torchopt.kernels.native import call_plain, overwrite, refusal, unavailable, update
from torchopt.precision import as_given, is_narrow, widened
from torchopt.torch_internals import is_transforming
from torchopt.transform.counts import increment
from torchopt.transform.plan import Plan
from torchopt.tree_function import PLAIN, any_watched, is_traced

__all__ = ["BACKENDS", "Backend", "Part"]

Backend = Literal["auto", "native", "reference"]
BACKENDS = ("auto", "native", "reference")

# Why there are no kernels at all, None where there are.
MISSING = why_missing(_C)

# Up to so many tensors, torch's own multiplications take less time than one native node when plain
# SGD is differentiated: 21 us instead of 35 for one tensor, as much as it for six.
FEW = 4


@dataclass(frozen=True)
class Part:
    """Some members of a chain on lists, which are one native call where that is possible.

    Attributes:
        plan: How they are one kernel.
        backend: "native": always, or an error. "auto": native for plain tensors that have kernels,
            where that is faster. "reference": never.
    """

    plan: Plan
    backend: Backend = "auto"

    def update(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: Callable[[], list[Any]] | None,
        *,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return the updates and the next states; None, with nothing done, for the members' turn.

        Args:
            leaves: The gradients, None where there is none.
            members: The state of each member.
            params: Returns the parameters.
            inplace: Overwrite the states.

        Raises:
            KernelUnavailableError: "native", and there is no kernel for these tensors.
        """
        plan = self.plan
        if self.backend == "reference" or is_traced():
            return None
        if MISSING is not None:
            if self.backend == "auto":
                return None
            raise unavailable(MISSING)
        if self.backend == "auto" and (
            (not plan.rules and not inplace and self._is_brief(leaves)) or plan.has_arrays()
        ):
            return None
        lists = self.lists(members, len(leaves))
        if lists is None or not leaves:
            return None
        roles, counts = lists
        if not is_transforming() and all(map(_are_equal, counts)):
            found = self._together(leaves, members, roles, params, inplace)
            if found is not None:
                return found
        if _is_mixed(leaves, roles, params() if params and plan.reads_params else ()):
            return self._in_float32(leaves, members, params, inplace)
        return self._by_groups(leaves, members, params, inplace)

    def _in_float32(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: Callable[[], list[Any]] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return what `update` does for states and parameters of half types, widened for the call.

        `torchopt.transform.compensated` hands over such gradients.
        """
        old = self.roles(members)
        wide = self.replaced(members, [list(map(widened, role)) for role in old])
        read = None if params is None else lambda: list(map(widened, params()))
        found = self.update(leaves, wide, read, inplace=False)
        if found is None:
            return None
        moved = [as_given(*pair) for pair in zip(self.roles(found[1]), old)]
        if inplace:
            moved = [list(map(overwrite, *pair)) for pair in zip(old, moved)]
        return found[0], self.replaced(found[1], moved)

    def _is_brief(self, leaves: list[Any]) -> bool:
        """Return whether a graph is recorded, of too few tensors to be worth a native node."""
        return (
            len(leaves) <= FEW
            and torch.is_grad_enabled()
            and any(isinstance(g, Tensor) and g.requires_grad for g in leaves)
        )

    def lists(
        self, members: tuple[Any, ...], size: int
    ) -> tuple[list[list[Any]], list[list[Any]]] | None:
        """Return roles and counts; None where the states do not have the form of the plan."""
        if len(members) != self.plan.size:
            return None
        try:
            roles, counts = self.roles(members), self._count_lists(members)
        except AttributeError:
            return None  # the state of something else; the members raise
        for role in (*roles, *counts):
            if not isinstance(role, list) or len(role) != size:
                return None
        return roles, counts

    def in_step(self, members: tuple[Any, ...]) -> bool:
        """Return whether all leaves took the same number of steps."""
        return all(map(_are_equal, self._count_lists(members)))

    def roles(self, members: tuple[Any, ...]) -> list[list[Any]]:
        """Return the states of the kernel."""
        return [getattr(members[i], field) for i, field in self.plan.states]

    def _count_lists(self, members: tuple[Any, ...]) -> list[list[Any]]:
        """Return what has to be the same for leaves that are served by one call."""
        lists = [members[i].count for i in self.plan.counted]
        return lists + [getattr(members[i], name) for i, _, name in self.plan.shared]

    def numbers(self, members: tuple[Any, ...]) -> Sequence[float] | None:
        """Return the hyper-parameters in the order of the kernel, None where one is watched or has
        no value, as on the meta device.
        """
        constant = self.plan.numbers
        if constant is not None:
            return constant
        hypers = self._hypers(members, 0)
        tensors = [h for h in hypers.values() if isinstance(h, Tensor)]
        if any(h.is_meta or type(h) not in PLAIN for h in tensors) or any_watched(tensors):
            return None
        return [as_number(name, hypers[name]) for name in self.plan.fused.all_hypers]

    def _hypers(self, members: tuple[Any, ...], leaf: int) -> dict[str, Any]:
        lr = self.plan.lr
        for i, schedule in self.plan.schedules:
            lr = lr * schedule(members[i].count[leaf])
        shared = {name: getattr(members[i], name)[leaf] for i, _, name in self.plan.shared}
        return {**self.plan.constants, "lr": lr, **shared}

    def step(self, advanced: tuple[Any, ...]) -> int | Tensor:
        """Return the step of leaves that took the same number of steps."""
        if self.plan.step is None:
            return 1
        step: Tensor = advanced[self.plan.step].count[0]
        return step

    def _together(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        roles: list[list[Any]],
        params: Callable[[], list[Any]] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return what `update` does in the shortest way; None where it is closed.

        It is open where all leaves step together and are plain tensors on the CPU.
        """
        plan = self.plan
        if plan.reads_params and params is None:
            return None
        numbers = self.numbers(members)
        if numbers is None:
            return None
        size = len(leaves)
        changes = self._following(members, range(size), together=True)
        flat = [*leaves]
        for role in roles:
            flat += role
        if plan.reads_params and params is not None:
            flat += params()
        outputs = call_plain(
            plan.fused,
            flat,
            size,
            1 if plan.step is None else changes[plan.step]["count"][0],
            numbers,
            decayed=plan.reads_params,
            maximize=plan.maximize,
            inplace=inplace,
        )
        if outputs is None:
            return None
        start = size
        for i, field in plan.states:
            changes.setdefault(i, {})[field] = outputs[start : start + size]
            start += size
        return outputs[:size], _changed(members, changes)

    def _by_groups(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        read: Callable[[], list[Any]] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return what `update` does with a call for all leaves that took as many steps."""
        old = self.roles(members)
        present = [
            i
            for i, g in enumerate(leaves)
            if g is not None and all(role[i] is not None for role in old)
        ]
        if not present:
            return None
        params = None if read is None else read()
        roles = list(zip(self.plan.fused.states, [[role[i] for i in present] for role in old]))
        if params is not None and self.plan.reads_params:
            roles.append(("params", [params[i] for i in present]))
        auto = self.backend == "auto"
        refused = refusal(self.plan.fused, [leaves[i] for i in present], roles, plain=auto)
        if refused is not None:
            if auto:
                return None
            raise refused
        groups = self._groups(members, present)
        moved = [list(role) for role in old]  # filled in below
        out: list[Any] = [None] * len(leaves)
        advanced = self.advance(members, moved, present)
        for group in groups:
            found = update(
                self.plan.fused,
                [leaves[i] for i in group],
                [[role[i] for i in group] for role in old],
                None if params is None else [params[i] for i in group],
                self._steps(advanced, group),
                self._hypers(members, group[0]),
                maximize=self.plan.maximize,
                # Several calls write only after all of them were checked.
                inplace=inplace and len(groups) == 1,
                judged=True,
            )
            for k, i in enumerate(group):
                out[i] = found[0][k]
                for role, new in zip(moved, found[1]):
                    role[i] = new[k]
        if inplace and len(groups) > 1:
            for role, was in zip(moved, old):
                role[:] = map(overwrite, was, role)
        return out, advanced

    def _groups(self, members: tuple[Any, ...], present: list[int]) -> list[list[int]]:
        """Return the leaves that took the same number of steps."""
        lists = self._count_lists(members)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in present:
            groups.setdefault(tuple(id(counts[i]) for counts in lists), []).append(i)
        return list(groups.values())

    def _steps(self, advanced: tuple[Any, ...], group: Sequence[int]) -> int | list[Tensor]:
        if self.plan.step is None:
            return 1
        count = advanced[self.plan.step].count
        return [count[i] for i in group]

    def replaced(self, members: tuple[Any, ...], roles: Sequence[list[Any]]) -> tuple[Any, ...]:
        """Return the states with other roles."""
        changes: dict[int, dict[str, Any]] = {}
        for (i, field), role in zip(self.plan.states, roles):
            changes.setdefault(i, {})[field] = role
        return _changed(members, changes)

    def advance(
        self,
        members: tuple[Any, ...],
        roles: Sequence[list[Any]] | None,
        present: Sequence[int],
        *,
        together: bool = False,
    ) -> tuple[Any, ...]:
        """Return the states with one step more for the leaves in `present`.

        Args:
            members: State of each member.
            roles: What replaces the kernel's states; None: they stay.
            present: Indices of leaves.
            together: Whether these are all leaves, and all counts of a member are one tensor.
        """
        changes = self._following(members, present, together=together)
        for (i, field), role in zip(self.plan.states, roles or ()):
            changes.setdefault(i, {})[field] = role
        return _changed(members, changes)

    def _following(
        self, members: tuple[Any, ...], present: Sequence[int], *, together: bool
    ) -> dict[int, dict[str, Any]]:
        """Return the fields with counts after one step more: member -> field -> value."""
        changes: dict[int, dict[str, Any]] = {}
        for i in self.plan.counted:
            counts = members[i].count
            if together or (len(present) == len(counts) and _are_equal(counts)):
                new: list[Any] = [_successor(counts[0])] * len(counts)
            else:
                new = _put(counts, present, increment([counts[k] for k in present]))
            changes[i] = {"count": new}
            if "t" in members[i]._fields:
                changes[i]["t"] = members[i].t + 1
        for i, rule in self.plan.sharing:
            fields = [getattr(members[i], name) for name in rule.shared]
            counts = changes[i]["count"]
            moved = present[:1] if together else present  # the others have the same
            following = rule.follow(
                [counts[k] for k in moved], [[field[k] for k in moved] for field in fields]
            )
            for name, field, values in zip(rule.shared, fields, following):
                changes[i][name] = values * len(field) if together else _put(field, present, values)
        return changes


def _is_mixed(leaves: Sequence[Any], roles: Sequence[Any], params: Sequence[Any]) -> bool:
    """Return whether gradients are wider than what goes with them."""
    return not is_narrow(leaves) and any(map(is_narrow, (*roles, params)))


def _put(old: Sequence[Any], where: Sequence[int], values: Sequence[Any]) -> list[Any]:
    out = list(old)
    for i, value in zip(where, values):
        out[i] = value
    return out


def _changed(members: tuple[Any, ...], changes: dict[int, dict[str, Any]]) -> tuple[Any, ...]:
    out = list(members)
    for i, change in changes.items():
        out[i] = members[i]._replace(**change)
    return tuple(out)


def _successor(count: Tensor) -> Tensor:
    """Return the count plus one, a new tensor."""
    made = _C.successor(count)
    return count + 1 if made is None else made


def _are_equal(counts: list[Any]) -> bool:
    """Return whether all leaves are there and took the same number of steps, on one device."""
    if _C.are_one(counts):
        return not counts or counts[0] is not None
    if any(c is None for c in counts):
        return False
    first = counts[0]
    return all(c.device == first.device for c in counts) and counts.count(first) == len(counts)
