# SPDX-License-Identifier: Apache-2.0
"""The calls of `parallelize` in a world where every rank runs the same program.

All ranks have the same list of calls; each rank runs its own calls and gets the results of all. A
result depends on the differentiable arguments only on the rank that computed it. In the backward
pass each rank pulls back the cotangents of its own results, and the sums over the ranks are the
gradients, on every rank. All ranks have to take part in the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed import packed
from torchopt.distributed.group import Group
from torchopt.distributed.partition import Call
from torchopt.distributed.raised import Raised
from torchopt.distributed.share import Shared, received, tensors_of
from torchopt.distributed.signature import agree, kinds_of
from torchopt.errors import NotDifferentiableError
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import apply_rule

__all__ = ["run_replicated"]

_numbers = itertools.count(1)  # numbers the calls, which all ranks make in the same order


def run_replicated(func: Callable[..., Any], calls: Sequence[Call], timeout: float = 0.0) -> Any:
    """Return the results of the calls, the same on every rank, with their derivatives.

    Args:
        func: The function to call.
        calls: The calls, the same on every rank.
        timeout: Seconds for each call; 0 or negative: the timeout of the world.

    Raises:
        WorkerError: A call raised on some rank; the error is raised on every rank.
    """
    group = Group()
    with group.turn():
        return _run(group, func, calls, timeout)


def _run(group: Group, func: Callable[..., Any], calls: Sequence[Call], timeout: float) -> Any:
    func = getattr(func, "__parallelize_unwrapped__", func)
    name = getattr(func, "__name__", "function").partition("__parallelize")[0]
    inputs = _differentiable(calls)
    seconds = timeout if timeout > 0 else group.timeout
    own: dict[int, Any] = {}
    mine: dict[int, Any] = {}
    for i, (rank, args, kwargs) in enumerate(calls):
        if not 0 <= rank < group.size:
            raise ValueError(
                f"partitioner: expected ranks below {group.size}, the number of processes, got "
                f"{rank} in call {i + 1} of {len(calls)}"
            )
        if rank != group.rank:
            continue
        task = f"task {i + 1} of {len(calls)} ({name})"
        try:
            with group.task(task, seconds):
                args, kwargs = received((tuple(args or ()), dict(kwargs or {})), connected=True)
                own[i] = func(*args, **kwargs)
                mine[i] = packed.pack(own[i]), _positions(own[i])
        except Exception as error:
            mine[i] = Raised(error, group.world_rank, task)
            break
    agree(group, f"parallelize of {name}, {len(calls)} calls")
    number = next(_numbers)
    outcomes: dict[int, Any] = {}
    for part in group.gather_objects(mine, f"the results of {name}"):
        outcomes.update(part)
    for outcome in outcomes.values():
        if isinstance(outcome, Raised):
            raise outcome.as_error()
    results = [packed.unpack(outcomes[i][0]) for i in range(len(calls))]
    if not inputs or not torch.is_grad_enabled():
        return results
    positions = [outcomes[i][1] for i in range(len(calls))]
    place = f"the backward pass of call {number}, of {name}"
    return _joined(group, place, inputs, own, results, positions)


def _positions(result: Any) -> list[int]:
    """Return the positions of the leaves of a result that require a gradient."""
    leaves = tree_leaves(result, none_is_leaf=True)
    return [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]


def _differentiable(calls: Sequence[Call]) -> list[Tensor]:
    """Return the tensors among the arguments of all calls that require a gradient, each once."""
    found: dict[int, Tensor] = {}
    for _, args, kwargs in calls:
        for leaf in tree_leaves((args, kwargs)):
            value = leaf.value if isinstance(leaf, Shared) else leaf
            found.update({id(x): x for x in tensors_of(value) if x.requires_grad})
    return list(found.values())


class _Join:
    """The derivative rule of the results of all ranks."""

    needs_its_closure = True

    def __init__(
        self,
        group: Group,
        place: str,
        inputs: list[Tensor],
        values: list[Tensor],
        own: dict[int, Tensor],
    ) -> None:
        self.group = group
        self.place = place
        self.inputs = inputs
        self.values = values
        self.own = own  # position among the values -> the result with its graph
        self.num_differentiable_inputs = self.num_kept_inputs = len(inputs)
        self.num_differentiable_outputs = len(values)

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        del inputs
        return tuple(x.clone() for x in self.values)

    def pull_back(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor, ...],
    ) -> Any:
        del inputs, outputs
        if torch.is_grad_enabled():
            raise NotDifferentiableError(
                "parallelize: the derivative of results from several processes is of first order; "
                "expected a backward pass without create_graph. Take higher derivatives inside of "
                "the parallelized function."
            )
        roots = {k: x for k, x in self.own.items() if x.requires_grad}
        grads: Sequence[Tensor | None] = [None] * len(self.inputs)
        if roots:
            with torch.enable_grad():
                grads = torch.autograd.grad(
                    list(roots.values()),
                    self.inputs,
                    [cotangents[k].to(x) for k, x in roots.items()],
                    retain_graph=True,
                    allow_unused=True,
                )
        dense = [torch.zeros_like(x) if g is None else g for x, g in zip(self.inputs, grads)]
        used = torch.tensor([float(g is not None) for g in grads], device=self.group.device)
        with self.group.turn():
            # If ranks differentiated different results, the sum of gradients would be meaningless.
            agree(self.group, self.place, {"arguments": kinds_of(self.inputs)})
            *sums, used = self.group.sums([*dense, used], self.place)
        return tuple(x if n else None for x, n in zip(sums, used.tolist()))

    def push_forward(
        self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        raise NotDifferentiableError(
            "parallelize: results from several processes have no forward-mode derivative; use "
            "reverse mode"
        )


def _joined(
    group: Group,
    place: str,
    inputs: list[Tensor],
    own: dict[int, Any],
    results: list[Any],
    positions: list[list[int]],
) -> Any:
    leaves, spec = tree_flatten(results, none_is_leaf=True)
    graphs: dict[int, Tensor] = {}  # position among all leaves -> own tensor
    slots: list[int] = []
    start = 0
    for i, (result, members) in enumerate(zip(results, positions)):
        slots += [start + k for k in members]
        if i in own:
            of_own = tree_leaves(own[i], none_is_leaf=True)
            graphs.update((start + k, of_own[k]) for k in members)
        start += len(tree_leaves(result, none_is_leaf=True))
    if not slots:
        return results
    device = inputs[0].device
    values = [leaves[k].to(device) for k in slots]
    mine = {n: graphs[k] for n, k in enumerate(slots) if k in graphs}
    for k, x in zip(slots, apply_rule(_Join(group, place, inputs, values, mine), *inputs)):
        leaves[k] = x
    joined: Any = tree_unflatten(spec, leaves)
    return joined
