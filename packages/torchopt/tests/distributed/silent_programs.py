# SPDX-License-Identifier: Apache-2.0
"""Programs in which something used to go wrong silently; each returns its results."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from distributed_programs import F64, make_net, make_tasks, outcome
from torch import Tensor, nn

import torchopt
import torchopt.distributed as todist
from torchopt.errors import NotDifferentiableError, WorkerError

TARGETS = [0.0, 1.0, 2.0, 3.0]


def quadratic(theta: Tensor, task: float) -> Tensor:
    return ((theta - task) ** 2).sum()


def start() -> Tensor:
    return torch.tensor([1.0, -1.0], dtype=F64, requires_grad=True)


def after_error(options: dict[str, Any]) -> Any:
    """Return the loss and gradient of the step after a step that failed in its third task."""
    theta, bad = start(), [True]
    engine = todist.TaskParallel([theta], **options)

    def loss(task: float) -> Tensor:
        if bad and task == 2.0:
            raise LookupError("bad task")
        return quadratic(theta, task)

    try:
        engine.backward(loss, TARGETS)
    except LookupError as error:
        found = type(error).__name__
    before = theta.grad
    bad.clear()
    step = engine.backward(loss, TARGETS)
    return found, before, step.loss, theta.grad, engine.steps


def half_way(where: str) -> Any:
    """Return the losses of a step after a step in which the last rank's task raised half-way."""
    net = make_net()
    engine = todist.TaskParallel(net)
    held = list(net.parameters())
    bad = [True]

    def loss(task: Any) -> Tensor:
        x, y, z, t = task
        net.train(False)
        inner = torchopt.MetaSGD(net, lr=0.5)
        inner.step(((net(x) - y) ** 2).mean())
        if bad and where == "task" and todist.get_rank() == todist.get_world_size() - 1:
            raise LookupError("bad query")
        return ((net(z) - t) ** 2).mean()  # and never restores the parameters

    tasks = make_tasks(4)
    with contextlib.suppress(LookupError):
        engine.backward(loss, tasks)
    same = all(a is b for a, b in zip(net.parameters(), held))
    modes = [part.training for part in net.modules()]
    bad.clear()
    net.zero_grad()
    step = engine.backward(loss, tasks)
    return same, all(modes), step.losses, [p.grad for p in held]


def statistics(options: dict[str, Any]) -> Any:
    """Return the buffers of a module with a batch norm after two steps of five tasks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    net.register_buffer("calls", torch.zeros(2, dtype=F64))
    engine = todist.TaskParallel(net, **options)

    def loss(task: Any) -> Tensor:
        net.calls += task[0].mean()
        net.train()
        value = (net(task[0]) ** 2).mean()
        net.eval()  # depends on the statistics that this task has computed
        return value + (net(task[2]) ** 2).mean()

    for _ in range(2):
        engine.backward(loss, make_tasks(5))
    return [p.grad for p in net.parameters()], list(net.buffers()), net.training


def statistics_reference() -> Any:
    """Return the same from the definition: each task starts from the buffers of the step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    net.register_buffer("calls", torch.zeros(2, dtype=F64))
    for _ in range(2):
        before = copy.deepcopy(list(net.buffers()))
        ends = []
        for task in make_tasks(5):
            for b, x in zip(net.buffers(), before):
                b.copy_(x)
            net.calls += task[0].mean()
            net.train()
            value = (net(task[0]) ** 2).mean()
            net.eval()
            ((value + (net(task[2]) ** 2).mean()) / 5).backward()
            ends.append(copy.deepcopy(list(net.buffers())))
        for k, b in enumerate(net.buffers()):
            changes = torch.stack([end[k] - before[k] for end in ends])
            b.copy_(before[k] + (changes.mean(0) if b.is_floating_point() else changes.sum(0)))
    return [p.grad for p in net.parameters()], list(net.buffers())


def changed_leaves() -> dict[str, Any]:
    """Return gradients after parameters were replaced, unfrozen and frozen between steps."""
    found: dict[str, Any] = {}
    tasks = make_tasks(3)
    for what in ("assign", "unfreeze", "freeze"):
        net, plain = make_net(), make_net()
        if what == "unfreeze":
            net[0].requires_grad_(False)
        engine = todist.TaskParallel(net)
        engine.backward(lambda t: ((net(t[0]) - t[1]) ** 2).mean(), tasks)  # noqa: B023
        net.zero_grad()
        if what == "assign":
            net.load_state_dict({k: 2 * v for k, v in net.state_dict().items()}, assign=True)
            plain.load_state_dict(net.state_dict())
        if what == "unfreeze":
            net[0].requires_grad_(True)
        if what == "freeze":
            net[0].requires_grad_(False)
            plain[0].requires_grad_(False)
        engine.backward(lambda t: ((net(t[0]) - t[1]) ** 2).mean(), tasks)  # noqa: B023
        sum(((plain(t[0]) - t[1]) ** 2).mean() / 3 for t in tasks).backward()
        found[what] = [(p.grad, q.grad) for p, q in zip(net.parameters(), plain.parameters())]
    return found


