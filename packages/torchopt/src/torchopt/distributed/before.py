# SPDX-License-Identifier: Apache-2.0
"""A task is a function of the modules as they are at the beginning of a step.

What it does to them is undone when it ends, in whatever way: exchanged parameters and sub-modules,
modes, and the contents of parameters and buffers; if it raises, attributes and hooks as well. The
changes of buffers, such as the statistics of a batch norm, are collected:
after the step a buffer is what it was plus the weighted mean of its changes in all tasks (of
integers, such as counts, the sum), at every number of ranks. Where the value before was not finite,
such as the infinity that a minimum begins with, it is the weighted mean of what the tasks leave.
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
        modules: Those that tasks use.
        params: What is differentiated.
        kept: Memory for what parameters hold.
        only_shards: See `Contents.keep`.

    Attributes:
        changes: Of each buffer, what the tasks of this process have added; None: nothing.
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
        # The dictionaries themselves may be exchanged, too.
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
        self._kept = [False] * len(self._buffers)  # by any of the tasks here

    @property
    def contents(self) -> list[Tensor]:
        """The contents of the buffers."""
        return self._contents

    def take(self, weight: float) -> list[Tensor | None]:
        """Return the weighted changes of the buffers by a task that ended, and undo them."""
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
        """Add the changes by a task."""
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
        """Make the changes those of all ranks, which call this together."""
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
        """Return the change of a buffer by the tasks here, those that kept it too."""
        change = self.changes[k]
        if not self._kept[k]:
            return change
        kept = unchanged(self._contents[k])
        return kept if change is None else change + kept

    def end(self) -> None:
        """Raise if a task that ended has left something that cannot be undone."""
        self._params.require_unchanged()

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back after a task that raised."""
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
        """Put the modules back."""
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
    """Return modules and all in them, each once, in the order of `nn.Module.modules`."""
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
    """Let a table have these entries, in this order: it is that of the parameters."""
    if list(table) != list(entries) or any(map(operator.is_not, table.values(), entries.values())):
        table.clear()
        table.update(entries)


def unchanged(x: Tensor) -> Tensor:
    """Return the change by a task that keeps a buffer: 0; values that are not finite stay."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.zeros_like(x, dtype=torch.int64)
    return torch.where(x.isfinite(), 0.0, x)
