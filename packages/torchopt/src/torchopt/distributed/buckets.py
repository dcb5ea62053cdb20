# SPDX-License-Identifier: Apache-2.0
"""Gradients summed over the ranks bucket by bucket, while the last backward pass still runs.

The `.grad` of every parameter is a view of a bucket during a step, so that nothing is copied. A
bucket is sent when the last gradient in it is complete. All ranks send the buckets in the same
order, the reverse of that of the parameters, which is about the order in which a backward pass
completes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed.group import Group
from torchopt.distributed.signature import local_part

__all__ = ["BucketedSum"]


class _Bucket:
    def __init__(self, members: list[int], params: Sequence[Tensor]) -> None:
        self.members = members
        first = params[members[0]]
        sizes = [params[k].numel() for k in members]
        self.flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        self.views = [
            part.view(params[k].shape) for k, part in zip(members, self.flat.split(sizes))
        ]
        self.left = len(members)
        self.work: Any = None


class BucketedSum:
    """The gradients of one step.

    Args:
        params: Leaves; their `.grad` is set aside until `finish` or `abandon`.
        group: The ranks.
        bucket_bytes: Size at which a bucket is full.
        may_send: Asked before the first bucket is sent.

    Attributes:
        used: Whether a backward pass of this process has reached the parameter.
        early_bytes: Of the buckets that were sent while the last backward pass still ran.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        group: Group,
        bucket_bytes: int,
        may_send: Callable[[], bool],
    ) -> None:
        self.params = list(params)
        self._may_send = may_send
        self.group = group
        self.early_bytes = 0
        self.before = [p.grad for p in self.params]
        self.used = [False] * len(self.params)
        self._buckets: list[_Bucket] = []
        self._home: dict[int, tuple[_Bucket, int]] = {}
        self._next = 0
        self._armed = False
        # A DTensor's gradient is a DTensor: it is summed by itself, shard by shard.
        self._sharded = [k for k, p in enumerate(self.params) if hasattr(p, "to_local")]
        self._fill(bucket_bytes)
        for p in self.params:
            p.grad = None
        for bucket in self._buckets:
            for k, view in zip(bucket.members, bucket.views):
                self.params[k].grad = view
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(k)) for k, p in enumerate(self.params)
        ]

    def _fill(self, bucket_bytes: int) -> None:
        open_: dict[Any, tuple[list[int], int]] = {}
        full: list[list[int]] = []
        for k in reversed(range(len(self.params))):
            if k in self._sharded:
                continue
            p = self.params[k]
            members, size = open_.get((p.dtype, p.device), ([], 0))
            size += p.numel() * p.element_size()
            members.append(k)
            if size >= bucket_bytes:
                full.append(members)
                members, size = [], 0
            open_[p.dtype, p.device] = (members, size)
        full += [members for members, _ in open_.values() if members]
        self._buckets = [_Bucket(members, self.params) for members in full]
        for bucket in self._buckets:
            for n, k in enumerate(bucket.members):
                self._home[k] = (bucket, n)

    def arm(self) -> None:
        """Send buckets as the next backward pass, the last one here, completes them."""
        self._armed = True

    def _hook(self, k: int) -> Callable[[Tensor], None]:
        def accumulated(p: Tensor) -> None:
            self.used[k] = True
            if self._armed and k in self._home:
                self._ready(k)

        return accumulated

    def _ready(self, k: int) -> None:
        bucket, n = self._home[k]
        self._keep_view(k, bucket, n)
        bucket.left -= 1
        before = self._next
        if bucket.left or (before < len(self._buckets) and self._buckets[before].left):
            return
        if not self._may_send():
            self._armed = False
            return
        while self._next < len(self._buckets) and self._buckets[self._next].left == 0:
            self._send(self._buckets[self._next])
        self.early_bytes += sum(
            b.flat.numel() * b.flat.element_size() for b in self._buckets[before : self._next]
        )

    def _keep_view(self, k: int, bucket: _Bucket, n: int) -> None:
        grad = self.params[k].grad
        if grad is not None and grad is not bucket.views[n]:
            with torch.no_grad():
                bucket.views[n].copy_(grad)
            self.params[k].grad = bucket.views[n]

    def _send(self, bucket: _Bucket) -> None:
        bucket.work = self.group.start_sum(bucket.flat)
        self._next += 1

    def send(self) -> None:
        """Send what is left."""
        self._unhook()
        for bucket in self._buckets[self._next :]:
            for n, k in enumerate(bucket.members):
                self._keep_view(k, bucket, n)
            self._send(bucket)
        for k in self._sharded:
            p = self.params[k]
            self.used[k] = self.used[k] or p.grad is not None

    def finish(self, name: str, limit: float) -> None:
        """Wait for all sums: the buckets hold them then.

        Args:
            name: What they are for, in words.
            limit: Seconds that other ranks may take.
        """
        for k in self._sharded:
            p = self.params[k]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.placements != p.placements:  # type: ignore[attr-defined]
                p.grad = p.grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
            assert p.grad is not None
            self.group.sum_(local_part(p.grad), name, limit)
        for bucket in self._buckets:
            self.group.wait(bucket.work, name, limit)

    def deliver(self, used: Sequence[bool]) -> None:
        """Leave the sums in `.grad`, added to what was there.

        Args:
            used: Whether any task, on any rank, depends on the parameter; the others keep the
                `.grad` they had.
        """
        with torch.no_grad():
            for p, before, is_used in zip(self.params, self.before, used):
                if not is_used:
                    p.grad = before
                elif before is not None and p.grad is not None:
                    p.grad = before + p.grad

    def abandon(self) -> None:
        """Put every `.grad` back."""
        self._unhook()
        for p, before in zip(self.params, self.before):
            p.grad = before

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
