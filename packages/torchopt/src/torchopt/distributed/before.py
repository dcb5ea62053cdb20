# SPDX-License-Identifier: Apache-2.0
"""A task is a function of the modules as they are at the beginning of a step.

What it does to them is undone when it ends, in whatever way: exchanged parameters, modes, and the
contents of buffers. The changes of buffers, such as the statistics of a batch norm, are collected:
after the step a buffer is what it was plus the weighted mean of its changes in all tasks (of
integers, such as counts, the sum), at every number of ranks. Where the value before was not finite,
such as the infinity that a minimum begins with, it is the weighted mean of what the tasks leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.distributed.group import Group

__all__ = ["Before", "unchanged"]

_SMALL = 65536  # entries; statistics of a norm have no more


class Before:
    """The modules as they were before the step.

    Args:
        modules: Those that tasks use.

    Attributes:
        changes: Of each buffer, what the tasks of this process have added; None: nothing.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules()]
        self._modes = [(part, part.training) for part in parts]
        # The dictionaries themselves may be exchanged, too.
        self._tables: list[tuple[nn.Module, str, dict[str, Any]]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        for part in parts:
            for kind in ("_parameters", "_buffers"):
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

    @torch.no_grad()
    def restore(self) -> None:
        """Put the modules back."""
        for part, kind, entries in self._tables:
            table = part.__dict__[kind]
            if len(table) != len(entries) or any(table.get(k) is not x for k, x in entries.items()):
                for key in [key for key in table if key not in entries]:
                    del table[key]
                for key, x in entries.items():
                    table[key] = x
        for k, (_, _, x) in enumerate(self._buffers):
            if self._is_written(k, x):
                x.copy_(self._contents[k])
                self._versions[k] = x._version
        for part, training in self._modes:
            if part.training != training:
                part.training = training

    def _is_written(self, k: int, x: Tensor) -> bool:
        # torch's batch norm writes its statistics without incrementing the version counter.
        if x._version != self._versions[k]:
            return True
        return x.numel() <= _SMALL and not torch.equal(x, self._contents[k])

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


def unchanged(x: Tensor) -> Tensor:
    """Return the change by a task that keeps a buffer: 0; values that are not finite stay."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.zeros_like(x, dtype=torch.int64)
    return torch.where(x.isfinite(), 0.0, x)
