# SPDX-License-Identifier: Apache-2.0
"""The gradient of a mean over tasks, computed by all ranks together.

Every rank holds the meta-parameters theta and runs the same program. The gradient of

    L(theta) = sum_i w_i L_i(theta),    sum_i w_i = 1,

is a sum over tasks, so the ranks differentiate different tasks and add up the gradients. A task may
be differentiated in any way: through the steps of an inner loop, by the implicit function theorem,
or from function values. The result does not depend on the number of ranks.
"""

from __future__ import annotations

import enum
import operator
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.distributed.arguments import checked_weights
from torchopt.distributed.buckets import filled
from torchopt.distributed.contents import Contents
from torchopt.distributed.gradients import is_small
from torchopt.distributed.group import Group
from torchopt.distributed.replicas import compared, copied, leaves_of
from torchopt.distributed.session import DEFAULT_TIMEOUT
from torchopt.distributed.signature import agree, kinds_of, local_part, refuse
from torchopt.distributed.sparse import sparse_positions
from torchopt.distributed.step import MetaStep, Step
from torchopt.errors import NotDifferentiableError  # noqa: F401 - imported from here before
from torchopt.params.sharded import gather_in_graph
from torchopt.tree import tree_leaves, tree_paths

__all__ = ["MetaStep", "TaskParallel"]


@dataclass(frozen=True)
class Form:
    """What follows from the shapes, dtypes and devices of the parameters."""

    params: list[Tensor]  # held: a later parameter could have the address of one that is gone
    kinds: list[Any]
    places: list[int]  # among all leaves
    code: int  # the same on every rank if places, shapes and dtypes are
    is_small: bool
    sparse: list[int]
    fill: list[list[int]]


