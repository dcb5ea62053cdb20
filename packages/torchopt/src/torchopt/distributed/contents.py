# SPDX-License-Identifier: Apache-2.0
"""The contents of the parameters before a step, so that the writes of a task can be undone."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchopt.distributed.signature import local_part
from torchopt.precision import forget_casts
from torchopt.torch_internals import bump_versions, foreach_copy_

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
        self._copies: list[Tensor] = []
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._flags: list[bool] = []
        self._large: list[tuple[Tensor, int]] = []  # frozen parameters not copied, and versions

    def keep(
        self, params: Sequence[Tensor], parts: Iterable[nn.Module], *, only_shards: bool
    ) -> None:
        """Copy the current contents of parameters.

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
            if is_known and all(map(_fits, self._copies, self._parts)):
                foreach_copy_(self._copies, self._parts)
            else:
                self._copies = [x.clone() for x in self._parts]
        self._held = held
        self._addresses = [x.data_ptr() for x in self._parts]
        self._versions = self._versions_now()
        self._flags = [p.requires_grad for p in held]

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
        self._restore(self._changed(whole=True))
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
        changed = self._changed(whole=False)
        if changed:
            x = self._held[changed[0]]
            raise TypeError(
                "`task_loss`: expected a task that leaves parameters alone, got one that wrote to "
                f"a tensor of shape {list(x.shape)} through `.data`; write under torch.no_grad(), "
                "then it is undone when the task ends"
            )

    def _changed(self, *, whole: bool) -> list[int]:
        def is_changed(x: Tensor, y: Tensor) -> bool:
            if not _fits(x, y):
                return True
            if not whole and x.stride() == y.stride():  # else their parts do not correspond
                x, y = looked_at(x), looked_at(y)
            return not is_same(x, y)

        return [k for k, pair in enumerate(zip(self._parts, self._copies)) if is_changed(*pair)]

    @torch.no_grad()
    def _restore(self, which: Sequence[int]) -> None:
        for k in which:
            x, copy = self._parts[k], self._copies[k]
            if _fits(x, copy) and x.data_ptr() == self._addresses[k]:
                x.copy_(copy)
            else:  # in the memory of another tensor
                x.data = copy.clone()
                bump_versions([x])  # graphs that have saved its values then raise
                self._addresses[k] = x.data_ptr()
        forget_casts()
        self._versions = self._versions_now()

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


def looked_at(x: Tensor) -> Tensor:
    """Return the part of a tensor that is compared to detect a write."""
    return x if x.numel() <= _SMALL or not x.is_contiguous() else x.view(-1)[:_FIRST]


def _fits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def is_same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals NaN."""
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
