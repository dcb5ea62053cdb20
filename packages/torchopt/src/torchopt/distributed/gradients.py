# SPDX-License-Identifier: Apache-2.0
"""The gradients of one step, summed over the ranks in one of three ways.

| class | used for | how gradients are sent |
|---|---|---|
| `_Whole` | one process, or gradients that fit into a packet | with the losses |
| `_Bucketed` | larger gradients | bucket by bucket, while the last backward pass still runs |
| `_Ordered` | `deterministic=True` | as the nodes of a sum in a fixed order |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.distributed import sparse
from torchopt.distributed.before import unchanged
from torchopt.distributed.buckets import (
    BucketedSum,
    dense_gradient,
    placed_like,
    zero_gradient,
)
from torchopt.distributed.group import flat
from torchopt.distributed.ordered_sum import OrderedSum, nodes_of
from torchopt.distributed.packet import DifferenceError, Packet
from torchopt.distributed.signature import gradient_dtype, local_part
from torchopt.torch_internals import backward_into

if TYPE_CHECKING:
    from torchopt.distributed.step import Step

__all__ = ["Gradients", "gradients_of", "is_small"]

Changes = list["Tensor | None"]


def gradients_of(step: Step) -> Gradients:
    """Return the object that adds up the gradients of a step."""
    if step.engine.deterministic:
        return _Ordered(step)
    is_small = step.group.size == 1 or step.form.is_small
    return _Whole(step) if is_small else _Bucketed(step)


def is_small(params: Sequence[Tensor], limit: int) -> bool:
    """Return whether gradients of at most `limit` bytes fit into a packet."""
    room, size = Packet.room - 2, 0
    for p in params:
        room -= p.numel()
        size += p.numel() * p.element_size()
        if (
            room < 0
            or size > limit
            or p.device.type != "cpu"
            or not p.is_floating_point()
            or hasattr(p, "to_local")
        ):
            return False
    return True


class Gradients:
    """The gradients of one step.

    Attributes:
        used: Whether a task of this process depends on the parameter.
        sparse: Positions of parameters whose gradients are sparse, which are sent separately.
        early_bytes: Bytes that were sent before the last backward pass ended.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.params = step.params
        self.used = [False] * len(step.params)
        self.sparse = step.form.sparse
        self.early_bytes = 0
        self._starts: dict[Any, Tensor] = {}

    def add(self, i: int, loss: Tensor, weight: float, is_last: Callable[[], bool]) -> None:
        """Differentiate the loss of task `i`, or of several tasks from `i` on.

        Args:
            i: Number of the task.
            loss: 0-dim.
            weight: The weight of the loss.
            is_last: Returns whether these are the last tasks of this rank; called once.
        """
        raise NotImplementedError

    def send(self) -> None:
        """Send everything that does not travel with the losses, after the last task."""

    def sums(self, counts: list[float], losses: list[float]) -> tuple[list[float], Tensor]:
        """Return the sums over the ranks of counts and losses; gradients may travel with them.

        Args:
            counts: Small integers, at least two.
            losses: Each is 0 on all ranks but one.

        Raises:
            DifferenceError: The ranks disagree.
        """
        return self._in_a_packet(counts, losses, [])[:2]

    def _in_a_packet(
        self, counts: list[float], losses: list[float], more: list[Tensor]
    ) -> tuple[list[float], Tensor, Tensor]:
        """Return the sums of counts, losses and `more`; the rest is sent separately if too long."""
        group, limit, name = self.step.group, self.step.engine.timeout, self.step.name
        size, numbers = sum(x.numel() for x in more), counts + losses
        room = len(numbers) if size + len(numbers) <= Packet.room else 2
        meaning = f"{self.step.signature.meaning} end {bool(more)}"
        row = Packet(group, meaning, numbers[:room], more).sums(name, limit)
        tail = row[room : room + size]
        row = row[:room]
        if room < len(numbers):
            rest = torch.tensor(numbers[room:], dtype=torch.float64, device=group.device)
            row = torch.cat([row, group.sum_(rest, name, limit).cpu()])
        n = len(counts)
        return row[:n].tolist(), row[n:].clone(), tail

    def flags(self) -> list[float]:
        """Return flags, 0 or 1: is a parameter used, and is a gradient of `sparse` sparse?"""
        are_sparse = [float(sparse.is_sparse(self.params[k].grad)) for k in self.sparse]
        return [*map(float, self.used), *are_sparse]

    def finish(self, counts: list[float]) -> Changes:
        """Wait for all sums; return the changes of the buffers.

        Args:
            counts: The flags, summed over the ranks.
        """
        step = self.step
        for k, is_sparse in self.all_sparse(counts).items() if step.group.size > 1 else ():
            p = self.params[k]
            p.grad = sparse.summed(step.group, p, p.grad, is_sparse, step.name, step.engine.timeout)
        return step.before.changes

    def all_sparse(self, counts: list[float]) -> dict[int, bool]:
        """Return for each used position of `sparse` whether all ranks have a sparse gradient."""
        are_sparse = zip(self.sparse, counts[len(self.params) :])
        return {k: count == counts[k] for k, count in are_sparse if counts[k] > 0}

    def deliver(self, used: Sequence[bool]) -> None:
        """Add the sums to the previous `.grad`.

        Args:
            used: Whether any task, on any rank, depends on the parameter; the others keep the
                `.grad` they had.
        """
        raise NotImplementedError

    def abandon(self) -> None:
        """Restore every `.grad`."""

    def backward(self, loss: Tensor, weight: float) -> None:
        """Add to the `.grad` of the parameters, and collect the changes of the buffers."""
        if self.step.engine.is_fsdp:
            # The graph ends in the gathered parameters, not in the shards.
            (loss * weight).backward()
        elif type(loss) is not Tensor:
            (loss * weight).backward(inputs=self.params)
        else:  # the same bits, with two operations fewer for each task
            backward_into(loss, self._start(loss, weight), self.params)
        if changes := self.step.before.take(weight):
            self.step.before.add(changes)

    def _start(self, loss: Tensor, weight: float) -> Tensor:
        """Return the weight as the gradient that a backward pass starts from."""
        key = (weight, loss.dtype, loss.device)
        if key not in self._starts:
            if len(self._starts) >= 16:
                self._starts.clear()
            self._starts[key] = torch.full_like(loss, weight)
        return self._starts[key]


