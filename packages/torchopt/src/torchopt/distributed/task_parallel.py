# SPDX-License-Identifier: Apache-2.0
"""The gradient of a mean over tasks, computed by all ranks together, the same at any number.

Every rank holds the meta-parameters theta and runs the same program. The gradient of

    L(theta) = sum_i w_i L_i(theta),    sum_i w_i = 1,

is a sum over tasks, so that the ranks differentiate different tasks and add up. How a task is
differentiated is its own affair: through the steps of an inner loop, by the implicit function
theorem, or from function values.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.zero_order.directions import member_seed, seeded
from torchopt.distributed.buckets import BucketedSum, local_part
from torchopt.distributed.group import Group, flat, share_of
from torchopt.distributed.ordered_sum import OrderedSum, nodes_of
from torchopt.distributed.raised import Raised
from torchopt.distributed.session import DEFAULT_TIMEOUT
from torchopt.distributed.wire import digest
from torchopt.errors import NotDifferentiableError
from torchopt.tree import tree_leaves

__all__ = ["MetaStep", "TaskParallel"]

_REPLICA_CHECK = 100  # steps between two comparisons of the parameters


@dataclass(frozen=True)
class MetaStep:
    """What came out of one step, the same on every rank but for the times.

    Attributes:
        loss: sum_i w_i L_i, 0-dim, float64, without a graph.
        losses: `[tasks]`, the L_i, float64.
        owners: The rank that computed each task.
        compute_seconds: This rank's own tasks, forward and backward.
        transfer_seconds: Waiting for sums after the own tasks were done, for slower ranks too.
        total_seconds: Of the whole step.
        bytes_sent: By this rank.
        early_bytes: Of gradients that were on their way before the last backward pass ended.
    """

    loss: Tensor
    losses: Tensor
    owners: tuple[int, ...]
    compute_seconds: float
    transfer_seconds: float
    total_seconds: float
    bytes_sent: int
    early_bytes: int

    @property
    def overhead_seconds(self) -> float:
        """What is neither computing nor waiting: drawing tasks, filling buckets."""
        return self.total_seconds - self.compute_seconds - self.transfer_seconds


class TaskParallel:
    """Differentiates a mean over tasks with respect to meta-parameters held by every rank.

    Construct it on every rank, with the same arguments. Then each step is

        step = engine.backward(task_loss, tasks)   # adds to .grad, on every rank the same
        optimizer.step()                           # on every rank

    In a world of one process it does the same without any communication.

    Gradients do not depend on the number of ranks, but for the rounding of sums: 1e-12 relative in
    float64. With `deterministic=True` they do not depend on it at all, bit for bit, as long as
    every process uses as many threads as the others (`torch.set_num_threads`).

    Args:
        params: A module, or a tree of leaf tensors that require gradients. Of a module in
            `DistributedDataParallel` the parameters are taken, and its own reduction is switched
            off during a step. Parameters that are DTensors (`distribute_tensor`, `fully_shard`)
            are summed shard by shard over `group`, which must not be the group that shards them;
            under `fully_shard` torch gives first derivatives only, so that an inner loop cannot be
            differentiated through such a module.
        schedule: `"static"`: each rank takes neighbouring tasks, as many as the others or one more.
            `"dynamic"`: each rank takes the next task from a counter that all share, for tasks of
            different cost.
        deterministic: Add the gradients of tasks in an order of their own. Costs the gradients of
            about log2(tasks) tasks in memory and on the wire, and nothing overlaps.
        bucket_bytes: Gradients that are sent together, in bytes; > 0.
        timeout: Seconds that one task may take; a process that is stuck longer is ended.
        seed: Of torch's generators in each task: a task draws the same numbers on whatever rank.
            None: the generators are left alone.
        group: A process group of torch.distributed; None: the world.
        sync: Start from the values of rank 0 everywhere.

    Raises:
        ValueError: There is nothing to differentiate, or an unknown schedule.
        RuntimeError: The world was opened for remote calls.

    Example:
        >>> theta = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        >>> engine = TaskParallel([theta])
        >>> targets = [0.0, 1.0, 2.0]
        >>> step = engine.backward(lambda t: ((theta - t) ** 2).sum(), targets)
        >>> theta.grad  # 2 (theta - mean of the targets)
        tensor([ 0., -4.], dtype=torch.float64)
        >>> step.losses
        tensor([ 2.,  4., 10.], dtype=torch.float64)
    """

    _made = 0  # every rank makes its engines in the same order

    def __init__(
        self,
        params: Any,
        *,
        schedule: str = "static",
        deterministic: bool = False,
        bucket_bytes: int = 4 * 2**20,
        timeout: float = DEFAULT_TIMEOUT,
        seed: int | None = 0,
        group: Any = None,
        sync: bool = True,
    ) -> None:
        if schedule not in ("static", "dynamic"):
            raise ValueError(f"`schedule`: expected 'static' or 'dynamic', got {schedule!r}.")
        if bucket_bytes < 1 or not timeout > 0:
            raise ValueError(
                "`bucket_bytes` and `timeout`: expected positive numbers, got "
                f"{bucket_bytes} and {timeout}."
            )
        self.group = Group(group)
        self.schedule = schedule
        self.deterministic = deterministic
        self.bucket_bytes = bucket_bytes
        self.timeout = timeout
        self.seed = seed
        self.steps = 0
        self._modules = [x for x in tree_leaves(params) if isinstance(x, nn.Module)]
        self.params = _leaves(params)
        self._fsdp = any(_is_fsdp(part) for module in self._modules for part in module.modules())
        if self._fsdp and deterministic:
            raise ValueError(
                "`deterministic`: expected parameters that are not under `fully_shard`, which only "
                "gives sums of gradients; use DTensors (`distribute_tensor`) or the default"
            )
        self._name = f"tasks/{TaskParallel._made}"
        TaskParallel._made += 1
        if sync:
            self._sync()

    @torch.no_grad()
    def _sync(self) -> None:
        tensors = list(self.params)
        for module in self._modules:
            tensors += [b for b in module.buffers() if b is not None]
        for x in tensors:
            self.group.broadcast_(local_part(x.detach()))

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint needs: the number of steps, which names their random numbers."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.steps = int(state["steps"])

    def backward(
        self,
        task_loss: Callable[[Any], Tensor],
        tasks: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
    ) -> MetaStep:
        """Add the gradient of the weighted mean of the losses to the `.grad` of the parameters.

        Args:
            task_loss: From a task to its loss, 0-dim, as a function of the parameters. Called for
                this rank's tasks only.
            tasks: The same number on every rank; only this rank's entries are looked at.
            weights: > 0, of each task, any scale; None: all alike.

        Returns:
            Losses of all tasks, times and bytes.

        Raises:
            ValueError: There is no task, or another number of weights.
            WorkerError: A task raised, on any rank: raised on every rank, and `.grad` is as before.
                Or a rank is lost or stuck: the world is broken then.
            RuntimeError: The parameters differ between ranks.
        """
        if len(tasks) == 0 or (weights is not None and len(weights) != len(tasks)):
            raise ValueError(
                "expected at least one task and a weight for each, got "
                f"{len(tasks)} tasks and {'no' if weights is None else len(weights)} weights"
            )
        self._check_replicas()
        return _Step(self, task_loss, tasks, weights).run()

    def _check_replicas(self) -> None:
        first = self.steps == 1 or self.steps % _REPLICA_CHECK == 0
        if self.group.size == 1 or not first:
            return
        own = b"".join(digest(local_part(p.detach()).cpu()) for p in self.params)
        others = self.group.gather_objects((own, self.steps))
        differing = [rank for rank, other in enumerate(others) if other != others[0]]
        if differing:
            raise RuntimeError(
                f"expected the same parameters and steps on every rank, those of ranks {differing} "
                "differ from rank 0; every rank has to start from the same values and to take the "
                "same optimizer steps"
            )


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a large import; without it there is none
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _leaves(params: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for leaf in tree_leaves(params):
        tensors = list(leaf.parameters()) if isinstance(leaf, nn.Module) else [leaf]
        for x in tensors:
            if not isinstance(x, Tensor) or not x.requires_grad:
                continue
            if not x.is_leaf:
                raise ValueError(
                    "`params`: expected leaf tensors, got one that was computed from others "
                    f"({x.grad_fn}); pass the tensors that it was computed from."
                )
            found[id(x)] = x
    if not found:
        raise ValueError("`params`: expected tensors that require gradients, found none.")
    return list(found.values())


class _Step:
    """One step of a `TaskParallel`."""

    def __init__(
        self,
        engine: TaskParallel,
        task_loss: Callable[[Any], Tensor],
        tasks: Sequence[Any],
        weights: Sequence[float] | None,
    ) -> None:
        self.engine = engine
        self.group = engine.group
        self.task_loss = task_loss
        self.tasks = tasks
        n = len(tasks)
        self.weights = [1.0] * n if weights is None else [float(w) for w in weights]
        total = sum(self.weights)
        self.weights = [w / total for w in self.weights]
        self.counter = f"{engine._name}/{engine.steps}"
        # One row of numbers that all ranks add up: losses, owners, used parameters, errors.
        self.losses = torch.zeros(n, dtype=torch.float64)
        self.owners = torch.zeros(n, dtype=torch.float64)
        self.used = torch.zeros(len(engine.params), dtype=torch.float64)
        self.error: Raised | None = None
        self.compute = 0.0
        self.waited = 0.0

    def run(self) -> MetaStep:
        started = time.perf_counter()
        sent = self.group.bytes_sent
        engine = self.engine
        gradients = _Ordered(self) if engine.deterministic else _Bucketed(self)
        try:
            with contextlib.ExitStack() as stack:
                for module in engine._modules:
                    for part in module.modules():
                        if isinstance(part, nn.parallel.DistributedDataParallel):
                            stack.enter_context(part.no_sync())
                self._run_tasks(gradients)
            waiting = time.perf_counter()
            self._exchange(gradients)
            self.waited = time.perf_counter() - waiting
            gradients.deliver([bool(x) for x in self.used > 0])
        except BaseException:
            gradients.abandon()
            raise
        if engine.schedule == "dynamic":
            self.group.discard(self.counter)
        engine.steps += 1
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return MetaStep(
            (weights * self.losses).sum(),
            self.losses,
            tuple(int(x) - 1 for x in self.owners),
            self.compute,
            self.waited,
            time.perf_counter() - started,
            self.group.bytes_sent - sent,
            gradients.early_bytes,
        )

    def _exchange(self, gradients: Any) -> None:
        gradients.before_summary()
        row = torch.cat(
            [self.losses, self.owners, self.used, torch.tensor([float(self.error is not None)])]
        ).to(self.group.device)
        row = self.group.sum_(row).cpu()
        n, m = len(self.tasks), len(self.used)
        self.losses, self.owners, self.used, errors = row.split([n, n, m, 1])
        if errors.item():
            for error in self.group.gather_objects(self.error):
                if error is not None:
                    raise error.as_error()
        gradients.after_summary()

    def _run_tasks(self, gradients: Any) -> None:
        for i, is_last in self._own():
            name = f"task {i + 1} of {len(self.tasks)}"
            started = time.perf_counter()
            try:
                with self.group.task(name, self.engine.timeout), self._random(i):
                    loss = self._loss(i)
                    gradients.add(i, loss * self.weights[i], is_last)
                self.losses[i] = loss.detach().double().cpu()
                self.owners[i] = self.group.rank + 1
            except Exception as error:
                if self.group.size == 1:
                    raise
                self.error = Raised(error, self.group.rank, name)
                return  # the others learn of it at the end of the step
            finally:
                self.compute += time.perf_counter() - started

    def _own(self) -> Iterator[tuple[int, Callable[[], bool]]]:
        """Yield the numbers of this rank's tasks, and whether each is the last one."""
        n = len(self.tasks)
        if self.engine.schedule == "static" or self.group.size == 1:
            mine = share_of(n, self.group.rank, self.group.size)
            for i in mine:
                yield i, lambda i=i: i == mine[-1]  # type: ignore[misc]
            return
        following = self.group.draw(self.counter)
        while following < n:
            i = following
            drawn: list[int] = []

            def is_last(drawn: list[int] = drawn) -> bool:
                # Asked between forward and backward, so that no rank holds a task for long.
                drawn.append(self.group.draw(self.counter))
                return drawn[0] >= n

            yield i, is_last
            following = drawn[0] if drawn else self.group.draw(self.counter)

    @contextlib.contextmanager
    def _random(self, i: int) -> Iterator[None]:
        seed = self.engine.seed
        if seed is None:
            yield
            return
        with seeded(member_seed(member_seed(seed, self.engine.steps), i), self.engine.params):
            yield

    def _loss(self, i: int) -> Tensor:
        loss = self.task_loss(self.tasks[i])
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"`task_loss`: expected a 0-dim tensor, got {got}.")
        if not loss.requires_grad:
            raise NotDifferentiableError(
                f"`task_loss`: the loss of task {i + 1} depends on no parameter."
            )
        return loss