def weight_decay() -> Any:
    """Return `.grad` of a parameter that no task uses, in small and in large trees."""
    found = []
    for size in (3, 3000):
        used = torch.ones(size, dtype=F64, requires_grad=True)
        unused = torch.ones(size, dtype=F64, requires_grad=True)
        for deterministic in (False, True):
            used.grad = unused.grad = None
            engine = todist.TaskParallel([used, unused], deterministic=deterministic)
            engine.backward(lambda t: (used * t).sum(), [1.0, 2.0, 3.0])  # noqa: B023
            found.append((used.grad[0].item(), unused.grad))
    a, b = (torch.ones(3, dtype=F64, requires_grad=True) for _ in range(2))
    first_only((todist.share([a, b])), torch.ones(4, 1)).backward()
    return [*found, (a.grad[0].item(), b.grad)]


@todist.parallelize(todist.batch_partitioner, todist.sum_reducer)
def first_only(tensors: list[Tensor], x: Tensor) -> Tensor:
    return (tensors[0] * x).sum()


@todist.parallelize(todist.batch_partitioner, todist.sum_reducer)
def overwriting(x: Tensor, net: nn.Module, shared: list[Tensor]) -> Tensor:
    x.mul_(3.0)
    with torch.no_grad():
        net.weight.fill_(7.0)
        shared[0].fill_(7.0)
    net.bias = None
    return x.sum() + shared[0].sum() * 0


def written_arguments() -> Any:
    """Return arguments after calls that write into them."""
    x, net, tensor = torch.ones(4, 1), nn.Linear(1, 1), torch.ones(2, requires_grad=True)
    weight = net.weight.detach().clone()
    value = overwriting(x, todist.share(net), todist.share([tensor]))
    return value, x, torch.equal(net.weight, weight), net.bias is not None, tensor.detach()


@todist.parallelize(todist.batch_partitioner, list)
def tree_of(x: Tensor) -> dict[str, Any]:
    return {"a": [x.sum(), (None, "text", 3)], "b": {"c": x > 1, "d": torch.zeros(0, 2)}}


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "integer": lambda x, w: x.long().sum(),
    "flag": lambda x, w: (x > 2).any(),
    "none": lambda x, w: None,
    "text": lambda x, w: ["a", 3, {"b": ()}],
    "empty": lambda x, w: (x * w)[:0],
    "empty and cut": lambda x, w: x[:0],
    "argument": lambda x, w: x,
    "view": lambda x, w: x[:, :1],
    "shared": lambda x, w: w,
    "expanded": lambda x, w: (w.sum() * x.sum()).expand(3),
    "transposed": lambda x, w: (x * w).t(),
    "cut": lambda x, w: (x * w).sum().detach(),
    "rounded": lambda x, w: (x * w).sum().float(),
    "complex": lambda x, w: (x * w).sum() * (1 + 2j),
    "twice": lambda x, w: (lambda y: {"a": y, "b": [y, None, y.detach()]})((x * w).sum()),
}


@todist.parallelize(todist.dim_partitioner(0, exclusive=True), list)
def result_of(x: Tensor, w: Tensor, kind: str) -> Any:
    return KINDS[kind](x, w)


