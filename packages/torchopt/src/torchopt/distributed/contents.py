# SPDX-License-Identifier: Apache-2.0
"""The contents of the parameters before a step, so that the writes of a task can be undone.

Small parameters are copied. A large one on the CPU is copied when a task writes to it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchopt.distributed.signature import local_part
from torchopt.torch_internals import (
    address_of,
    bump_versions,
    foreach_copy_,
    is_held_elsewhere,
    is_unwritten,
    lazy_copy,
    storage_of,
)

__all__ = ["Contents", "is_same", "looked_at"]

_FROZEN = 64 * 2**20  # bytes; frozen parameters of more than this in total are not copied
# After a successful step, tensors of at most _SMALL entries are compared whole, larger ones by
# their first _FIRST entries.
_SMALL = 65536
_FIRST = 4096


class Contents:
    """Copies of parameters, in memory that is reused at each step."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._parts: list[Tensor] = []  # the local tensors: the shards of DTensors
        self._are_shards = False
        self._memory: list[Tensor | None] = []  # for copies; None: not needed yet
        self._copies: list[Tensor] = []
        self._lazy: dict[int, int] = {}  # copies that are made at the first write -> storages
        self._eager: set[int] = set()  # large parameters that are better copied at once
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._flags: list[bool] = []
        self._large: list[tuple[Tensor, int]] = []  # frozen parameters not copied, and versions

    def keep(
        self, params: Sequence[Tensor], parts: Iterable[nn.Module], *, only_shards: bool
    ) -> None:
        """Copy the current contents of parameters; call `release` at the end of the step.

        Args:
            params: The parameters that are differentiated.
            parts: Modules whose frozen parameters are kept as well; only their versions if they
                are larger than 64 MiB in total.
            only_shards: Keep only DTensors. `fully_shard` makes whole parameters from them, which
                live only as long as they are used.
        """
        frozen = _frozen(parts)
        if only_shards:
            params, frozen = ([p for p in x if hasattr(p, "to_local")] for x in (params, frozen))
        is_large = sum(p.numel() * p.element_size() for p in frozen) > _FROZEN
        self._large = [(p, p._version) for p in frozen] if is_large else []
        held = [*params] if is_large else [*params, *frozen]
        is_known = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        with torch.no_grad():
            if not is_known or self._are_shards:
                self._parts = [local_part(p) for p in held]
                self._are_shards = any(map(operator.is_not, held, self._parts))
            if not is_known:
                self._memory = [None] * len(held)
                self._eager.clear()
            self._copies = self._copied()
        self._held = held
        self._addresses = [*map(address_of, self._parts)]
        self._versions = self._versions_now()
        self._flags = [p.requires_grad for p in held]

    def _copied(self) -> list[Tensor]:
        self._lazy.clear()
        copies: list[Tensor] = []
        own: list[Tensor] = []
        of: list[Tensor] = []
        for k, x in enumerate(self._parts):
            copy = None
            if x.numel() > _SMALL and not self._are_shards and k not in self._eager:
                copy = lazy_copy(x)
            if copy is not None:
                self._lazy[k] = storage_of(x)
                copies.append(copy)
                continue
            memory = self._memory[k]
            if memory is None or not _fits(memory, x):
                self._memory[k] = memory = torch.empty_like(x)
            own.append(memory)
            of.append(x)
            copies.append(memory)
        if own:
            foreach_copy_(own, of)
        return copies

    def release(self) -> None:
        """Forget the copies that share memory: later writes then need no copy."""
        if self._lazy:
            self._lazy.clear()
            self._copies.clear()

    def _versions_now(self) -> list[int]:
        # An operation increments the counter of the DTensor or that of its shard.
        return [p._version + x._version for p, x in zip(self._held, self._parts)]

    def put_back(self) -> None:
        """Undo the writes that version counters report."""
        versions = self._versions_now()
        if versions != self._versions:
            changed = map(operator.ne, versions, self._versions)
            self._restore([k for k, is_changed in enumerate(changed) if is_changed])
        self._restore_flags()

    def put_all_back(self) -> None:
        """Undo all changes."""
        pairs = enumerate(zip(self._parts, self._copies))
        self._restore([k for k, (x, y) in pairs if not self._is_as_before(k, x, y)])
        self._restore_flags()

    def require_unchanged(self) -> None:
        """Raise if a task wrote something that cannot be undone task by task.

        That is a write through `.data`, which version counters miss, or to a large frozen
        parameter.
        """
        for p, version in self._large:
            if p._version != version:
                raise TypeError(
                    "`task_loss`: expected a task that leaves frozen parameters of more than "
                    f"{_FROZEN >> 20} MiB alone, got one that wrote to a tensor of shape "
                    f"{list(p.shape)}, which is not undone; put the values back, or let the task "
                    "compute with a copy"
                )
        for k, (x, y) in enumerate(zip(self._parts, self._copies)):
            seen = (x, y) if k in self._lazy else (looked_at(x), looked_at(y))
            if not self._is_as_before(k, *seen):
                raise TypeError(
                    "`task_loss`: expected a task that leaves parameters alone, got one that wrote "
                    f"to a tensor of shape {list(x.shape)} through `.data`; write under "
                    "torch.no_grad(), then it is undone when the task ends"
                )

    def _is_as_before(self, k: int, x: Tensor, y: Tensor) -> bool:
        """Return whether a tensor, or a part of it, has the values of its copy."""
        if k not in self._lazy:
            return _fits(x, y) and is_same(x, y)
        if _fits(x, y) and x.stride() == y.stride() and is_unwritten(x, y):
            return True
        is_as_before = _fits(x, y) and is_same(x, y)
        if is_as_before:
            self._eager.add(k)  # an operation that only reads has made torch copy it
        return is_as_before

    @torch.no_grad()
    def _restore(self, which: Sequence[int]) -> None:
        for k in which:
            x = self._parts[k]
            if k in self._lazy:
                self._restore_lazy(k, x)
            elif _fits(x, self._copies[k]) and address_of(x) == self._addresses[k]:
                x.copy_(self._copies[k])
            else:  # in the memory of another tensor
                _exchange(x, self._copies[k].clone())
                self._addresses[k] = address_of(x)
        self._versions = self._versions_now()

    def _restore_lazy(self, k: int, x: Tensor) -> None:
        """Give a tensor its old memory back, which the copy has kept."""
        self._eager.add(k)
        copy = self._copies[k]
        if storage_of(x) == self._lazy[k] and is_held_elsewhere(x) and _fits(x, copy):
            x.copy_(copy)  # also seen by views that the task has made
            return
        self._copies[k] = x
        _exchange(x, copy)
        del copy
        again = lazy_copy(x)
        if again is None:
            del self._lazy[k]
            again = x.clone()
        else:
            self._lazy[k] = storage_of(x)
        self._copies[k] = again

    def _restore_flags(self) -> None:
        for p, flag in zip(self._held, self._flags):
            if p.requires_grad != flag:
                p.requires_grad_(flag)


def _frozen(parts: Iterable[nn.Module]) -> list[Tensor]:
    found = [p for part in parts for p in part._parameters.values() if p is not None]
    frozen: list[Tensor] = [p for p in found if not p.requires_grad]
    if not frozen:
        return frozen
    return [p for p in dict.fromkeys(frozen) if not nn.parameter.is_lazy(p)]


def _exchange(x: Tensor, y: Tensor) -> None:
    """Give a tensor the memory of another one; graphs that have saved its values then raise."""
    x.data = y
    bump_versions([x])


def looked_at(x: Tensor) -> Tensor:
    """Return the part of a tensor that is compared to detect a write."""
    return x if x.numel() <= _SMALL or not x.is_contiguous() else x.view(-1)[:_FIRST]


def _fits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals NaN."""
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