class _Whole(Gradients):
    """Gradients that autograd accumulates."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None

    def add(self, i: int, loss: Tensor, weight: float, is_last: Callable[[], bool]) -> None:
        is_last()
        self.backward(loss, weight)

    def send(self) -> None:
        self.used = [p.grad is not None for p in self.params]

    def sums(self, counts: list[float], losses: list[float]) -> tuple[list[float], Tensor]:
        dense = [p for k, p in enumerate(self.params) if k not in self.sparse]
        more = [dense_gradient(p).detach().reshape(-1) for p in dense]
        counts, summed, row = self._in_a_packet(counts, losses, more)
        sums = row.split_with_sizes([p.numel() for p in dense])
        for p, x in zip(dense, sums):
            p.grad = x.view(p.shape).to(gradient_dtype(p), copy=True)
        return counts, summed

    def deliver(self, used: Sequence[bool]) -> None:
        for p, before, is_used in zip(self.params, self._before, used):
            if not is_used:
                p.grad = before
            elif before is not None and p.grad is not None:
                p.grad = sparse.added(before.detach(), p.grad.detach())

    def abandon(self) -> None:
        for p, before in zip(self.params, self._before):
            p.grad = before


class _Bucketed(Gradients):
    """Sums of gradients in any order, overlapped with the last backward pass."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        engine = step.engine
        self._is_common: bool | None = None
        slots = step.group.slots
        is_open = slots is not None and slots.is_open
        self._hello = Packet(step.group, f"{step.signature.meaning} begin", [float(is_open)])
        self.sum = BucketedSum(self.params, engine.group, step.form.fill, self._may_send)

    def _may_send(self) -> bool:
        """Return whether all ranks have the same buckets."""
        if self._is_common is None:
            try:
                row = self._hello.sums(self.step.name, self.step.engine.timeout)
                self._is_common = True
            except DifferenceError:
                self._is_common = False
            else:
                self._share(int(row[0]))
        return self._is_common

    def _share(self, count: int) -> None:
        """Use shared memory if all ranks have found it; else look for it, for the next step.

        Args:
            count: The number of ranks that have found it.
        """
        group = self.step.group
        if group.slots is None or group.messages is None:
            return
        if count == group.size:
            self.sum.share(group.slots, group.messages.number)
        else:
            group.slots.open()

    def add(self, i: int, loss: Tensor, weight: float, is_last: Callable[[], bool]) -> None:
        if is_last():
            self.sum.arm()
        self.backward(loss, weight)

    def send(self) -> None:
        if not self._may_send():
            raise DifferenceError
        self.sum.send()
        self.used, self.early_bytes = self.sum.used, self.sum.early_bytes

    def sums(self, counts: list[float], losses: list[float]) -> tuple[list[float], Tensor]:
        found = None
        if self.sum.takes_numbers:
            self.sum.send_last(counts, losses)
        else:
            found = super().sums(counts, losses)
        self.sum.finish(self.step.name, self.step.engine.timeout)
        return self.sum.numbers() if found is None else found

    def deliver(self, used: Sequence[bool]) -> None:
        self.sum.deliver(used)

    def abandon(self) -> None:
        self.sum.abandon()


