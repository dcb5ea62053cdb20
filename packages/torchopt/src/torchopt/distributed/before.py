# SPDX-License-Identifier: Apache-2.0
"""The state of the modules at the beginning of a step, and how it is restored after each task.

Every task sees the modules as they were at the beginning of the step. When a task ends, what it did
to them is undone: replaced parameters and sub-modules, training modes, and the contents of
parameters and buffers; if it raised, attributes and hooks as well. Changes of buffers, such as the
statistics of a batch norm, are collected. After the step a floating-point buffer is its old value
plus the weighted mean of its changes in all tasks, for any number of ranks; an integer buffer, such
as a count, gets the sum of the changes. Where the old value was not finite, such as the infinity
that a running minimum starts with, the buffer gets the weighted mean of the tasks' final values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.distributed.contents import Contents, is_same, looked_at
from torchopt.distributed.group import Group

__all__ = ["Before", "parts_of", "unchanged"]

_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(k for k, x in vars(nn.Module()).items() if isinstance(x, dict) and k not in _HELD)


class Before:
    """The modules as they were before the step.

    Args:
        modules: The modules that tasks use.
        params: The parameters that are differentiated.
        kept: Memory for the contents of parameters.
        only_shards: See `Contents.keep`.

    Attributes:
        changes: For each buffer, the sum of the changes by this process's tasks; None: none.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        params: Sequence[Tensor],
        kept: Contents,
        *,
        only_shards: bool,
    ) -> None:
        parts = parts_of(modules)
        self._params = kept
        kept.keep(params, parts, only_shards=only_shards)
        self._modes = [(part, part.training) for part in parts]
        self._attributes = [dict(part.__dict__) for part in parts]
        self._hooks = [
            {name: dict(x) for name in _HOOKS if (x := own.get(name))} for own in self._attributes
        ]
        # A task may replace the dictionaries themselves, too.
        self._tables = [
            (part, kind, dict(entries))
            for part, own in zip(parts, self._attributes)
            for kind in _HELD
            if (entries := own[kind])
        ]
        self._buffers: list[tuple[nn.Module, str, Tensor]] = [
            (part, key, x)
            for part, kind, entries in self._tables
            if kind == "_buffers"
            for key, x in entries.items()
            if x is not None
        ]
        self._contents = [x.detach().clone() for _, _, x in self._buffers]
        self._versions = [x._version for _, _, x in self._buffers]
        self.changes: list[Tensor | None] = [None] * len(self._buffers)
        self._kept = [False] * len(self._buffers)  # whether a task here left the buffer alone

    @property
    def contents(self) -> list[Tensor]:
        """The contents of the buffers."""
        return self._contents

    def take(self, weight: float) -> list[Tensor | None]:
        """Return the weighted changes that a finished task made to the buffers, and undo them."""
        if not self._modes:
            self._params.put_back()
            return []
        with torch.no_grad():
            return self._take(weight)

    def _take(self, weight: float) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for k, (part, key, x) in enumerate(self._buffers):
            now = part._buffers.get(key)
            if now is x and not self._is_written(k, x):
                found.append(None)
                continue
            before = self._contents[k]
            if now is None or now.shape != before.shape or now.dtype != before.dtype:
                found.append(None)
            elif x.is_floating_point() or x.is_complex():
                change = torch.where(before.isfinite(), now.detach() - before, now.detach())
                found.append(change * weight)
            else:
                found.append(now.detach().long() - before.long())
        self.restore()
        return found

    def add(self, changes: Sequence[Tensor | None]) -> None:
        """Add the changes of one task."""
        for k, change in enumerate(changes):
            if change is None:
                self._kept[k] = True
            else:
                sum_ = self.changes[k]
                self.changes[k] = change if sum_ is None else sum_ + change

    @property
    def changed(self) -> bool:
        """Whether there are changes."""
        return any(x is not None for x in self.changes)

    def sum_over(self, group: Group, name: str, limit: float) -> None:
        """Sum the changes over all ranks, which call this together."""
        parts = []
        for k, x in enumerate(self._contents):
            change = self._own(k)
            if change is None:
                is_count = not (x.is_floating_point() or x.is_complex())
                change = torch.zeros_like(x, dtype=torch.int64 if is_count else None)
            parts.append(change)
        self.changes = [*group.sums(parts, name, limit)]
        self._kept = [False] * len(self._kept)

    def _own(self, k: int) -> Tensor | None:
        """Return the change of a buffer by the tasks here, including those that left it alone."""
        change = self.changes[k]
        if not self._kept[k]:
            return change
        kept = unchanged(self._contents[k])
        return kept if change is None else change + kept

    def end(self) -> None:
        """Raise if a finished task did something that cannot be undone."""
        self._params.require_unchanged()

    @torch.no_grad()
    def undo(self) -> None:
        """Restore everything after a task that raised."""
        for (part, _), attributes, hooks in zip(self._modes, self._attributes, self._hooks):
            own = part.__dict__
            own.clear()
            own.update(attributes)
            for name in (*_HELD, *_HOOKS):
                _put(own[name], hooks.get(name, {}) if name in _HOOKS else {})
        for (_, _, x), before in zip(self._buffers, self._contents):
            if not is_same(x, before):
                x.copy_(before)
        self._params.put_all_back()
        self.restore()

    def restore(self) -> None:
        """Restore the modules."""
        for part, kind, entries in self._tables:
            _put(part.__dict__[kind], entries)
        for k, (_, _, x) in enumerate(self._buffers):
            if self._is_written(k, x):
                with torch.no_grad():
                    x.copy_(self._contents[k])
                self._versions[k] = x._version
        self._params.put_back()
        for part, training in self._modes:
            if part.training != training:
                part.training = training

    def _is_written(self, k: int, x: Tensor) -> bool:
        # torch's batch norm writes its statistics without incrementing the version counter.
        if x._version != self._versions[k]:
            return True
        return not torch.equal(looked_at(x), looked_at(self._contents[k]))

    @torch.no_grad()
    def deliver(self) -> None:
        """Add the changes to the buffers."""
        for k, ((_, _, x), before) in enumerate(zip(self._buffers, self._contents)):
            change = None if self.changes[k] is None else self._own(k)
            if change is None:
                continue
            if x.dtype == torch.bool:
                x.copy_(before ^ (change != 0))
            else:
                change = change.to(x.dtype)
                x.copy_(torch.where(before.isfinite(), before + change, change))


def parts_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules and all their sub-modules, each once, in the order of `modules()`."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = []
    left += reversed([*modules])
    while left:
        part = left.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            left += reversed(part._modules.values())
    return list(found.values())


def _put(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    """Give a table these entries, in this order, which is the order of `parameters()`."""
    if list(table) != list(entries) or any(map(operator.is_not, table.values(), entries.values())):
        table.clear()
        table.update(entries)


def unchanged(x: Tensor) -> Tensor:
    """Return the change by a task that leaves a buffer alone: 0, or the value if not finite."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.zeros_like(x, dtype=torch.int64)
    return torch.where(x.isfinite(), 0.0, x)