@todist.driver
def results_of_every_kind() -> dict[str, Any]:
    """Return results with their graphs, the gradient, and whether the arguments are unchanged."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        x = torch.arange(1.0, 7.0, dtype=F64).reshape(3, 2)
        w = torch.tensor([2.0, 0.5], dtype=F64, requires_grad=True)
        with todist.autograd.context() as context_id:
            results = result_of(x, todist.share(w), kind)
            leaves = [y for y in torchopt.pytree.tree_leaves(results) if isinstance(y, Tensor)]
            roots = [y.abs().sum().double() for y in leaves if y.requires_grad]
            if roots:
                todist.autograd.backward(context_id, torch.stack(roots).sum())
        told = [(y.dtype, tuple(y.shape), y.requires_grad, y.detach().tolist()) for y in leaves]
        for y in leaves:
            if kind != "expanded":
                y.detach().zero_()
        kept = x.sum().item() == 21.0 and w.tolist() == [2.0, 0.5]
        found[kind] = (told, None if w.grad is None else w.grad.tolist(), kept)
    return found


@todist.auto_init_rpc(timeout=60.0)
def results_by_calls() -> Any:
    return results_of_every_kind()


def frozen_layer() -> Any:
    """Return loss and gradients of a module whose frozen layer starts differently on each rank."""
    net = make_net(seed=todist.get_rank())
    net[0].requires_grad_(False)
    cache = torch.full((2,), float(todist.get_rank()))
    net.register_buffer("cache", cache, persistent=False)
    engine = todist.TaskParallel(net)
    net.cache = cache  # what is not saved may differ
    step = engine.backward(lambda t: ((net(t[0]) - t[1]) ** 2).mean(), make_tasks(3))
    return step.losses, [p.grad for p in net[1:].parameters()]


def differing(what: str) -> Any:
    """Return every rank's error when the ranks do different things."""
    rank = todist.get_rank()
    theta, big = start(), torch.zeros(5000, requires_grad=True)
    engine = todist.TaskParallel([theta])
    tasks: Any = TARGETS
    weights = None
    loss = functools.partial(quadratic, theta)
    if what == "lengths":
        tasks = [float(i) for i in range(4 + 2 * rank)]
    if what == "long lengths":
        tasks = [float(i) for i in range(2000 + 2 * rank)]
    if what == "steps":
        engine.load_state_dict({"steps": int(rank == 0)})
    if what == "weights":
        weights = [1.0, 1.0, 1.0, 1.0 + rank]
    if what == "parameters":
        engine = todist.TaskParallel({"theta": theta, "big": big})
        big.requires_grad_(rank == 1)
        loss = lambda t: quadratic(theta, t) + big.sum() * t  # noqa: E731
    if what in ("frozen", "buffers"):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
        engine = todist.TaskParallel(net)
        if what == "frozen":  # another layer on each rank, of the same shapes
            net[rank].requires_grad_(False)
        elif rank == 1:
            net(torch.ones(3, 2, dtype=F64))  # outside of a step
        loss = lambda t: (net(torch.eye(2, dtype=F64)) * t).sum()  # noqa: E731
    if what in ("buckets", "seed", "schedule"):
        options: Any = {
            "buckets": {"bucket_bytes": 2**12 << rank},
            "seed": {"seed": rank},
            "schedule": {"schedule": ("static", "dynamic")[rank]},
        }[what]
        engine = todist.TaskParallel([theta, big], **options)
        loss = lambda t: quadratic(theta, t) + big.sum() * t  # noqa: E731
    if what == "large operations":
        engine = todist.TaskParallel([theta, big])
        loss = lambda t: quadratic(theta, t) + big.sum() * t  # noqa: E731
    if what.endswith("operations") and rank == 1:
        found = outcome(lambda: tree_of(torch.ones(2, 1)))
    else:
        found = outcome(lambda: engine.backward(loss, tasks, weights=weights))
    theta.grad = None
    again = todist.TaskParallel([theta]).backward(functools.partial(quadratic, theta), TARGETS)
    return found, again.loss