class _Ordered(Gradients):
    """Sums of gradients, and of the changes of buffers, in a fixed order."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._sum: OrderedSum[list[Tensor]] = OrderedSum(step.tasks, _add)
        self._dense = [False] * len(self.params)
        self._turned: dict[int, bool] = {}

    def add(self, i: int, loss: Tensor, weight: float, is_last: Callable[[], bool]) -> None:
        is_last()
        loss = loss * weight
        before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            grads = [*torch.autograd.grad(loss, self.params, allow_unused=True)]
            # A custom backward may run a backward pass, which leaves its part in `.grad`.
            left = [p.grad for p in self.params]
        finally:
            for p, g in zip(self.params, before):
                p.grad = g
        for k, g in enumerate(grads):
            if (more := left[k]) is not None:
                grads[k] = more if g is None else sparse.added(g, more)
        for k, g in enumerate(grads):
            self.used[k] = self.used[k] or g is not None
            self._dense[k] = self._dense[k] or (g is not None and not sparse.is_sparse(g))
        changes = self.step.before.take(weight)
        values = [
            local_part(zero_gradient(p) if g is None else _filled(p, g)).detach().clone()
            for p, g in zip(self.params, grads)
        ]
        for x, change in zip(self.step.before.contents, changes):
            values.append(unchanged(x) if change is None else change)
        self._sum.put((0, i), values)

    def flags(self) -> list[float]:
        # Sparse gradients are added as dense ones, in a fixed order, and made sparse afterwards.
        are_sparse = [float(self.used[k] and not self._dense[k]) for k in self.sparse]
        return [*map(float, self.used), *are_sparse]

    def finish(self, counts: list[float]) -> Changes:
        """Exchange the remaining nodes and add them up, in the same way on every rank."""
        self._turned = self.all_sparse(counts)
        group, n = self.step.group, self.step.tasks
        if group.size > 1:
            parts = [
                nodes_of([i for i, owner in enumerate(self.step.owners) if owner == rank], n)
                for rank in range(group.size)
            ]
            total: OrderedSum[list[Tensor]] = OrderedSum(n, _add)
            for node, values in self._gathered(parts):
                total.put(node, values)
            self._sum = total
        self._total = self._sum.total()
        return list(self._total[len(self.params) :])

    def _gathered(self, parts: list[list[Any]]) -> list[tuple[Any, list[Tensor]]]:
        """Return the nodes of all ranks with their values."""
        group = self.step.group
        own = [self._sum.nodes[node] for node in parts[group.rank]]
        form = [local_part(p).detach().to(gradient_dtype(p)) for p in self.params]
        for x in self.step.before.contents:
            counts = not (x.is_floating_point() or x.is_complex())
            form.append(x.long() if counts else x)
        kinds: dict[Any, list[int]] = {}
        for k, x in enumerate(form):
            kinds.setdefault((x.dtype, x.device), []).append(k)
        rows = max(map(len, parts))
        found = [[(node, [torch.empty(0)] * len(form)) for node in part] for part in parts]
        for members in kinds.values():
            sizes = [form[k].numel() for k in members]
            table = form[members[0]].new_zeros((rows, sum(sizes)))
            for row, value in zip(table, own):
                row.copy_(flat([value[k] for k in members]))
            everyone = group.gather(table, self.step.name)
            for rank, part in enumerate(found):
                for r, (_, values) in enumerate(part):
                    for k, x in zip(members, everyone[rank, r].split(sizes)):
                        values[k] = x.view(form[k].shape)
        return [node for part in found for node in part]

    def deliver(self, used: Sequence[bool]) -> None:
        with torch.no_grad():
            for k, (p, g, is_used) in enumerate(zip(self.params, self._total, used)):
                if not is_used:
                    continue
                g = g.to_sparse(1) if self._turned.get(k) else _like(p, g.clone())
                p.grad = g if p.grad is None else sparse.added(p.grad, g)


def _filled(p: Tensor, g: Tensor) -> Tensor:
    if hasattr(p, "to_local"):
        whole: Tensor = placed_like(p, g)
        return whole
    return g.to_dense() if g.is_sparse else g


def _add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right)]


def _like(p: Tensor, local: Tensor) -> Tensor:
    """Return a local part as a tensor like `p`."""
    if not hasattr(p, "to_local"):
        return local
    sharded: Any = p
    made: Tensor = type(sharded).from_local(
        local, sharded.device_mesh, sharded.placements, shape=p.shape, stride=p.stride()
    )
    return made
