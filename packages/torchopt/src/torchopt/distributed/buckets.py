# SPDX-License-Identifier: Apache-2.0
"""Gradients summed over the ranks bucket by bucket, while the last backward pass still runs.

A bucket is filled and sent when the last of its gradients is complete; then the `.grad` of its
parameters become views of it. A large gradient is a bucket by itself, and is summed where it is.
All ranks send the buckets in the same order: the reverse order of the parameters, which is roughly
the order in which a backward pass completes gradients. The last bucket is sent after the pass,
together with the losses and counts of the step, unless it is a large gradient.

On one machine the ranks put buckets of small gradients into shared memory (`Slots`), as long as
there is room, and pass only large gradients to torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed.group import Group
from torchopt.distributed.signature import gradient_dtype, local_part
from torchopt.distributed.slots import Shares, Slots
from torchopt.distributed.sparse import added
from torchopt.torch_internals import holds_alone, hooks_of_gradient

__all__ = ["BucketedSum", "dense_gradient", "filled", "placed_like", "zero_gradient"]

_LARGE = 2**21  # bytes; of smaller ones, a message each would take longer than a copy


def dense_gradient(p: Tensor) -> Tensor:
    """Return the gradient of a leaf as a dense tensor; zeros if there is none."""
    g = p.grad
    return zero_gradient(p) if g is None else g.to_dense() if g.is_sparse else g


def zero_gradient(p: Tensor) -> Tensor:
    """Return a gradient of zeros."""
    return torch.zeros_like(p, dtype=gradient_dtype(p))


def placed_like(p: Any, g: Any) -> Any:
    """Return the gradient of a DTensor with its placements: a sum that is pending is completed."""
    return g if g.placements == p.placements else g.redistribute(placements=p.placements)


def filled(
    params: Sequence[Tensor], bucket_bytes: int, apart: Sequence[int] = ()
) -> list[list[int]]:
    """Return the positions of the parameters in each bucket, in the order of sending.

    Args:
        params: The parameters; a DTensor goes into no bucket.
        bucket_bytes: Size at which a bucket of small gradients is full. If there are several, the
            first one is full at a quarter of it.
        apart: Positions of further parameters that go into no bucket.
    """
    open_: dict[Any, tuple[list[int], int]] = {}
    full: list[list[int]] = []
    dense = {k: p for k, p in enumerate(params) if k not in apart and not hasattr(p, "to_local")}
    several = sum(_bytes(p) for p in dense.values() if not _is_large(p)) > bucket_bytes
    limit = bucket_bytes // 4 if several else bucket_bytes
    for k, p in reversed(dense.items()):
        if _is_large(p):
            full.append([k])
            continue
        kind = (gradient_dtype(p), p.device)
        members, size = open_.get(kind, ([], 0))
        members.append(k)
        size += _bytes(p)
        if size >= limit:
            full.append(members)
            members, size, limit = [], 0, bucket_bytes
        open_[kind] = (members, size)
    return full + [members for members, _ in open_.values() if members]


def _bytes(p: Tensor) -> int:
    """Return the size of the gradient of a parameter."""
    return p.numel() * gradient_dtype(p).itemsize


def _is_large(p: Tensor) -> bool:
    """Return whether the gradient of a parameter is a bucket by itself."""
    return _bytes(p) >= _LARGE


class _Bucket:
    def __init__(self, members: list[int]) -> None:
        self.members = members
        self.left = len(members)
        self.is_sent = False
        self.flat: Any = None  # the gradients; None while they are in shared memory
        self.work: Any = None
        self.shares: Shares | None = None


class BucketedSum:
    """The gradients of one step.

    Args:
        params: Leaves; their `.grad` is set aside until `finish` or `abandon`.
        group: The ranks.
        fill: The result of `filled`; gradients of parameters in no bucket are summed elsewhere.
        may_send: Called before the first bucket is sent; returns whether it may be sent.

    Attributes:
        used: Whether a backward pass of this process has reached the parameter; set by `send`.
        early_bytes: Size of the buckets that were sent while the last backward pass still ran.
        takes_numbers: Whether the last bucket can carry the numbers of the step.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        group: Group,
        fill: Sequence[list[int]],
        may_send: Callable[[], bool],
    ) -> None:
        self.params = list(params)
        self._may_send = may_send
        self.group = group
        self.early_bytes = 0
        self.before = [p.grad for p in self.params]
        self.used: list[bool] = []
        self._next = 0
        self._slots: Slots | None = None
        self._place = 0  # the first byte of the slots that this step has not used
        self._number = 0
        self._armed = False
        self._is_first: list[bool] = []  # whether autograd may hold the next gradient
        self._numbers: Numbers | None = None
        # A DTensor's gradient is a DTensor: it is summed by itself, shard by shard.
        self._sharded = [k for k, p in enumerate(self.params) if hasattr(p, "to_local")]
        self._buckets = [_Bucket(members) for members in fill]
        last = self.params[self._buckets[-1].members[0]] if self._buckets else None
        self.takes_numbers = last is not None and Numbers.fit(last) and not _is_large(last)
        for p in self.params:
            p.grad = None
        self._early = self._buckets[: len(self._buckets) - self.takes_numbers]
        self._hooks = [
            self.params[k].register_post_accumulate_grad_hook(self._hook(bucket))
            for bucket in self._early
            for k in bucket.members
        ]

    def share(self, slots: Slots, number: int) -> None:
        """Use shared memory for small gradients.

        Args:
            slots: The memory, which all ranks have found.
            number: A number of the step that is the same on every rank and grows.
        """
        self._slots, self._number = slots, number

    def arm(self) -> None:
        """Send buckets while the next backward pass, the last one of this rank, completes them."""
        self._armed = True
        # autograd itself holds a first gradient, but so may a hook of somebody else.
        self._is_first = [p.grad is None and hooks_of_gradient(p) == 1 for p in self.params]

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def accumulated(p: Tensor) -> None:
            if self._armed:
                self._ready(bucket)

        return accumulated

    def _ready(self, bucket: _Bucket) -> None:
        if bucket.is_sent:
            raise RuntimeError(
                "expected one gradient of a parameter in a backward pass, got a second one after "
                "the first was sent, from a backward pass inside of it; let the custom backward() "
                "return the gradients of parameters, such as those of torch.autograd.grad"
            )
        bucket.left = max(bucket.left - 1, 0)
        early, before = self._early, self._next
        if bucket.left or before >= len(early) or early[before].left:
            return
        if not self._may_send():
            self._armed = False
            return
        while self._next < len(early) and early[self._next].left == 0:
            ready = early[self._next]
            self._send(ready, [], in_hook=ready is bucket and self._is_first[ready.members[0]])
        sent = early[before : self._next]
        self.early_bytes += sum(_bytes(self.params[k]) for b in sent for k in b.members)

    def _send(self, bucket: _Bucket, more: list[Tensor], *, in_hook: bool = False) -> None:
        """Fill a bucket and send it."""
        members = [self.params[k] for k in bucket.members]
        bucket.is_sent = True
        self._next += 1
        with torch.no_grad():
            g, is_large = members[0].grad, _is_large(members[0])
            if g is not None and is_large and _is_own(g, in_hook):
                bucket.flat = g.detach()
            else:
                parts = [dense_gradient(p).detach().reshape(-1) for p in members] + more
                if self._slots is not None and not is_large:
                    number = self._number << 20 | self._next
                    bucket.shares = self._slots.put(parts, self._place, number)
                if bucket.shares is None:
                    self._hold(bucket, torch.cat(parts))
        if bucket.shares is None:
            bucket.work = self.group.start_sum(bucket.flat)
        else:
            self._place += -(-bucket.shares.nbytes // 64) * 64
            self.group.count_sum(bucket.shares.nbytes)

    def _hold(self, bucket: _Bucket, flat: Tensor) -> None:
        """Make the gradients views of a vector.

        They are detached from each other by `.data`: changing one in place does not increment the
        version counter of another.
        """
        bucket.flat = flat
        members = [self.params[k] for k in bucket.members]
        sizes = [p.numel() for p in members]
        for p, view in zip(members, flat[: sum(sizes)].split(sizes)):
            p.grad = view.view(p.shape).data

    def send(self) -> None:
        """Send what is left, except the last bucket if it carries numbers."""
        self._unhook()
        self.used = [p.grad is not None for p in self.params]  # `_send` fills every `.grad`
        for bucket in self._early[self._next :]:
            self._send(bucket, [])

    def send_last(self, counts: list[float], losses: list[float]) -> None:
        """Send the last bucket, with the numbers of the step.

        Args:
            counts: Small integers, to be added up.
            losses: Each is 0 on all ranks but one.
        """
        like = self.params[self._buckets[-1].members[0]]
        self._numbers = Numbers(counts, losses, gradient_dtype(like))
        self._send(self._buckets[-1], [self._numbers.packed])

    def finish(self, name: str, limit: float) -> None:
        """Wait for all sums; afterwards every `.grad` is the sum over the ranks.

        Args:
            name: What the sums are for, in words.
            limit: Seconds that other ranks may take.
        """
        for k in self._sharded:
            p = self.params[k]
            p.grad = zero_gradient(p) if p.grad is None else placed_like(p, p.grad)
            assert p.grad is not None
            self.group.sum_(local_part(p.grad), name, limit)
        for bucket in self._buckets:
            if bucket.shares is None:
                self.group.wait(bucket.work, name, limit)
            else:
                with torch.no_grad():
                    self._hold(bucket, bucket.shares.sum(partial(self._until, name, limit)))

    def _until(self, name: str, limit: float, look: Callable[[], Any]) -> Any:
        return self.group.until(look, name, limit)

    def numbers(self) -> tuple[list[float], Tensor]:
        """Return the sums of the arguments of `send_last`, after `finish`."""
        assert self._numbers is not None
        return self._numbers.unpacked(self._buckets[-1].flat)

    def deliver(self, used: Sequence[bool]) -> None:
        """Add the sums to the previous `.grad`.

        Args:
            used: Whether any task, on any rank, depends on the parameter; the others keep the
                `.grad` they had.
        """
        with torch.no_grad():
            for p, before, is_used in zip(self.params, self.before, used):
                if not is_used:
                    p.grad = before
                elif before is not None and p.grad is not None:
                    p.grad = added(before, p.grad)

    def abandon(self) -> None:
        """Put every `.grad` back."""
        self._unhook()
        for p, before in zip(self.params, self.before):
            p.grad = before

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._may_send = bool  # a bound method of the owner would be a cycle, which only gc frees


def _is_own(g: Tensor, in_hook: bool) -> bool:
    """Return whether a gradient can be replaced by its sum in its own memory."""
    is_plain = g.layout == torch.strided and g.is_contiguous() and not (g.is_conj() or g.is_neg())
    return is_plain and holds_alone(g, in_hook=in_hook)


class Numbers:
    """Counts and losses of a step as a vector of a bucket's dtype whose sum is exact.

    In float32 the 64 bits of a loss travel as four integers of 16 bits.
    """

    def __init__(self, counts: list[float], losses: list[float], dtype: torch.dtype) -> None:
        self._sizes = len(counts), len(losses)
        m = len(losses)
        if dtype != torch.float64:
            losses = list(struct.unpack(f"<{4 * m}H", struct.pack(f"<{m}d", *losses)))
        self.packed = torch.tensor(counts + losses, dtype=dtype)

    @staticmethod
    def fit(p: Tensor) -> bool:
        """Return whether the bucket of a parameter can hold counts and losses exactly."""
        return p.is_cpu and gradient_dtype(p) in (torch.float32, torch.float64)

    def unpacked(self, flat: Tensor) -> tuple[list[float], Tensor]:
        """Return counts and losses, in float64, from the end of the summed bucket."""
        n, m = self._sizes
        row = flat[flat.numel() - self.packed.numel() :].tolist()
        counts, losses = row[:n], row[n:]
        if flat.dtype != torch.float64:
            digits = struct.pack(f"<{4 * m}H", *map(int, losses))
            losses = list(struct.unpack(f"<{m}d", digits))
        return counts, torch.tensor(losses, dtype=torch.float64)
