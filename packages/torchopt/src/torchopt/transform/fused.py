# SPDX-License-Identifier: Apache-2.0
"""Run members of a chain as one native call if they match a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from torchopt.torch_internals import is_transforming, is_wrapped
from torchopt.transform.leaf_rule import put
from torchopt.transform.plan import Plan
from torchopt.tree_function import PLAIN, any_watched

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

        The caller knows that nothing is traced.

        Args:
            leaves: The gradients, with None for missing ones.
            members: The state of each member.
            params: Returns the parameters.
            inplace: Overwrite the states.

        Raises:
            KernelUnavailableError: `backend` is "native" and there is no kernel for the tensors.
        """
        plan = self.plan
        if self.backend == "reference":
            return None
        if MISSING is not None:
            if self.backend == "auto":
                return None
            raise unavailable(MISSING)
        if self.backend == "auto" and (
            (not plan.rules and not inplace and self._is_brief(leaves)) or plan.has_arrays()
        ):
            return None
        lists = self.lists_of(members, len(leaves))
        if lists is None or not leaves or (plan.reads_params and params is None):
            return None  # the members raise the error that says what is missing
        transforming = is_transforming()
        batched = transforming and any(is_wrapped(g) for g in leaves if isinstance(g, Tensor))
        if batched and self.backend == "auto":
            return None
        read = params() if plan.reads_params and params is not None else None
        found = None
        if not transforming and self.in_step(lists):
            found = self.together(leaves, members, lists, read, inplace=inplace)
        if found is not None and not isinstance(found, Exception):
            return found
        roles = lists[: len(plan.states)]
        if found is None or _has_gaps(leaves, *roles):
            found = self._by_groups(leaves, members, lists, read, inplace)
        if not isinstance(found, Exception):
            return found
        if not is_narrow(leaves) and any(map(is_narrow, (*roles, read or ()))):
            return self._in_float32(leaves, members, read, inplace)
        if self.backend == "auto":
            return None
        raise found

    def _in_float32(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        params: list[Any] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | None:
        """Return the result of `update` with states and parameters of half types widened.

        This happens for the float32 gradients of `torchopt.transform.compensated`.
        """
        states = self.plan.states
        old = _lists(members, states)
        wide = _with(members, states, [list(map(widened, role)) for role in old])
        read = None if params is None else lambda: list(map(widened, params))
        found = self.update(leaves, wide, read, inplace=False)
        if found is None:
            return None
        moved = [as_given(*pair) for pair in zip(_lists(found[1], states), old)]
        if inplace:
            moved = [list(map(overwrite, *pair)) for pair in zip(old, moved)]
        return found[0], _with(found[1], states, moved)

    def _is_brief(self, leaves: list[Any]) -> bool:
        """Return whether a graph is recorded for so few tensors that a native node is slower."""
        return (
            len(leaves) <= FEW
            and torch.is_grad_enabled()
            and any(isinstance(g, Tensor) and g.requires_grad for g in leaves)
        )

    def lists_of(self, members: tuple[Any, ...], size: int) -> list[list[Any]] | None:
        """Return the fields in `plan.lists`, or None if states do not have the form of the plan."""
        if len(members) != self.plan.size:
            return None
        try:
            lists = _lists(members, self.plan.lists)
        except AttributeError:
            return None  # the state of another transformation; the members raise
        for values in lists:
            if not isinstance(values, list) or len(values) != size:
                return None
        return lists

    def in_step(self, lists: list[list[Any]]) -> bool:
        """Return whether all leaves took the same number of steps, from what `lists_of` returns."""
        return all(map(_are_equal, lists[len(self.plan.states) :]))

    def _hypers(self, members: tuple[Any, ...]) -> tuple[float, ...] | dict[str, Any]:
        """Return the hyper-parameters of the first leaf in the order of the kernel.

        They are returned by name if one is watched or has no value, as on the meta device.
        """
        if self.plan.numbers is not None:
            return self.plan.numbers
        lr = self.plan.lr
        for i, schedule in self.plan.schedules:
            lr = lr * schedule(members[i].count[0])
        shared = {name: getattr(members[i], name)[0] for i, name in self.plan.shared}
        hypers = {**self.plan.constants, "lr": lr, **shared}
        tensors = [h for h in hypers.values() if isinstance(h, Tensor)]
        if any(map(_has_no_number, tensors)) or any_watched(tensors):
            return hypers
        names = self.plan.fused.all_hypers
        return tuple(map(as_number, names, map(hypers.__getitem__, names)))

    def together(
        self,
        leaves: Sequence[Any],
        members: tuple[Any, ...],
        lists: list[list[Any]],
        params: Sequence[Any] | None,
        *,
        inplace: bool = True,
        into: StepCache | None = None,
        launch: bool = True,
    ) -> tuple[list[Any], tuple[Any, ...]] | Exception | None:
        """Return the result of `update` for leaves that have taken equally many steps.

        An exception says why there is no native call. None means that a hyper-parameter is watched
        and differs in identity between leaves: equal values may then have different derivatives.

        Args:
            leaves: The gradients.
            members: The state of each member, with `in_step`.
            lists: The result of `lists_of` for them.
            params: The parameters if they are read or written, else None.
            inplace: Overwrite the states.
            into: See `torchopt.kernels.native.attempt`.
            launch: See `torchopt.kernels.native.attempt`.
        """
        plan, hypers = self.plan, self._hypers(members)
        size = len(plan.states)
        if isinstance(hypers, dict) and not all(map(_C.are_one, lists[size:])):
            return None
        changes = self._following(members)
        found = attempt(
            plan.fused,
            leaves,
            lists[:size],
            params,
            1 if plan.step is None else changes[plan.step]["count"][0],
            hypers,
            maximize=plan.maximize,
            inplace=inplace,
            plain=self.backend == "auto",
            into=into,
            launch=launch,
            checked=True,
        )
        if isinstance(found, Exception):
            return found
        # Those that were written into are the same.
        moved = plan.states if into is None else ()
        return found[0], _with(members, moved, found[1], changes)

    def _following(self, members: tuple[Any, ...]) -> dict[int, dict[str, Any]]:
        """Return the fields with counts after one step more: member -> field -> value."""
        changes: dict[int, dict[str, Any]] = {}
        for i in self.plan.counted:
            counts = members[i].count
            changes[i] = {"count": [_successor(counts[0])] * len(counts)}
            if "t" in members[i]._fields:
                changes[i]["t"] = _successor(members[i].t)
        for i, rule in self.plan.rules:
            if not rule.shared:
                continue
            counts = changes[i]["count"]
            first = [getattr(members[i], name)[:1] for name in rule.shared]
            for name, values in zip(rule.shared, rule.follow(counts[:1], first)):
                changes[i][name] = values * len(counts)
        return changes

    def _by_groups(
        self,
        leaves: list[Any],
        members: tuple[Any, ...],
        old: list[list[Any]],
        params: list[Any] | None,
        inplace: bool,
    ) -> tuple[list[Any], tuple[Any, ...]] | Exception | None:
        """Return the result of `update` with one call per number of steps."""
        fields, count = self.plan.lists, len(self.plan.states)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(zip(leaves, *old)):
            if not _has_gaps(row):
                groups.setdefault(tuple(map(id, row[1 + count :])), []).append(i)
        out: list[Any] = [None] * len(leaves)
        following, moved = members, old
        for group in groups.values():
            own = [_at(values, group) for values in old]
            found = self.together(
                _at(leaves, group),
                _with(members, fields, own),
                own,
                None if params is None else _at(params, group),
                # Several calls write only after all of them have succeeded.
                inplace=inplace and len(groups) == 1,
            )
            if found is None or isinstance(found, Exception):
                return found
            updates, following = found
            out = put(out, group, updates)
            new = _lists(following, fields)
            moved = [put(values, group, changed) for values, changed in zip(moved, new)]
        if inplace and len(groups) > 1:
            moved[:count] = [list(map(overwrite, *pair)) for pair in zip(old, moved[:count])]
        return (out, _with(following, fields, moved)) if groups else None


def _lists(members: Sequence[Any], fields: Iterable[tuple[int, str]]) -> list[list[Any]]:
    """Return the fields of states, given as pairs (member, field)."""
    return [getattr(members[i], field) for i, field in fields]


def _with(
    members: tuple[Any, ...],
    fields: Iterable[tuple[int, str]],
    values: Iterable[Any],
    changes: dict[int, dict[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """Return states with other values in fields, and with `changes`: member -> field -> value."""
    changes = {} if changes is None else changes
    for (i, field), value in zip(fields, values):
        changes.setdefault(i, {})[field] = value
    out = list(members)
    for i, change in changes.items():
        out[i] = members[i]._replace(**change)
    return tuple(out)


def _at(values: Sequence[Any], where: Sequence[int]) -> list[Any]:
    return [values[i] for i in where]


def _has_gaps(*roles: Sequence[Any]) -> bool:
    return any(x is None for role in roles for x in role)


def _has_no_number(x: Tensor) -> bool:
    return x.is_meta or type(x) not in PLAIN or x.numel() != 1


def _successor(count: Any) -> Any:
    """Return the count plus one, as a new tensor if it is one."""
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
