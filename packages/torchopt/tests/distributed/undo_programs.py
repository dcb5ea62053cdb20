# SPDX-License-Identifier: Apache-2.0
"""Tasks that write into their arguments and modules; some raise half-way."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from distributed_programs import F64, make_net, make_tasks, outcome
from torch import Tensor, nn

import torchopt.distributed as todist

# --- a task that raises ---------------------------------------------------------------------------


def rich_net() -> nn.Module:
    """Return a module with everything that a task can change."""
    net = make_net()
    net.append(nn.BatchNorm1d(1, affine=False, dtype=F64))
    net.fixed = nn.Parameter(torch.full((3,), 2.0, dtype=F64), requires_grad=False)
    net.big = nn.Parameter(torch.full((300, 300), 0.5, dtype=F64))
    net.register_buffer("calls", torch.zeros(2, dtype=F64))
    net.register_buffer("table", torch.ones(300, 300, dtype=F64))
    net.factor = 1.0
    return net


@torch.no_grad()
def _under_no_grad(net: Any) -> None:
    for p in net.parameters():
        p.sub_(1.0)


def _through_data(net: Any) -> None:
    for p in net.parameters():
        p.data.sub_(1.0)


def _exchange_data(net: Any) -> None:
    for p in net.parameters():
        p.data = p.data - 1.0
    net.big.data = torch.zeros(2, dtype=F64)


def _freeze(net: Any) -> None:
    net[0].requires_grad_(False)
    net.fixed.requires_grad_(True)


def _write_buffers(net: Any) -> None:
    net.calls.add_(1.0)
    net.table.data.mul_(3.0)
    net[-1].running_mean = torch.ones(1, dtype=F64)


def _make_things(net: Any) -> None:
    net.register_buffer("new", torch.ones(1))
    net.other = nn.Parameter(torch.ones(2, dtype=F64))
    net.factor, net.more = 3.0, "text"
    net[1].register_buffer("new", torch.ones(1))


def _move_to_the_end(net: Any) -> None:
    weight = net[0].weight
    del net[0].weight
    net[0].weight = weight


def _exchange_modules(net: Any) -> None:
    net[1] = nn.ReLU()
    net.append(nn.Identity())


def _hook(net: Any) -> None:
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    net.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _change_modes(net: Any) -> None:
    net.eval()
    net[2].train()


def _leave_gradients(net: Any) -> None:
    net(make_tasks(1)[0][0]).sum().backward()


CHANGES: dict[str, Callable[[Any], None]] = {
    f.__name__: f
    for f in (
        _under_no_grad,
        _through_data,
        _exchange_data,
        _freeze,
        _write_buffers,
        _make_things,
        _move_to_the_end,
        _exchange_modules,
        _hook,
        _change_modes,
        _leave_gradients,
    )
}


def _state(net: nn.Module) -> Any:
    """Return the state of a module: tensors with their identity, modes, hooks, attributes."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    told = [(k, id(x), x.requires_grad, x.detach().clone(), x.grad) for k, x in tensors]
    parts = [
        (k, id(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for k, part in net.named_modules()
    ]
    attributes = {k: x for k, x in vars(net).items() if isinstance(x, (int, float, str))}
    return told, parts, attributes


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def changes_of_a_task_that_raises(options: dict[str, Any]) -> dict[str, Any]:
    """Return, for each change, the error, whether all is as before, and a good step's error.

    The tasks of the last rank raise, or those of all ranks.
    """
    tasks, found = make_tasks(4), {}
    for (name, change), everywhere in itertools.product(CHANGES.items(), (False, True)):
        net = rich_net()
        for p in net.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        engine = todist.TaskParallel(net, **options)
        good = [True]

        raises = everywhere or todist.get_rank() == todist.get_world_size() - 1

        def loss(
            task: Any, net: Any = net, change: Any = change, good: Any = good, raises: bool = raises
        ) -> Tensor:
            value = ((net(task[0]) - task[1]) ** 2).mean() * net.factor + net.big.mean()
            if raises and not good:
                change(net)
                raise LookupError("half-way")
            return value

        before = _state(net)
        good.clear()
        try:
            engine.backward(loss, tasks)
            told = "nothing"
        except LookupError:
            told = "raised"
        is_as_before = _is_equal(_state(net), before)
        good.append(True)
        net.zero_grad()
        engine.backward(loss, tasks)
        again = rich_net()
        sum(loss(t, again) for t in tasks).div(4).backward()
        off = [
            float("nan") if a.grad is None else float((a.grad - b.grad).abs().max())
            for a, b in zip(net.parameters(), again.parameters())
            if b.grad is not None
        ]
        found[f"{name} {everywhere}"] = (told, is_as_before, max(off))
    return found


# --- tasks that write and go on -------------------------------------------------------------------


def _adapt_by_hand(net: nn.Module, task: Any) -> None:
    params = list(net.parameters())
    grads = torch.autograd.grad(((net(task[0]) - task[1]) ** 2).mean(), params)
    with torch.no_grad():
        for p, g in zip(params, grads):
            p -= 0.1 * g


def _adapt_by_an_optimizer(net: nn.Module, task: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ((net(task[0]) - task[1]) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


ADAPTATIONS = {"by hand": _adapt_by_hand, "by an optimizer": _adapt_by_an_optimizer}


def query(net: nn.Module, task: Any) -> Tensor:
    value: Tensor = ((net(task[2]) - task[3]) ** 2).mean()
    return value


def adapted_reference(tasks: Any) -> tuple[list[Tensor], Tensor]:
    """Return the mean over tasks of the gradient at the adapted parameters, and the losses."""
    total = [torch.zeros_like(p) for p in make_net().parameters()]
    losses = []
    for task in tasks:
        net = make_net()
        _adapt_by_hand(net, task)
        loss = query(net, task)
        losses.append(loss.detach())
        for x, g in zip(total, torch.autograd.grad(loss, list(net.parameters()))):
            x += g / len(tasks)
    return total, torch.stack(losses)


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def adapted_in_place() -> dict[Any, Any]:
    """Return gradients and losses of tasks that adapt the parameters and do not restore them."""
    found = {}
    for name, schedule, deterministic in itertools.product(
        ADAPTATIONS, ("static", "dynamic"), (False, True)
    ):
        net, adapt = make_net(), ADAPTATIONS[name]
        engine = todist.TaskParallel(net, schedule=schedule, deterministic=deterministic)

        def loss(task: Any, net: Any = net, adapt: Any = adapt) -> Tensor:
            adapt(net, task)
            return query(net, task)

        step = engine.backward(loss, make_tasks(5))
        kept = all(torch.equal(p, q) for p, q in zip(net.parameters(), make_net().parameters()))
        found[name, schedule, deterministic] = (
            [p.grad for p in net.parameters()],
            step.losses,
            kept,
        )
    return found


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def what_cannot_be_undone() -> dict[str, Any]:
    """Return the errors for writes that autograd does not see, and for leftover gradients."""
    found: dict[str, Any] = {}
    for size in (3, 100_000):
        p = nn.Parameter(torch.ones(size, dtype=F64))
        frozen = nn.Parameter(torch.zeros(9 * 2**20, dtype=F64), requires_grad=False)
        engine = todist.TaskParallel(nn.ParameterList([p, frozen]))

        def touch(task: float, p: Tensor = p, frozen: Tensor = frozen) -> Tensor:
            with torch.no_grad():
                frozen[0] += 1.0
            return (p * task).sum()

        def write(task: float, p: Tensor = p) -> Tensor:
            p.data.mul_(2.0)
            return (p * task).sum()

        def leave(task: float, p: Tensor = p) -> Tensor:
            (p**2).sum().backward()
            return (p * task).sum()

        for name, loss in (("touch", touch), ("write", write), ("leave", leave)):
            try:
                told: Any = outcome(functools.partial(engine.backward, loss, [1.0, 2.0, 3.0]))
            except TypeError as error:  # in one process
                told = str(error)
            found[f"{name} {size}"] = (told, p.grad, bool((p == 1.0).all()))
    return found
