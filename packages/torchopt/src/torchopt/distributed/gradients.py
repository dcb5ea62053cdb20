# SPDX-License-Identifier: Apache-2.0
"""The gradients of one step, in one of three ways.

| way | when | sent |
|---|---|---|
| `_Whole` | one process, or gradients that fit into a packet | with the losses |
| `_Bucketed` | others | bucket by bucket, while the last backward pass still runs |
| `_Ordered` | `deterministic=True` | the nodes of a sum in an order of its own |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.distributed.buckets import BucketedSum
from torchopt.distributed.group import DifferenceError, Packet, flat
from torchopt.distributed.ordered_sum import OrderedSum, nodes_of
from torchopt.distributed.signature import local_part

if TYPE_CHECKING:
    from torchopt.distributed.step import Step

__all__ = ["Gradients", "gradients_of"]

Changes = list["Tensor | None"]


def gradients_of(step: Step) -> Gradients:
    """Return how a step adds up its gradients."""
    if step.engine.deterministic:
        return _Ordered(step)
    return _Whole(step) if step.group.size == 1 or _is_small(step) else _Bucketed(step)


def _is_small(step: Step) -> bool:
    room = Packet.room - 2 - 2 * step.tasks - len(step.params)
    size = 0
    for p in step.params:
        room -= p.numel()
        size += p.numel() * p.element_size()
        if (
            room < 0
            or size > step.engine.bucket_bytes
            or not p.is_floating_point()
            or hasattr(p, "to_local")
        ):
            return False
    return step.group.device.type == "cpu"


class Gradients:
    """The gradients of one step.

    Attributes:
        used: Whether a task of this process depends on the parameter.
        early_bytes: What was on its way before the last backward pass ended.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.params = step.params
        self.used = [False] * len(step.params)
        self.early_bytes = 0

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        """Differentiate the loss of task `i`.

        Args:
            i: Number of the task.
            loss: 0-dim.
            is_last: Whether it is the last one here, asked once.
        """
        raise NotImplementedError

    def send(self) -> None:
        """Send what does not go with the losses, after the last task."""

    def tail(self, room: int) -> Tensor | None:
        """Return the gradients as numbers that go with the losses; None: they are sent apart."""
        del room
        return None

    def take_tail(self, sums: Tensor) -> None:
        """Take the sums over the ranks of what `tail` has returned."""

    def finish(self) -> Changes:
        """Wait for all sums; return the changes of the buffers."""
        return self.step.before.changes

    def deliver(self, used: Sequence[bool]) -> None:
        """Leave the sums in `.grad`, added to what was there.

        Args:
            used: Whether any task, on any rank, depends on the parameter; the others keep the
                `.grad` they had.
        """
        raise NotImplementedError

    def abandon(self) -> None:
        """Put every `.grad` back."""

    def backward(self, i: int, loss: Tensor) -> None:
        """Add to the `.grad` of the parameters, and collect the changes of the buffers."""
        # Under `fully_shard` the graph ends in the gathered parameters, not in the shards.
        inputs = None if self.step.engine.is_fsdp else self.params
        (loss * self.step.weights[i]).backward(inputs=inputs)
        if changes := self.step.before.take(self.step.weights[i]):
            self.step.before.add(changes)


class _Whole(Gradients):
    """Gradients that autograd adds up by itself."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        is_last()
        self.backward(i, loss)

    def send(self) -> None:
        self.used = [p.grad is not None for p in self.params]

    def tail(self, room: int) -> Tensor | None:
        parts = [
            (torch.zeros_like(p) if (g := p.grad) is None else g.to_dense() if g.is_sparse else g)
            for p in self.params
        ]
        numbers = torch.cat([x.detach().reshape(-1).double() for x in parts])
        assert len(numbers) <= room
        return numbers

    def take_tail(self, sums: Tensor) -> None:
        with torch.no_grad():
            for p, x in zip(self.params, sums.split([p.numel() for p in self.params])):
                p.grad = x.view(p.shape).to(p.dtype, copy=True)

    def finish(self) -> Changes:
        if self.step.group.size == 1:
            self.send()
        return self.step.before.changes

    def deliver(self, used: Sequence[bool]) -> None:
        with torch.no_grad():
            for p, before, is_used in zip(self.params, self._before, used):
                if not is_used:
                    p.grad = before
                elif before is not None and p.grad is not None:
                    p.grad = before + p.grad

    def abandon(self) -> None:
        for p, before in zip(self.params, self._before):
            p.grad = before


class _Bucketed(Gradients):
    """Sums of gradients in any order, overlapped with the last backward pass."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        engine = step.engine
        self._differs = False
        self._hello = Packet(step.group, f"{step.signature.meaning} begin")
        self.sum = BucketedSum(self.params, engine.group, engine.bucket_bytes, self._may_send)

    def _may_send(self) -> bool:
        """Return whether all ranks have the same buckets."""
        try:
            self._hello.sums(self.step.name, self.step.engine.timeout)
        except DifferenceError:
            self._differs = True
        return not self._differs

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        if is_last():
            self.sum.arm()
        self.backward(i, loss)

    def send(self) -> None:
        if not self._may_send():
            raise DifferenceError
        self.sum.send()
        self.used, self.early_bytes = self.sum.used, self.sum.early_bytes

    def finish(self) -> Changes:
        self.sum.finish(self.step.name, self.step.engine.timeout)
        return self.step.before.changes

    def deliver(self, used: Sequence[bool]) -> None:
        self.sum.deliver(used)

    def abandon(self) -> None:
        self.sum.abandon()


class _Ordered(Gradients):
    """Sums of gradients, and of the changes of buffers, in an order of their own."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._sum: OrderedSum[list[Tensor]] = OrderedSum(step.tasks, _add)
        self._changed = False

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        is_last()
        loss = loss * self.step.weights[i]
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        for k, g in enumerate(grads):
            self.used[k] = self.used[k] or g is not None
        changes = self.step.before.take(self.step.weights[i])
        values = [
            local_part(torch.zeros_like(p) if g is None else g).detach().clone()
            for p, g in zip(self.params, grads)
        ]
        for x, change in zip(self.step.before.contents, changes):
            counts = not (x.is_floating_point() or x.is_complex())
            zero = torch.zeros_like(x, dtype=torch.int64 if counts else x.dtype)
            values.append(zero if change is None else change)
        self._sum.put((0, i), values)

    def finish(self) -> Changes:
        """Exchange the nodes that are left and add them up, in the same way on every rank."""
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
        form = [local_part(p).detach() for p in self.params]
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
            for p, g, is_used in zip(self.params, self._total, used):
                if not is_used:
                    continue
                if p.grad is None:
                    p.grad = _like(p, g.clone())
                else:
                    p.grad = p.grad + _like(p, g)


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