@todist.parallelize(todist.batch_partitioner, todist.sum_reducer)
def product(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum()


def pulled_back_in_another_order() -> Any:
    """Return what is told if ranks pull different results back; then a gradient."""
    w, v = (torch.ones(3, dtype=F64, requires_grad=True) for _ in range(2))
    x = torch.ones(4, 3, dtype=F64)
    results = [product(todist.share(w), x), product(todist.share(v), 2 * x)]
    found = outcome(results[todist.get_rank()].backward)
    w.grad = v.grad = None
    product(todist.share(w), x).backward()
    return found, w.grad, v.grad


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def run(name: str, *args: Any) -> Any:
    """Run one of the programs above in a collective world."""
    return globals()[name](*args)


# --- remote calls ---------------------------------------------------------------------------------


def total(x: Tensor, *tensors: Any) -> float:
    return sum(float(y.detach().sum()) for y in (x, *tensors))


def on_one() -> Any:
    return todist.dim_partitioner(0, workers=[1])


def tree_sum(tree: dict[str, Tensor], x: Tensor) -> float:
    return float(sum(y.detach().sum() for y in tree.values())) + float(x.sum())


def module_sum(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).sum()


@todist.auto_init_rpc(timeout=60.0)
@todist.rank_zero_only
def contents_of_the_moment() -> dict[str, Any]:
    """Change the arguments of asynchronous calls right after the calls."""
    found: dict[str, Any] = {}
    for n in (1, 4, 7, 8, 1000):
        for grad in (False, True):
            w, futures = torch.zeros(n, dtype=F64, requires_grad=grad), []
            for i in range(20):
                with torch.no_grad():
                    w.fill_(float(i))
                futures.append(
                    todist.remote_async_call(
                        tree_sum,
                        args=(todist.share({"w": w}), torch.zeros(1)),
                        partitioner=on_one(),
                    )
                )
                with torch.no_grad():
                    w.fill_(-7.0)
            found[f"share {n} {grad}"] = [f.wait()[0] / n for f in futures]
    for n in (1, 10**5):
        x, futures = torch.zeros(n, dtype=F64), []
        for i in range(10):
            x.fill_(float(i))
            futures.append(todist.remote_async_call(total, args=(x,), partitioner=on_one()))
            x.fill_(-7.0)
        found[f"argument {n}"] = [f.wait()[0] / n for f in futures]
    return found


@todist.parallelize(todist.dim_partitioner(0, workers=[0, 1]), todist.sum_reducer)
def square(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).sum()


@todist.auto_init_rpc(timeout=60.0)
@todist.rank_zero_only
def gradients_of_calls() -> dict[str, Any]:
    """Return the gradients outside contexts, and those of unused parameters."""
    found: dict[str, Any] = {}
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    x = torch.ones(4, 3, dtype=F64)
    try:
        square(todist.share(net), x).backward()
        found["outside"] = [p.grad for p in net.parameters()]
    except NotDifferentiableError as error:
        found["outside"] = str(error)
    small, unused = (torch.ones(2, dtype=F64, requires_grad=True) for _ in range(2))
    big, idle = (torch.ones(200, dtype=F64, requires_grad=True) for _ in range(2))
    with todist.autograd.context() as context_id:
        values = todist.remote_sync_call(
            used_of,
            args=(todist.share([small, unused, big, idle]), torch.ones(2, 1)),
            partitioner=todist.dim_partitioner(0, workers=[0, 1]),
        )
        todist.autograd.backward(context_id, sum(values))
    found["unused"] = [small.grad, unused.grad, big.grad, idle.grad]
    with todist.autograd.context():
        try:
            todist.autograd.context().__enter__()
        except RuntimeError as error:
            found["in a context"] = str(error)
    x = torch.ones(4, 1)
    found["written"] = (
        [float(v) for v in todist.remote_sync_call(triple, args=(x,))],
        x.flatten().tolist(),
    )
    calls = [functools.partial(on_worker, f) for f in (a_lock, a_lambda)]
    found["unpicklable"] = [outcome(call)[:3] for call in calls]
    found["afterwards"] = on_worker(todist.get_rank)
    return found


def used_of(tensors: list[Tensor], x: Tensor) -> Tensor:
    return (tensors[0].sum() + tensors[2].sum()) * x.sum()


def triple(x: Tensor) -> Tensor:
    x.mul_(3)
    return x.sum()


def a_lock() -> Any:
    import sqlite3

    return sqlite3.connect(":memory:")


def a_lambda() -> Any:
    return lambda: 1


def on_worker(func: Any, *args: Any) -> Any:
    return todist.remote_sync_call(func, args=args, partitioner=1)


def inner(x: Tensor) -> Tensor:
    return (x * 2).sum()


@todist.parallelize(todist.dim_partitioner(0, exclusive=True), todist.sum_reducer, timeout=60)
def outer(x: Tensor) -> Tensor:
    whole: Tensor = todist.remote_sync_call(
        inner, args=(x.expand(4, 1).contiguous(),), reducer=todist.sum_reducer, timeout=60
    )
    return whole


@todist.parallelize(todist.dim_partitioner(0, exclusive=True), todist.sum_reducer, timeout=3)
def middle(x: Tensor) -> Tensor:
    whole: Tensor = todist.remote_sync_call(
        inner, args=(x.expand(4, 1).contiguous(),), reducer=todist.sum_reducer, timeout=3
    )
    return whole


@todist.parallelize(todist.dim_partitioner(0, exclusive=True), todist.sum_reducer, timeout=3)
def too_many(x: Tensor) -> Tensor:
    """Wait for calls that wait for calls, more of them than an agent has threads."""
    whole: Tensor = middle(x.expand(2, 1).contiguous())
    return whole


@todist.auto_init_rpc(timeout=60.0)
@todist.rank_zero_only
def nested_calls() -> Any:
    value = outer(torch.ones(60, 1))
    try:
        return float(value), float(too_many(torch.ones(140, 1)))
    except WorkerError as error:
        return float(value), error.kind