class TaskParallel:
    """Differentiates a mean over tasks with respect to meta-parameters that all ranks hold.

    Construct it on all ranks with the same arguments. Then each step is::

        step = engine.backward(task_loss, tasks)   # adds the same gradient to .grad on every rank
        optimizer.step()                           # on every rank

    In a world of one process it does the same without communication.

    Every task sees the parameters as they are at the beginning of the step. If a task writes into
    parameters, replaces them or freezes them, that is undone when the task ends, at the cost of one
    copy of the parameters. Frozen parameters of at most 64 MiB in total are copied too; a task must
    not write to larger ones. A task sees no `.grad` and must leave none behind.

    Gradients do not depend on the number of ranks, except for the rounding of sums: 1e-12 relative
    in float64. With `deterministic=True` they are the same bit for bit, as long as all processes
    use the same number of threads (`torch.set_num_threads`).

    Args:
        params: A module, or a tree of leaf tensors that require gradients. For a module in
            `DistributedDataParallel`, its own reduction is switched off during a step. Gradients of
            DTensors (`distribute_tensor`, `fully_shard`) are summed shard by shard over `group`,
            which must not be the group that shards them. Meta-optimizers in a task gather the
            shards of `fully_shard` as part of the graph.
        schedule: `"static"`: each rank takes consecutive tasks, and the numbers differ by at most
            one. `"dynamic"`: each rank takes the next task from a shared counter, which is better
            if the costs of tasks differ.
        deterministic: Add the gradients of tasks in a fixed order. This needs memory and traffic
            for the gradients of about log2(tasks) tasks, and nothing overlaps with computation.
        bucket_bytes: Size of the gradients that are sent together, in bytes; > 0. Those of at least
            2 MiB are sent by themselves, without a copy.
        timeout: Seconds that a task, or the tasks that are taken together, may take; > 0. A process
            that is stuck for longer is ended.
        seed: Seed of torch's generators in each task, so that a task draws the same numbers on any
            rank. None: the generators are left alone.
        tasks_at_once: How many tasks of a rank `torch.func.vmap` takes together; 1: a loop; None:
            all. The tasks must then be trees of tensors with equal structure, shapes and dtypes.
            `task_loss` is called once for all of them; it must not draw random numbers or write to
            buffers. Inner loops use `torchopt.inner_loop` or `torch.func.grad`, not a
            meta-optimizer.
        group: A process group of torch.distributed; None: the world.
        sync: Copy the parameters, also frozen ones, and buffers of rank 0 to all ranks at
            construction.

    Raises:
        ValueError: There is nothing to differentiate, a parameter is not a leaf or has no shape
            yet, or an argument is out of its range.
        TypeError: `tasks_at_once` is not an int.
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
                f"{tasks_at_once}; under vmap the bits of a gradient depend on the number of tasks."
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
        self.contents: list[Contents] = []  # memory for copies that no step uses
        self._held = tree_leaves(params)
        self._names = [".".join(map(_name_of, path)) for path in tree_paths(params)]
        self._form = Form([], [], [], 0, is_small=False, sparse=[], fill=[])
        self.modules = [x for x in self._held if isinstance(x, nn.Module)]
        self.reducers = [
            part
            for module in self.modules
            for part in module.modules()
            if isinstance(part, nn.parallel.DistributedDataParallel)
        ]
        self.is_fsdp = any(_is_fsdp(part) for module in self.modules for part in module.modules())
        if not self.params:
            kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in self._held[:4]))
            raise ValueError(
                "`params`: expected tensors that require gradients, found none in "
                f"{kinds or 'an empty tree'}; pass a module, or a tree of modules and parameters."
            )
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
        self.number = 0  # the ranks of a group make their engines in the same order
        if self.group.session is not None:
            self.number = self.group.session.engines[self.group.name]
            self.group.session.engines[self.group.name] += 1

    @property
    def params(self) -> list[Tensor]:
        """The parameters that are differentiated: the leaves that require gradients now."""
        found: dict[int, Tensor] = {}
        for leaf in self._held:
            for x in leaves_of(leaf):
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

    def form_of(self, params: list[Tensor]) -> Form:
        """Return the facts that follow from the shapes and dtypes of parameters."""
        # A parameter may get other contents and gradients in its place: `module.double()`.
        kinds = [(p.shape, p.dtype, getattr(p, "grad_dtype", p.dtype), p.device) for p in params]
        known = self._form
        if kinds != known.kinds or any(map(operator.is_not, params, known.params)):
            if self.group.size > 1 and any(kind[2] is None for kind in kinds):
                raise ValueError(
                    "`params`: expected gradients of a known dtype, which all ranks sum up, got a "
                    "parameter with grad_dtype=None; set its grad_dtype to the dtype that the "
                    "tasks give it"
                )
            places = self._places()
            code = zlib.crc32(repr([places, *(kind[:3] for kind in kinds)]).encode())
            small = self.group.device.type == "cpu" and is_small(params, self.bucket_bytes)
            sparse = sparse_positions(self.modules, params)
            fill = filled(params, self.bucket_bytes, sparse)
            self._form = Form(params, kinds, places, code, small, sparse, fill)
        return self._form

    def replicas(self, params: list[Tensor]) -> list[Tensor]:
        """Return the tensors that have to be equal on all ranks before a step."""
        return compared(params, self._held, only_shards=self.is_fsdp)

    def _places(self) -> list[int]:
        """Return the positions, among all leaves, of those that require gradients."""
        leaves = [x for held in self._held for x in leaves_of(held)]
        return [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]

    @torch.no_grad()
    def _sync(self) -> None:
        if self.group.size == 1:
            return
        tensors, names = copied(self._held), [*self._names]
        for module in self.modules:
            names += [name for name, _ in module.named_parameters()]
            names += [name for name, _ in module.named_buffers()]
        with self.group.turn():
            # A module that was built in the order of a set has another order on each rank.
            facts = {"tensors": kinds_of(tensors), "names": names, "leaves": self._places()}
            agree(self.group, "the start of TaskParallel", facts)
            for x in tensors:
                self.group.broadcast_(local_part(x.detach()), "the start of TaskParallel")

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps, which a checkpoint needs: it seeds the random numbers."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the result of `state_dict`."""
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
            task_loss: Maps a task to its loss, 0-dim and real, computed with the parameters. It is
                called only for this rank's tasks.
            tasks: A sequence that has the same length on all ranks; only this rank's entries are
                read.
            weights: One weight >= 0 for each task, in any scale; None: equal weights.

        Returns:
            The losses of all tasks, times and bytes.

        Raises:
            ValueError: There is no task, or `weights` are not one number >= 0 for each task. With
                several processes, also a parameter with `grad_dtype=None`.
            TypeError: The tasks are not a sequence, or a loss is not a real 0-dim tensor. Or a task
                wrote to parameters through `.data` or to large frozen ones, or left a `.grad`
                behind. With several processes it is also a `WorkerError`.
            NotDifferentiableError: The weights require a gradient, or a loss depends on no
                parameter.
            WorkerError: A task raised on some rank; the error is raised on every rank, and `.grad`
                and modules are as before. Or the ranks differ in steps, tasks or parameters. Or a
                rank is gone, late or has left; then the world cannot be used any more.
            RuntimeError: This process has left the world or was forked from a rank.
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
                form = self.form_of(params)
            except Exception as error:
                refuse(self.group, error, self.steps)
                raise
            return Step(self, task_loss, tasks, weights, params, form).run()


def _name_of(key: Any) -> str:
    """Return a name for a key that is the same in every process; other objects show an address."""
    if isinstance(key, tuple):
        return str([*map(_name_of, key)])
    return str(key) if isinstance(key, (str, int, float, enum.Enum)) else type(key).__name__


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: there are no such modules
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
