# SPDX-License-Identifier: Apache-2.0
"""Run members of a chain as one native call if they match a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import unavailable
from torchopt.kernels.fused_rule import as_number
from torchopt.kernels.fused_step import StepCache
from torchopt.kernels.missing import why_missing
from torchopt.kernels.native import attempt, overwrite
from torchopt.precision import as_given, is_narrow, widened
from torchopt.torch_internals import is_transforming
from torchopt.transform.counts import increment
from torchopt.transform.leaf_rule import put
from torchopt.transform.plan import Plan
from torchopt.tree_function import PLAIN, any_watched, is_traced

__all__ = ["BACKENDS", "Backend", "Part"]

Backend = Literal["auto", "native", "reference"]
BACKENDS = ("auto", "native", "reference")

# Why there are no kernels at all; None if there are kernels.
MISSING = why_missing(_C)

# Up to this number of tensors, torch's own multiplications are faster than one native node when
# plain SGD is differentiated: 21 us instead of 35 for one tensor, equal for six.
FEW = 4


@dataclass(frozen=True)
class Part:
    """Members of a chain on lists that can be one native call.

    Attributes:
        plan: The kernel for them.
        backend: "native": a native call, or an error. "auto": a native call for plain tensors if
            there is a kernel and it is faster. "reference": no native call.
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
        """Return the updates and the next states, or None, with nothing done, to run the members.

        Args:
            leaves: The gradients, with None for missing ones.
            members: The state of each member.
            params: Returns the parameters.
            inplace: Overwrite the states.

        Raises:
            KernelUnavailableError: `backend` is "native" and there is no kernel for the tensors.
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
        roles = self.roles_of(members, len(leaves))
        if roles is None or not leaves or (plan.reads_params and params is None):
            return None  # the members raise the error that says what is missing
        read = params() if plan.reads_params and params is not None else None
        found: Any = None
        if not is_transforming() and self.in_step(members):
            found = self.together(leaves, members, roles, read, inplace=inplace)
        if found is None or (isinstance(found, Exception) and _has_gaps(leaves, *roles)):
            found = self._by_groups(leaves, members, roles, read, inplace)
        if not isinstance(found, Exception):
            return None if found is None else (found[0], found[1])
        if not is_narrow(leaves) and any(map(is_narrow, (*roles, read or ()))):
            return self._in_float32(leaves, members, roles, read, inplace)
        if self.backend == "auto":
            return None
        raise found

    def _in_float32(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        old: list[list[Any]],
        params: list[Any] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return the result of `update` with states and parameters of half types widened.

        This happens for the float32 gradients of `torchopt.transform.compensated`.
        """
        wide = self._replaced(members, [list(map(widened, role)) for role in old])
        read = None if params is None else lambda: list(map(widened, params))
        found = self.update(leaves, wide, read, inplace=False)
        if found is None:
            return None
        moved = [as_given(*pair) for pair in zip(self._roles(found[1]), old)]
        if inplace:
            moved = [list(map(overwrite, *pair)) for pair in zip(old, moved)]
        return found[0], self._replaced(found[1], moved)

    def _is_brief(self, leaves: list[Any]) -> bool:
        """Return whether a graph is recorded for so few tensors that a native node is slower."""
        return (
            len(leaves) <= FEW
            and torch.is_grad_enabled()
            and any(isinstance(g, Tensor) and g.requires_grad for g in leaves)
        )

    def roles_of(self, members: tuple[Any, ...], size: int) -> list[list[Any]] | None:
        """Return the states of the kernel, or None if they do not have the form of the plan."""
        if len(members) != self.plan.size:
            return None
        try:
            roles, counts = self._roles(members), self._count_lists(members)
        except AttributeError:
            return None  # the state of another transformation; the members raise
        fits = all(isinstance(role, list) and len(role) == size for role in (*roles, *counts))
        return roles if fits else None

    def _roles(self, members: tuple[Any, ...]) -> list[list[Any]]:
        return [getattr(members[i], field) for i, field in self.plan.states]

    def in_step(self, members: tuple[Any, ...]) -> bool:
        """Return whether all leaves took the same number of steps."""
        return all(map(_are_equal, self._count_lists(members)))

    def _count_lists(self, members: tuple[Any, ...]) -> list[list[Any]]:
        """Return the fields that must be equal for leaves in one call."""
        lists = [members[i].count for i in self.plan.counted]
        return lists + [getattr(members[i], name) for i, _, name in self.plan.shared]

    def _hypers(
        self, members: tuple[Any, ...], leaf: int = 0
    ) -> tuple[float, ...] | dict[str, Any]:
        """Return the hyper-parameters in the order of the kernel.

        They are returned by name if one is watched or has no value, as on the meta device.
        """
        if self.plan.numbers is not None:
            return self.plan.numbers
        lr = self.plan.lr
        for i, schedule in self.plan.schedules:
            lr = lr * schedule(members[i].count[leaf])
        shared = {name: getattr(members[i], name)[leaf] for i, _, name in self.plan.shared}
        hypers = {**self.plan.constants, "lr": lr, **shared}
        tensors = [h for h in hypers.values() if isinstance(h, Tensor)]
        if any(map(_has_no_number, tensors)) or any_watched(tensors):
            return hypers
        return tuple(as_number(name, hypers[name]) for name in self.plan.fused.all_hypers)

    def together(
        self,
        leaves: Sequence[Any],
        members: tuple[Any, ...],
        roles: list[list[Any]],
        params: Sequence[Any] | None,
        *,
        inplace: bool = True,
        into: StepCache | None = None,
        launch: bool = True,
    ) -> tuple[list[Any], tuple[Any, ...]] | Exception | None:
        """Return the result of `update` for leaves that have taken equally many steps.

        An exception says why there is no native call. None means that a hyper-parameter is watched:
        equal values of different leaves may then have different derivatives.

        Args:
            leaves: The gradients.
            members: The state of each member, with `in_step`.
            roles: The states of the kernel.
            params: The parameters if they are read or written, else None.
            inplace: Overwrite the states.
            into: See `torchopt.kernels.native.attempt`.
            launch: See `torchopt.kernels.native.attempt`.
        """
        plan, hypers = self.plan, self._hypers(members)
        if isinstance(hypers, dict):
            return None
        changes = self._following(members, range(len(leaves)), together=True)
        found = attempt(
            plan.fused,
            leaves,
            roles,
            params,
            1 if plan.step is None else changes[plan.step]["count"][0],
            hypers,
            maximize=plan.maximize,
            inplace=inplace,
            plain=self.backend == "auto",
            into=into,
            launch=launch,
        )
        if isinstance(found, Exception):
            return found
        return found[0], self._replaced(members, found[1], changes)

    def _by_groups(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        old: list[list[Any]],
        params: list[Any] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | Exception | None:
        """Return the result of `update` with one call per number of steps."""
        present = [i for i, row in enumerate(zip(leaves, *old)) if not _has_gaps(row)]
        groups: dict[tuple[int, ...], list[int]] = {}
        lists = self._count_lists(members)
        for i in present:
            groups.setdefault(tuple(id(counts[i]) for counts in lists), []).append(i)
        if not groups:
            return None
        changes = self._following(members, present, together=False)
        moved = [list(role) for role in old]
        out: list[Any] = [None] * len(leaves)
        step = self.plan.step
        for group in groups.values():
            found = attempt(
                self.plan.fused,
                [leaves[i] for i in group],
                [[role[i] for i in group] for role in old],
                None if params is None else [params[i] for i in group],
                1 if step is None else [changes[step]["count"][i] for i in group],
                self._hypers(members, group[0]),
                maximize=self.plan.maximize,
                # Several calls write only after all of them have succeeded.
                inplace=inplace and len(groups) == 1,
                plain=self.backend == "auto",
            )
            if isinstance(found, Exception):
                return found
            for k, i in enumerate(group):
                out[i] = found[0][k]
                for role, new in zip(moved, found[1]):
                    role[i] = new[k]
        if inplace and len(groups) > 1:
            moved = [list(map(overwrite, *pair)) for pair in zip(old, moved)]
        return out, self._replaced(members, moved, changes)

    def _replaced(
        self,
        members: tuple[Any, ...],
        roles: Sequence[list[Any]],
        changes: dict[int, dict[str, Any]] | None = None,
    ) -> tuple[Any, ...]:
        """Return the states with new roles, and with the fields in `changes`."""
        changes = {} if changes is None else changes
        for (i, field), role in zip(self.plan.states, roles):
            changes.setdefault(i, {})[field] = role
        out = list(members)
        for i, change in changes.items():
            out[i] = members[i]._replace(**change)
        return tuple(out)

    def _following(
        self, members: tuple[Any, ...], present: Sequence[int], *, together: bool
    ) -> dict[int, dict[str, Any]]:
        """Return the fields with counts after the step: member -> field -> value."""
        changes: dict[int, dict[str, Any]] = {}
        for i in self.plan.counted:
            counts = members[i].count
            if together or (len(present) == len(counts) and _are_equal(counts)):
                new: list[Any] = [_successor(counts[0])] * len(counts)
            else:
                new = put(counts, present, increment([counts[k] for k in present]))
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
                changes[i][name] = values * len(field) if together else put(field, present, values)
        return changes


def _has_gaps(*roles: Sequence[Any]) -> bool:
    return any(x is None for role in roles for x in role)


def _has_no_number(x: Tensor) -> bool:
    return x.is_meta or type(x) not in PLAIN or x.numel() != 1


def _successor(count: Tensor) -> Tensor:
    """Return the count plus one, as a new tensor."""
    made = _C.successor(count)
    return count + 1 if made is None else made


def _are_equal(counts: list[Any]) -> bool:
    """Return whether no count is missing and all are equal and on one device."""
    if _C.are_one(counts):
        return not counts or counts[0] is not None
    if any(c is None for c in counts) or is_transforming():  # a batch has no truth value
        return False
    first = counts[0]
    return all(c.device == first.device for c in counts) and counts.count(first) == len(counts)
