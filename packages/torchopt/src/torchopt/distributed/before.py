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

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.distributed.contents import Contents, is_same, looked_at
from torchopt.distributed.group import Group

__all__ = ["Before", "unchanged"]

# Of modules: parameters, buffers, sub-modules, hooks.
_TABLES = frozenset(name for name, x in vars(nn.Module()).items() if isinstance(x, dict))


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
        parts = [part for module in modules for part in module.modules()]
        self._params = kept
        kept.keep(params, parts, only_shards=only_shards)
        self._attributes = [(part, _attributes(part)) for part in parts]
        self._modes = [(part, part.training) for part in parts]
        # The dictionaries themselves may be exchanged, too.
        self._tables: list[tuple[nn.Module, str, dict[str, Any]]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        for part in parts:
            for kind in ("_parameters", "_buffers", "_modules"):
                if part.__dict__[kind]:
                    self._tables.append((part, kind, dict(part.__dict__[kind].items())))
            self._buffers += [(part, key, x) for key, x in part._buffers.items() if x is not None]
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
        kinds: dict[Any, list[int]] = {}
        for k, x in enumerate(self._contents):
            kind = x.dtype if x.is_floating_point() or x.is_complex() else torch.int64
            kinds.setdefault((kind, x.device), []).append(k)
        for (dtype, device), members in kinds.items():
            parts = [
                torch.zeros(self._contents[k].shape, dtype=dtype, device=device)
                if (change := self._own(k)) is None
                else change
                for k in members
            ]
            total = group.sum_(torch.cat([x.reshape(-1) for x in parts]), name, limit)
            for k, x, part in zip(members, parts, total.split([x.numel() for x in parts])):
                self.changes[k] = part.view(x.shape)
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
        for part, attributes in self._attributes:
            own = part.__dict__
            for name in [name for name in own if name not in attributes]:
                del own[name]
            for name, (value, entries) in attributes.items():
                own[name] = value
                if entries is not None:
                    _put(value, entries)
        for (_, _, x), before in zip(self._buffers, self._contents):
            if not is_same(x, before):
                x.copy_(before)
        self._params.put_all_back()
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the modules back."""
        for part, kind, entries in self._tables:
            table = part.__dict__[kind]
            _put(table, entries)
        for k, (_, _, x) in enumerate(self._buffers):
            if self._is_written(k, x):
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


def _put(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    """Let a table have these entries, in this order: it is that of the parameters."""
    pairs = zip(table.items(), entries.items())
    if len(table) != len(entries) or any(j != k or x is not y for (j, x), (k, y) in pairs):
        table.clear()
        table.update(entries)


def _attributes(part: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Return what a module holds, and the entries of its tables."""
    own = part.__dict__
    return {name: (x, dict(x) if name in _TABLES else None) for name, x in own.items()}


def unchanged(x: Tensor) -> Tensor:
    """Return the change by a task that keeps a buffer: 0; values that are not finite stay."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.zeros_like(x, dtype=torch.int64)
    return torch.where(x.isfinite(), 0.0, x)