class _Bucketed:
    """Sums of gradients in any order, overlapped with the last backward pass."""

    def __init__(self, step: _Step) -> None:
        self.step = step
        engine = step.engine
        self.sum = BucketedSum(engine.params, engine.group, engine.bucket_bytes)

    @property
    def early_bytes(self) -> int:
        return self.sum.early_bytes

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        if is_last() and self.step.group.size > 1:
            self.sum.arm()
        engine = self.step.engine
        # Under `fully_shard` the graph ends in the gathered parameters, not in the shards.
        loss.backward(inputs=None if engine._fsdp else engine.params)

    def before_summary(self) -> None:
        self.sum.finish()
        self.step.used.copy_(torch.tensor(self.sum.used))

    def after_summary(self) -> None:
        pass

    def deliver(self, used: Sequence[bool]) -> None:
        self.sum.deliver(used)

    def abandon(self) -> None:
        self.sum.abandon()


class _Ordered:
    """Sums of gradients in an order of their own."""

    early_bytes = 0

    def __init__(self, step: _Step) -> None:
        self.step = step
        self.params = step.engine.params
        self.sum: OrderedSum[list[Tensor]] = OrderedSum(len(step.tasks), _add)

    def add(self, i: int, loss: Tensor, is_last: Callable[[], bool]) -> None:
        del is_last
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        for k, g in enumerate(grads):
            if g is not None:
                self.step.used[k] = 1.0
        self.sum.put(
            (0, i),
            [
                local_part(torch.zeros_like(p) if g is None else g).clone()
                for p, g in zip(self.params, grads)
            ],
        )

    def before_summary(self) -> None:
        pass

    def after_summary(self) -> None:
        """Exchange the nodes that are left and add them up, in the same way on every rank."""
        group, n = self.step.group, len(self.step.tasks)
        if group.size == 1:
            return
        owners = [int(x) - 1 for x in self.step.owners]
        nodes = [
            nodes_of([i for i, owner in enumerate(owners) if owner == rank], n)
            for rank in range(group.size)
        ]
        rows = max(map(len, nodes))
        total: OrderedSum[list[Tensor]] = OrderedSum(n, _add)
        own = [self.sum.nodes[node] for node in nodes[group.rank]]
        kinds: dict[Any, list[int]] = {}
        shapes = [local_part(p) for p in self.params]
        for k, x in enumerate(shapes):
            kinds.setdefault((x.dtype, x.device), []).append(k)
        parts: dict[tuple[int, int], dict[int, Tensor]] = {}
        for members in kinds.values():
            sizes = [shapes[k].numel() for k in members]
            table = shapes[members[0]].new_zeros((rows, sum(sizes)), requires_grad=False)
            for row, value in zip(table, own):
                row.copy_(flat([value[k] for k in members]))
            everyone = group.gather(table)
            for rank, part in enumerate(nodes):
                for r in range(len(part)):
                    split = everyone[rank, r].split(sizes)
                    parts.setdefault((rank, r), {}).update(
                        {k: x.view(shapes[k].shape) for k, x in zip(members, split)}
                    )
        for rank, part in enumerate(nodes):
            for r, node in enumerate(part):
                total.put(node, [parts[rank, r][k] for k in range(len(shapes))])
        self.sum = total

    def deliver(self, used: Sequence[bool]) -> None:
        with torch.no_grad():
            for p, g, is_used in zip(self.params, self.sum.total(), used):
                if not is_used:
                    continue
                if p.grad is None:
                    p.grad = _like(p, g.clone())
                else:
                    p.grad = p.grad + _like(p, g)

    def abandon(self) -> None:
        pass


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
