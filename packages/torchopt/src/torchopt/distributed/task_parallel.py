# SPDX-License-Identifier: Apache-2.0
"""The gradient of a mean over tasks, computed by all ranks together, the same at any number.

Every rank holds the meta-parameters theta and runs the same program. The gradient of

    L(theta) = sum_i w_i L_i(theta),    sum_i w_i = 1,

is a sum over tasks, so the ranks differentiate different tasks and add up. How a task is
differentiated is its own affair: through the steps of an inner loop, by the implicit function
theorem, or from function values.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchopt.distributed.arguments import checked_weights
from torchopt.distributed.before import parts_of
from torchopt.distributed.buckets import filled
from torchopt.distributed.contents import Contents
from torchopt.distributed.gradients import is_small
from torchopt.distributed.group import Group
from torchopt.distributed.session import DEFAULT_TIMEOUT
from torchopt.distributed.signature import agree, kinds_of, local_part, refuse
from torchopt.distributed.sparse import sparse_positions
from torchopt.distributed.step import MetaStep, Step
from torchopt.errors import NotDifferentiableError  # noqa: F401 - imported from here before
from torchopt.params.sharded import gather_in_graph
from torchopt.tree import tree_leaves

__all__ = ["MetaStep", "TaskParallel"]


@dataclass(frozen=True)
class _Form:
    params: list[Tensor]
    code: int  # the same on every rank if shapes and dtypes are
    is_small: bool
    sparse: list[int]
    fill: list[list[int]]


class TaskParallel:
    """Differentiates a mean over tasks with respect to meta-parameters held by every rank.

    Construct it on every rank, with the same arguments. Then each step is

        step = engine.backward(task_loss, tasks)   # adds to .grad, on every rank the same
        optimizer.step()                           # on every rank

    In a world of one process it does the same without any communication.

    A task is a function of the parameters as they are at the beginning of a step: what it writes
    into them, exchanges or freezes is undone when it ends, at the cost of a copy of the parameters
    (of frozen ones, if they have at most 64 MiB; to larger ones it may not write). It finds no
    `.grad`, and leaves none.

    Gradients do not depend on the number of ranks, but for the rounding of sums: 1e-12 relative in
    float64. With `deterministic=True` they do not depend on it at all, bit for bit, as long as
    every process uses as many threads as the others (`torch.set_num_threads`).

    Args:
        params: A module, or a tree of leaf tensors that require gradients. Of a module in
            `DistributedDataParallel` the parameters are taken, and its own reduction is switched
            off during a step. Parameters that are DTensors (`distribute_tensor`, `fully_shard`)
            are summed shard by shard over `group`, which must not be the group that shards them.
            Meta-optimizers in a task gather the shards of `fully_shard` as part of the graph.
        schedule: `"static"`: each rank takes neighbouring tasks, as many as the others or one more.
            `"dynamic"`: each rank takes the next task from a counter that all share, for tasks of
            different cost.
        deterministic: Add the gradients of tasks in an order of their own. Costs the gradients of
            about log2(tasks) tasks in memory and on the wire, and nothing overlaps.
        bucket_bytes: Gradients that are sent together, in bytes; > 0.
        timeout: Seconds that one task may take, or those that are taken together; a process that is
            stuck longer is ended.
        seed: Of torch's generators in each task: a task draws the same numbers on whatever rank.
            None: the generators are left alone.
        tasks_at_once: Of the tasks of a rank, how many `torch.func.vmap` takes together; 1: a loop;
            None: all of them. Tasks are then trees of tensors that are alike, and `task_loss` is
            called once for all of them, draws no random numbers and writes into no buffer. Its
            inner loops are `torchopt.inner_loop` or by `torch.func.grad`, not meta-optimizers.
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

    # The ranks of a group make their engines in the same order.
    _made: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        params: Any,
        *,
        schedule: str = "static",
        deterministic: bool = False,
        bucket_bytes: int = 4 * 2**20,
        timeout: float = DEFAULT_TIMEOUT,
        seed: int | None = 0,
        tasks_at_once: int | None = 1,
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
        if tasks_at_once is not None and not isinstance(tasks_at_once, int):
            kind = type(tasks_at_once).__name__
            raise TypeError(f"`tasks_at_once`: expected an int or None, for all, got {kind}.")
        if tasks_at_once is not None and tasks_at_once < 1:
            raise ValueError(f"`tasks_at_once`: expected None or >= 1, got {tasks_at_once}.")
        if deterministic and tasks_at_once != 1:
            raise ValueError(
                "`tasks_at_once`: expected 1 with deterministic=True, got "
                f"{tasks_at_once}; the bits of a gradient by vmap depend on how many there are."
            )
        self.group = Group(group, timeout)
        self.schedule = schedule
        self.deterministic = deterministic
        self.bucket_bytes = bucket_bytes
        self.timeout = timeout
        self.seed = seed
        self.tasks_at_once = tasks_at_once
        self.steps = 0
        self.attempts = 0
        self.contents = Contents()
        self._held = tree_leaves(params)
        self._form = _Form([], 0, is_small=False, sparse=[], fill=[])
        self.modules = [x for x in self._held if isinstance(x, nn.Module)]
        self.reducers = [
            part
            for module in self.modules
            for part in module.modules()
            if isinstance(part, nn.parallel.DistributedDataParallel)
        ]
        self.is_fsdp = any(_is_fsdp(part) for module in self.modules for part in module.modules())
        if not self.params:
            raise ValueError("`params`: expected tensors that require gradients, found none.")
        if schedule == "dynamic" and any(hasattr(p, "to_local") for p in self.params):
            raise ValueError(
                "`schedule`: expected 'static' with sharded parameters, got 'dynamic'; the ranks "
                "that hold the shards of one copy have to run the same tasks"
            )
        if deterministic:
            for module in self.modules:
                gather_in_graph(module)
        if sync:
            self._sync()
        self.number = TaskParallel._made.get(self.group.name, 0)
        TaskParallel._made[self.group.name] = self.number + 1

    @property
    def params(self) -> list[Tensor]:
        """What is differentiated: the leaves that require gradients now."""
        found: dict[int, Tensor] = {}
        for leaf in self._held:
            for x in _leaves_of(leaf):
                if not isinstance(x, Tensor) or not x.requires_grad:
                    continue
                if isinstance(x, nn.UninitializedParameter):
                    raise ValueError(
                        "`params`: expected parameters with a shape, got one of a lazy module; "
                        "call the module once, on every rank, before it is given to TaskParallel."
                    )
                if not x.is_leaf:
                    raise ValueError(
                        "`params`: expected leaf tensors, got one that was computed from others "
                        f"({x.grad_fn}); pass the tensors that it was computed from."
                    )
                found[id(x)] = x
        return list(found.values())

    def form_of(self, params: list[Tensor]) -> _Form:
        """Return what follows from shapes and dtypes of parameters."""
        known = self._form.params
        if len(known) != len(params) or any(a is not b for a, b in zip(known, params)):
            code = zlib.crc32(repr([(tuple(p.shape), p.dtype) for p in params]).encode())
            small = self.group.device.type == "cpu" and is_small(params, self.bucket_bytes)
            sparse = sparse_positions(self.modules, params)
            fill = filled(params, self.bucket_bytes, sparse)
            self._form = _Form(params, code, small, sparse, fill)
        return self._form

    @torch.no_grad()
    def _sync(self) -> None:
        if self.group.size == 1:
            return
        tensors = self.params
        for module in self.modules:
            tensors += [b for b in module.buffers() if b is not None]
        with self.group.turn():
            agree(self.group, "the start of TaskParallel", {"tensors": kinds_of(tensors)})
            for x in tensors:
                self.group.broadcast_(local_part(x.detach()), "the start of TaskParallel")

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint needs: the number of steps, which seeds their random numbers."""
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
            tasks: A sequence, with the same number on every rank; only this rank's entries are
                looked at.
            weights: >= 0, of each task, any scale; None: all alike.

        Returns:
            Losses of all tasks, times and bytes.

        Raises:
            ValueError: There is no task, or weights are not numbers >= 0, one for each task.
            TypeError: The tasks are not a sequence. Or a task has written to parameters through
                `.data` or to large frozen ones, or has left a `.grad` behind: with several
                processes a `WorkerError`, too.
            NotDifferentiableError: The weights require a gradient.
            WorkerError: A task raised, on any rank: raised on every rank; `.grad` and modules are
                as before. Or the ranks differ in steps, tasks or parameters. Or a rank is lost,
                late or has left: the world is broken then.
            RuntimeError: This process has left the world, or was forked from a rank.
        """
        with self.group.turn():
            self.attempts += 1
            try:
                weights = checked_weights(tasks, weights)
                params = self.params
                if not params:
                    raise ValueError(
                        "`params`: expected tensors that require gradients, all are frozen."
                    )
            except Exception as error:
                refuse(self.group, error, self.steps)
                raise
            return Step(self, task_loss, tasks, weights, params).run()


def _leaves_of(held: Any) -> Iterable[Any]:
    if not isinstance(held, nn.Module):
        return (held,)
    kind = type(held)
    if (kind.parameters, kind.named_parameters) != (
        nn.Module.parameters,
        nn.Module.named_parameters,
    ):
        return held.parameters()
    return [x for part in parts_of([held]) for x in part._parameters.values()]


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a large import; without it there is none
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
