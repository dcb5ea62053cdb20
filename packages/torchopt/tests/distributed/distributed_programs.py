# SPDX-License-Identifier: Apache-2.0
"""The programs of the tests: functions that other processes import by name."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import torchopt
import torchopt.distributed as todist
from torchopt.diff.implicit import custom_root
from torchopt.diff.zero_order import Gaussian, ZeroOrder
from torchopt.distributed import buckets, calls, meeting, session, wire
from torchopt.distributed.buckets import BucketedSum
from torchopt.distributed.folder import HUB, Folder
from torchopt.errors import WorkerError
from torchopt.torch_internals import backward

F64 = torch.float64

PATIENCE = 120.0  # seconds; far more than any world takes, even on a busy machine


# --- tasks ----------------------------------------------------------------------------------------


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 1))
    return net.double()


def make_tasks(count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return regression tasks: support and query inputs and outputs."""
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for _ in range(count):
        a = torch.randn(3, 1, generator=generator, dtype=F64)
        x, z = torch.randn(2, 5, 3, generator=generator, dtype=F64)
        tasks.append((x, (x @ a).sin(), z, (z @ a).sin()))
    return tasks


def explicit_loss(net: nn.Module, task: Any) -> Tensor:
    """Return the query loss after two differentiable Adam steps."""
    x, y, z, t = task
    start = torchopt.extract_state_dict(net, by="reference")
    inner = torchopt.MetaAdam(net, lr=0.05)
    for _ in range(2):
        inner.step(((net(x) - y) ** 2).mean())
    loss = ((net(z) - t) ** 2).mean()
    torchopt.recover_state_dict(net, start)
    return loss


def implicit_loss(theta: Tensor, task: Any) -> Tensor:
    """Return the query loss of ridge regression towards theta, differentiated at its optimum."""
    x, y, z, t = task

    def objective(w: Tensor, theta: Tensor) -> Tensor:
        return ((x @ w - y) ** 2).mean() + 0.1 * ((w - theta) ** 2).sum()

    @custom_root(torch.func.grad(objective, argnums=0), argnums=1)
    def solve(init: Tensor, theta: Tensor) -> Tensor:
        n = len(x)
        a = x.T @ x / n + 0.1 * torch.eye(3, dtype=F64)
        return torch.linalg.solve(a, (x.T @ y) / n + 0.1 * theta)

    w = solve(torch.zeros(3, 1, dtype=F64), theta)
    return ((z @ w - t) ** 2).mean()


def zero_order_loss(theta: Tensor, task: Any) -> Tensor:
    """Return a loss whose derivative is estimated from values at random points."""
    _, _, z, t = task
    engine = ZeroOrder(Gaussian(), "antithetic", num_samples=6, sigma=0.1)
    return engine(lambda w: ((z @ w - t) ** 2).mean())(theta)


ENGINES = ("explicit", "implicit", "zero-order")


def problem(engine: str) -> tuple[list[Tensor], Any, Callable[[Any], Tensor]]:
    """Return leaves, the argument of `TaskParallel`, and the loss of a task."""
    if engine == "explicit":
        net = make_net()
        leaves = list(net.parameters())
        return leaves, net, functools.partial(explicit_loss, net)
    theta = torch.tensor([[0.3], [-0.2], [0.5]], dtype=F64, requires_grad=True)
    loss = implicit_loss if engine == "implicit" else zero_order_loss
    return [theta], {"theta": theta}, functools.partial(loss, theta)


def see_no_files(engine: todist.TaskParallel) -> None:
    """Make an engine work as on several machines, whose ranks share no files."""
    engine.group.messages = engine.group.counter = engine.group.slots = None


@todist.auto_init_rpc(backend="gloo")
def task_gradients_with(count: int, options: dict[str, Any], across: bool = False) -> Any:
    """Return, for each engine, the gradients after two steps and the reports of the steps."""
    results = {}
    for engine in ENGINES:
        leaves, params, loss = problem(engine)
        parallel = todist.TaskParallel(params, bucket_bytes=128, **options)
        if across:
            see_no_files(parallel)
        for _ in range(2):  # gradients add up, as those of `backward`
            step = parallel.backward(loss, make_tasks(count))
        results[engine] = (
            [p.grad for p in leaves],
            step.loss,
            step.losses,
            step.owners,
            step.early_bytes,
            step.bytes_sent,
        )
    return results


@todist.auto_init_rpc(backend="gloo")
def messages_of_steps(across: bool) -> dict[str, Any]:
    """Return the collective operations of single steps.

    Args:
        across: Whether to run as on several machines.
    """

    def counted(engine: todist.TaskParallel, tasks: int) -> int:
        before = engine.group.operations
        if across:
            see_no_files(engine)
        engine.backward(lambda t: sum(p.sum() for p in engine.params) * t, [1.0] * tasks)
        return engine.group.operations - before

    def both(shapes: list[int], tasks: int, dtype: torch.dtype = F64) -> list[int]:
        params = [torch.ones(n, dtype=dtype, requires_grad=True) for n in shapes]
        kinds = ("static", "dynamic")
        engines = [todist.TaskParallel(params, schedule=k, bucket_bytes=2**14) for k in kinds]
        return [counted(engine, tasks) for engine in engines]

    return {
        "packet": {n: both([3, 4], n) for n in (10, 2000)},
        "one bucket": both([1500], 5),
        "three buckets": both([2000, 2100, 2100], 5),
        "half": both([1500], 5, torch.float16),
    }


def resident() -> float:
    """Return the memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@todist.auto_init_rpc(backend="gloo")
def memory_of_steps() -> Any:
    """Return the growth of memory with the static and the dynamic schedule."""
    net = nn.Linear(64, 64)
    engine = todist.TaskParallel(net)
    gc.collect()
    gc.disable()
    engine.backward(lambda x: net(x).sum(), list(torch.randn(4, 2, 64)))
    kept = weakref.ref(net.weight.grad)
    buckets = sum(type(x) is BucketedSum for x in gc.get_objects())
    net.zero_grad()
    gc.enable()
    assert buckets == 0, "the buckets of a step wait for the collector"
    assert kept() is None
    grown = []
    for schedule in ("static", "dynamic"):
        net = nn.Linear(64, 64)
        engine = todist.TaskParallel(net, schedule=schedule)
        for k in range(250):
            net.zero_grad()
            engine.backward(lambda x, net=net: (net(x) ** 2).mean(), list(torch.randn(4, 2, 64)))
            if k == 50:
                start = resident()
        grown.append(resident() - start)
    return grown


def _contents() -> int:
    return len(wire.inbox._contents)


def _still_running() -> int:
    return len(calls._running) - 1  # this one


def _slow(net: nn.Module, *args: Any) -> Tensor:
    time.sleep(0.5)
    return next(net.parameters()).sum()


def _value(net: nn.Module, w: Tensor) -> Tensor:
    return net(w).sum()


@todist.auto_init_rpc()
@todist.rank_zero_only
def what_calls_leave() -> dict[str, Any]:
    """Return the memory that is kept after many calls, including late ones."""
    w = torch.randn(20)
    net = nn.Linear(20, 50)
    for _ in range(200):
        fresh = nn.Linear(20, 50)
        for module in (net, fresh):
            todist.remote_sync_call(
                _value, args=(todist.share(module), todist.share(w)), partitioner=1
            )
        with torch.no_grad():
            net.weight.mul_(0.999)
            w.add_(0.001)
    late = []
    for _ in range(3):
        with torch.no_grad():
            net.weight.mul_(0.999)
        try:
            todist.remote_sync_call(_slow, args=(todist.share(net),), partitioner=1, timeout=0.1)
        except WorkerError as error:
            late.append(error.kind)
    time.sleep(1.0)
    del fresh, module
    # One more call drops everything that is no longer needed.
    todist.remote_sync_call(_value, args=(todist.share(net), w), partitioner=1)
    return {
        "contents here": sum(map(len, wire.outbox._has.values())),
        "contents there": todist.remote_sync_call(_contents, partitioner=1)[0],
        "tensors": len(wire.outbox._version),
        "deadlines": len(calls._deadlines),
        "late": late,
        "running": todist.remote_sync_call(_still_running, partitioner=1)[0],
    }


@todist.auto_init_rpc()
@todist.rank_zero_only
def memory_of_large_calls() -> tuple[list[float], list[str]]:
    """Return the growth in MiB of caller and worker over calls with 10 MB each, some of them late.

    The first calls start threads.
    """
    late = []
    net = nn.Linear(1000, 1250).double()
    w = torch.ones(1000, dtype=F64)
    found = []
    for k in range(1, 41):
        with torch.no_grad():
            net.weight.add_(0.001)
        func, limit = (_slow, 0.1) if k % 5 == 0 else (_value, 60.0)
        told = outcome(functools.partial(on, 1, func, todist.share(net), w, timeout=limit))
        if k % 5 == 0:
            late.append(told[2])
        if k in (10, 40):
            found.append([resident(), on(1, resident)[0]])
    return [end - start for start, end in zip(*found)], late


def awkward_losses(dtype: torch.dtype) -> Tensor:
    """Return losses whose sum depends on every bit."""
    tiny = torch.finfo(dtype).tiny
    return torch.tensor([1 / 3, -0.1, 1e4 / 3, tiny, torch.nan, torch.inf, 0.0], dtype=dtype)


@todist.auto_init_rpc(backend="gloo")
def steps_of_every_type() -> dict[torch.dtype, Any]:
    """Return losses, gradients and owners of a step with parameters of several types."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, F64):
        losses = awkward_losses(dtype)
        params = [torch.zeros(n, dtype=dtype, requires_grad=True) for n in (900, 800)]
        engine = todist.TaskParallel(params, bucket_bytes=1024)

        def loss(i: int, params: Any = params, losses: Tensor = losses) -> Tensor:
            wanted = sum(p.sum() for p in params) if i == 0 else 0 * params[0].sum()
            return losses[i] + wanted - wanted.detach()

        step = engine.backward(loss, range(7), weights=[1.0] + [1e-30] * 6)
        found[dtype] = (step.losses, [p.grad for p in params], step.owners)
    return found


@todist.auto_init_rpc(backend="gloo")
def together(options: dict[str, Any]) -> Any:
    """Return gradients and losses by vmap, then one by one, and the calls of the first."""
    net = make_net()
    leaves = list(net.parameters())
    calls = 0

    def loss(task: Any) -> Tensor:
        nonlocal calls
        calls += 1
        x, y, z, t = task
        params = dict(net.named_parameters())
        train = lambda p: ((torch.func.functional_call(net, p, x) - y) ** 2).mean()  # noqa: E731
        grads = torch.func.grad(train)(params)
        adapted = {k: p - 0.1 * grads[k] for k, p in params.items()}
        return ((torch.func.functional_call(net, adapted, z) - t) ** 2).mean()

    found: list[Any] = []
    counts = []
    for chosen in (options, {}):
        net.zero_grad()
        weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        calls = 0
        engine = todist.TaskParallel(net, **chosen)
        step = engine.backward(loss, make_tasks(7), weights=weights)
        found += [[p.grad for p in leaves], step.losses]
        counts.append(calls)
    return (*found, counts[0])


@todist.auto_init_rpc(backend="gloo")
def edited_gradients() -> Any:
    """Change gradients in place, as if they were separate tensors, and return them."""
    a, b = (torch.zeros(n, dtype=F64, requires_grad=True) for n in (900, 800))
    todist.TaskParallel([a, b]).backward(lambda t: (a.sum() + 2 * b.sum()) * t, [1.0, 3.0])
    assert a.grad is not None
    assert b.grad is not None
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    product = (scale * a.grad).sum()  # keeps the gradient of a, not that of b
    b.grad.zero_()
    product.backward()
    first, scale.grad = scale.grad, None
    a.grad.mul_(scale)  # keeps the graph, as of any gradient
    a.grad.sum().backward()
    return first, scale.grad, a.grad.detach().sum(), b.grad.sum()


class _GivesAView(torch.autograd.Function):
    """The sum of x; the gradient is a view of a tensor that the caller keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.kept = kept
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.kept.view(ctx.kept.shape), None


@todist.auto_init_rpc(backend="gloo")
def large_gradients() -> dict[tuple[str, int], Any]:
    """Return gradients after one and two steps, and whether they are where autograd put them."""
    found: dict[tuple[str, int], Any] = {}
    kept = torch.ones(200, 200, dtype=F64)
    losses: dict[str, Callable[..., Tensor]] = {
        "alone": lambda a, b, t: ((a + 2 * b.view(200, 200)) * t).sum(),
        "shared": lambda a, b, t: ((a + b.view(200, 200)) * t).sum(),
        "shared, in turn": lambda a, b, t: ((a.view(-1) + b.exp()) * t).sum(),
        "unused": lambda a, b, t: (a * t).sum() if t == 4.0 else (b * t).sum(),
        "expanded": lambda a, b, t: a.sum() * t + (b * t).sum(),
        "kept": lambda a, b, t: _GivesAView.apply(a, kept) + (b * t).sum(),
    }
    for (name, of_task), tasks in itertools.product(
        losses.items(), ([2.0, 4.0], [4.0, 1.0, 2.0, 5.0])
    ):
        if name == "kept" and len(tasks) > todist.get_world_size():
            continue  # autograd itself would add to the tensor that is kept
        a = torch.zeros(200, 200, dtype=F64, requires_grad=True)
        small = torch.zeros(2000, dtype=F64, requires_grad=True)
        b = torch.zeros(40_000, dtype=F64, requires_grad=True)
        engine = todist.TaskParallel([a, small, b])
        sent: set[tuple[int, bool]] = set()

        def is_own(g: Tensor, in_hook: bool, sent: Any = sent, look: Any = buckets._is_own) -> bool:
            found: bool = look(g, in_hook)
            sent.add((g.data_ptr(), found))
            return found

        def loss(
            t: float, of_task: Any = of_task, a: Any = a, b: Any = b, c: Any = small
        ) -> Tensor:
            value: Tensor = of_task(a, b, t) + c.sum()
            return value

        bounds = []
        for _ in range(2):
            with mock.patch.multiple(buckets, _LARGE=2**18, _is_own=is_own):
                engine.backward(loss, tasks)
            bounds.append([(float(_grad(p).min()), float(_grad(p).max())) for p in (a, b, small)])
            in_place = [(_grad(p).data_ptr(), True) in sent for p in (a, b)]
            found.setdefault((name, len(tasks)), (bounds, in_place))
    found["kept", 0] = float(kept.min()), float(kept.max())
    return found


class _Gives(torch.autograd.Function):
    """The sum of x; the gradient is what a function returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: Callable[[], Tensor]) -> Tensor:
        ctx.given = given
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.given(), None


@todist.auto_init_rpc(backend="gloo")
def large_gradients_of_others() -> dict[str, Any]:
    """Return gradients in the memory of an array, and those with a bit for a sign."""
    array = np.full(40_000, 2.0)
    x, z = (torch.zeros(40_000, dtype=t, requires_grad=True) for t in (F64, torch.complex128))
    given = {  # a rank that finds 2 in another way sends its own memory
        "of an array": lambda t: _Gives.apply(x, lambda: torch.from_numpy(array)),
        "negated": lambda t: (
            _Gives.apply(x, lambda: torch.ops.aten._neg_view(torch.full_like(x, -2.0)))
            if t == 0
            else (x * 2.0).sum()
        ),
        "conjugated": lambda t: (
            (z.conj() * (2 + 1j)).sum().real if t == 0 else (z * (2 - 1j)).sum().real
        ),
    }
    found: dict[str, Any] = {}
    for name, loss in given.items():
        p = z if name == "conjugated" else x
        for _ in range(2):
            p.grad = None
            with mock.patch.object(buckets, "_LARGE", 2**18):
                todist.TaskParallel([p]).backward(loss, [0, 1])
        found[name] = set(_grad(p).tolist())
    found["array"] = set(array.tolist())
    kept: list[Tensor] = []
    y = torch.zeros(40_000, dtype=F64, requires_grad=True)
    y.register_post_accumulate_grad_hook(lambda p: kept.append(_grad(p).detach()))
    with (  # as in torch 2.4, where autograd holds a gradient that it has not copied
        mock.patch.object(buckets, "_LARGE", 2**18),
        mock.patch.object(backward, "_holders_of_new_gradients", return_value=(2, 3)),
    ):
        todist.TaskParallel([y]).backward(lambda t: y.sum() * (t + 1), [0, 1])
    found["of a hook"] = set(_grad(y).tolist()), set(kept[0].tolist())
    return found


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


@todist.auto_init_rpc(backend="gloo")
def weights_and_unused() -> Any:
    """Return gradients with weights, with a parameter no task uses and one that one task uses."""
    a, b, c = (torch.full((3,), 2.0, dtype=F64, requires_grad=True) for _ in range(3))
    c.grad = torch.ones(3, dtype=F64)
    parallel = todist.TaskParallel([a, b, c], bucket_bytes=8)

    def loss(task: float) -> Tensor:
        value = (a * task).sum()
        return value + (b**2).sum() if task == 3.0 else value

    parallel.backward(loss, [1.0, 2.0, 3.0], weights=[1.0, 1.0, 2.0])
    return a.grad, b.grad, c.grad


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def in_the_order_of_a_set() -> Any:
    """Return names in the order of a set, gradients by name, and the error of a module."""
    names = [*{f"{k} {k % 7}" for k in range(30)}]
    params = {k: torch.ones(2, dtype=F64, requires_grad=True) for k in names}
    numbers = {k: torch.full((2,), float(k.partition(" ")[0]), dtype=F64) for k in names}
    grads = {}
    for options in ({}, {"schedule": "dynamic"}, {"deterministic": True}, {"bucket_bytes": 64}):
        engine = todist.TaskParallel(params, **options)
        engine.backward(lambda t: sum((params[k] * numbers[k]).sum() * t for k in names), [1.0] * 4)
        grads[str(options)] = {k: p.grad.tolist() for k, p in params.items() if p.grad is not None}
        for p in params.values():
            p.grad = None
    for key in (frozenset(names), object()):  # which look different in each process
        todist.TaskParallel({key: torch.ones(2, requires_grad=True)})
    module = nn.ModuleDict({k: nn.Linear(1, 1) for k in names})
    return names, grads, outcome(lambda: todist.TaskParallel(module).steps)


@todist.auto_init_rpc(backend="gloo")
def diverged() -> str:
    """Take an optimizer step on one rank only."""
    p = torch.ones(3, dtype=F64, requires_grad=True)
    parallel = todist.TaskParallel([p])
    parallel.backward(lambda t: (p * t).sum(), [1.0, 2.0])
    if todist.get_rank() == 1:
        with torch.no_grad():
            p += 1.0
    try:
        parallel.backward(lambda t: (p * t).sum(), [1.0, 2.0])
    except RuntimeError as error:
        return str(error)
    return "nothing was noticed"


@todist.auto_init_rpc(backend="gloo")
def wrapped_parameters() -> dict[str, Any]:
    """Return gradients of parameters in DDP, as a DTensor and under FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    tasks = make_tasks(5)
    results: dict[str, Any] = {}

    net = nn.parallel.DistributedDataParallel(make_net())
    parallel = todist.TaskParallel(net)
    parallel.backward(lambda t: ((net(t[0]) - t[1]) ** 2).mean(), tasks)
    results["ddp"] = [p.grad for p in net.parameters()]

    # Four ranks as a mesh: tasks over the first dimension, parameters over the second.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
    full = torch.tensor([[0.3], [-0.2], [0.5]], dtype=F64)
    theta = nn.Parameter(distribute_tensor(full, mesh["shards"], [Shard(0)]))
    for deterministic in (False, True):
        theta.grad = None
        parallel = todist.TaskParallel(
            [theta], group=mesh.get_group("tasks"), deterministic=deterministic
        )

        def loss(task: Any) -> Tensor:
            value = implicit_loss(theta.full_tensor(), task)
            with torch.no_grad():
                theta.add_(1.0)  # ends with the task
            return value

        parallel.backward(loss, tasks)
        results[f"dtensor {deterministic}"] = [theta.grad.full_tensor()]

    net = make_net()
    fully_shard(net, mesh=mesh["shards"])
    parallel = todist.TaskParallel(net, group=mesh.get_group("tasks"))
    parallel.backward(lambda t: ((net(t[0]) - t[1]) ** 2).mean(), tasks)
    results["fsdp"] = [p.grad.full_tensor() for p in net.parameters()]
    return results


@todist.auto_init_rpc(backend="gloo")
def shared_evaluations(vectorized: bool) -> Any:
    """Return a zero-order gradient, the number of evaluations made here, and bytes sent."""
    made = 0

    def f(x: Tensor, scale: float) -> Tensor:
        nonlocal made
        made += 1
        return scale * (x**2).sum() + x.prod()

    engine = ZeroOrder(
        Gaussian(),
        "antithetic",
        num_samples=10,
        sigma=0.1,
        vectorized=vectorized,
        generator=torch.Generator().manual_seed(5 + todist.get_rank()),
    )
    x = torch.linspace(-1.0, 1.0, 4000, dtype=F64, requires_grad=True)
    sharded = todist.zero_order(engine)
    before = sharded.group.bytes_sent  # type: ignore[attr-defined]
    sharded(f)(x, 2.0).backward()
    return x.grad, made, sharded.group.bytes_sent - before  # type: ignore[attr-defined]


# --- parallelize on both backends -----------------------------------------------------------------


@todist.parallelize(todist.batch_partitioner, todist.weighted_mean_reducer)
def mean_square(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).mean()


@todist.parallelize(todist.dim_partitioner(0, exclusive=True, keepdim=False), sum)
def adapted_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a MAML task, differentiated through an inner step on the worker."""
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(((net(x) - y) ** 2).mean())
    return ((net(x) - y) ** 2).mean()


@todist.parallelize(todist.batch_partitioner)
def facts(x: Tensor, label: str) -> tuple[int, int, str]:
    return todist.get_rank(), len(x), label


def adapted_reference(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    start = torchopt.extract_state_dict(net, by="reference")
    total = torch.zeros((), dtype=F64)
    for xi, yi in zip(x, y):
        inner = torchopt.MetaSGD(net, lr=0.1)
        inner.step(((net(xi) - yi) ** 2).mean())
        total = total + ((net(xi) - yi) ** 2).mean()
        torchopt.recover_state_dict(net, start)
    return list(torch.autograd.grad(total, list(net.parameters())))


@todist.driver
def drive() -> dict[str, Any]:
    net = make_net()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    results: dict[str, Any] = {"facts": facts(x, "seven")}
    with todist.autograd.context() as context_id:
        loss = mean_square(todist.share(net), x)
        todist.autograd.backward(context_id, loss)
    results["loss"] = loss.detach()
    results["grads"] = [p.grad for p in net.parameters()]

    xs = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    ys = xs.sum(-1, keepdim=True).sin()
    net.zero_grad()
    with todist.autograd.context() as context_id:
        # As in the published package: a copy inside the graph, the same for every call.
        copy = torchopt.module_clone(net, by="copy")
        total = adapted_loss(copy, xs, ys)
        got = todist.autograd.grad(context_id, total, list(net.parameters()))
    results["meta"] = got
    results["untouched"] = [p.grad for p in net.parameters()]
    results["reference"] = adapted_reference(net, xs, ys)
    return results


# --- remote calls ---------------------------------------------------------------------------------


def scaled(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).sum()


def tree_value(tree: dict[str, Tensor], x: Tensor) -> Tensor:
    return (tree["w"] * x).sum() + tree["b"]


def overwrite(net: nn.Module) -> float:
    with torch.no_grad():
        net.weight.fill_(7.0)
    return float(net.weight.detach().sum())


def kind_of_parameters(net: nn.Module) -> Any:
    return [(type(p).__name__, p.is_leaf, p.requires_grad) for p in net.parameters()]


def tied(net: nn.Module) -> bool:
    return net[0].weight is net[1].weight


def fail(message: str) -> None:
    raise LookupError(message)


class OwnError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)


def fail_with_own_error() -> None:
    raise OwnError(3, "worse")


def leave() -> None:
    raise SystemExit(4)


def wait_here(seconds: float) -> None:
    time.sleep(seconds)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_without_a_word() -> None:
    os._exit(0)


def say_half(how: signal.Signals) -> list[int]:
    """Stop, or exit, while sending the result."""

    def send(pipe: Any, content: Any) -> None:
        half = bytes(content)[: len(content) // 2]
        os.write(pipe.fileno(), struct.pack("!i", len(content)) + half)
        os.kill(os.getpid(), how)

    Connection._send_bytes = send  # type: ignore[attr-defined]
    return list(range(1000))


def outcome(call: Callable[[], Any]) -> Any:
    """Return the error of a call."""
    try:
        return call()
    except WorkerError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return error.rank, error.task, error.kind, error.remote_traceback, kinds


def on(rank: int, func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return todist.remote_sync_call(func, args=args, partitioner=rank, **options)


@todist.auto_init_rpc()
@todist.rank_zero_only
def parameters_travel_once() -> dict[str, Any]:
    results: dict[str, Any] = {}
    net = nn.Linear(100, 50).double()
    shared = todist.share(net)
    sizes = []

    def sent() -> int:
        sizes.append(todist.wire_stats(reset=True).parameter_bytes)
        return sizes[-1]

    x = torch.ones(2, 100, dtype=F64)
    todist.wire_stats(reset=True)
    first = [on(rank, scaled, shared, x)[0] for rank in (1, 1, 1, 2)]
    results["first version"] = sent()
    on(1, scaled, shared, x)
    results["unchanged"] = sent()
    with torch.no_grad():
        net.weight += 1.0
    second = on(1, scaled, shared, x)[0]
    results["weight changed"] = sent()
    net.weight.data.mul_(2.0)  # no version counter sees this
    third = on(1, scaled, shared, x)[0]
    results["behind the counter"] = sent()
    results["values"] = [v.item() for v in (*first, second, third)]
    with torch.no_grad():
        results["expected third"] = float(net(x).sum())
    on(1, scaled, net, x)  # the same contents in a plain module, which the worker already knows
    results["plain module"] = sent()
    on(1, overwrite, net)
    again = on(1, scaled, shared, x)[0]
    results["after a worker wrote"] = again.item()

    tree = {"w": torch.arange(100.0, requires_grad=True), "b": torch.tensor(1.0)}
    with todist.autograd.context() as context_id:
        value = on(2, tree_value, todist.share(tree), torch.full((100,), 3.0))[0]
        todist.autograd.backward(context_id, value, inputs=[tree["w"]])
    results["tree"] = (value.item(), tree["w"].grad)
    todist.wire_stats(reset=True)
    with todist.autograd.context() as context_id:
        losses = todist.remote_sync_call(
            scaled, partitioner=lambda: [(rank, (shared, x), {}) for rank in (1, 1, 2)]
        )
        todist.autograd.backward(context_id, sum(losses))
    results["gradients"] = todist.wire_stats(reset=True).gradient_bytes
    results["gradient"] = net.bias.grad
    pair = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    pair[1].weight = pair[0].weight
    results["tied"] = on(1, tied, todist.share(pair)) + on(1, tied, pair)
    results["plain parameters"] = on(1, kind_of_parameters, nn.Linear(9, 9))[0]
    results["shared parameters"] = on(1, kind_of_parameters, todist.share(nn.Linear(9, 9)))[0]
    zero = torch.tensor([-0.0, 0.0, float("nan")] * 10, requires_grad=True)
    back = on(1, identity, todist.share(zero))[0]
    results["bits"] = torch.equal(back.view(torch.int32), zero.detach().view(torch.int32))
    return results


def identity(x: Tensor) -> Tensor:
    return x.detach()


def _only_on(rank: int) -> int:
    if todist.get_rank() != rank:
        raise ImportError(f"a module of rank {rank}")
    return rank


class OnlyThere:
    """An object that only the process which made it can read."""

    def __reduce__(self) -> Any:
        return _only_on, (todist.get_rank(),)


def only_there(times: int) -> list[OnlyThere]:
    return [OnlyThere() for _ in range(times)]


@todist.auto_init_rpc()
@todist.rank_zero_only
def remote_errors() -> dict[str, Any]:
    results = {
        "raised": outcome(lambda: on(1, fail, "no such thing")),
        "own class": outcome(lambda: on(1, fail_with_own_error)),
        "exit": outcome(lambda: on(1, leave)),
        "unreadable": outcome(lambda: on(1, only_there, 2)),
        "late": outcome(lambda: on(1, wait_here, 3.0, timeout=0.5)),
        "second task": outcome(
            lambda: todist.remote_sync_call(
                int, args=(), partitioner=lambda: [(1, ("3",), {}), (2, ("three",), {})]
            )
        ),
    }
    try:
        on(1, lambda: 1)
    except Exception as error:
        results["lambda"] = (type(error).__name__, str(error))
    futures = [
        todist.remote_async_call(abs, args=(torch.tensor(-float(k)),), partitioner=1 + k % 2)
        for k in range(4)
    ]
    results["async"] = [float(f.wait()[0]) for f in futures]
    results["by name"] = todist.remote_sync_call(
        todist.get_rank, partitioner=f"worker{todist.get_world_size() - 1}"
    )
    while on(1, _still_running)[0]:  # the late call
        time.sleep(0.05)
    return results


@todist.auto_init_rpc(timeout=30.0)
@todist.rank_zero_only
def remote_death() -> Any:
    started = time.monotonic()
    found = outcome(lambda: on(1, die, timeout=60))
    still = on(2, abs, -3)
    _report((found, still, time.monotonic() - started))


def _report(result: Any) -> None:
    """Write a result to a file, because a broken world loses its results."""
    path = Path(os.environ["FAULT_REPORT"])
    part = path.with_suffix(f".{todist.get_rank()}.part")
    part.write_text(repr(result))
    part.rename(path.with_suffix(f".{todist.get_rank()}"))


# --- faults of the collective backend -------------------------------------------------------------


@todist.auto_init_rpc(backend="gloo", timeout=30.0)
def collective_fault(kind: str, victim: int) -> Any:
    p = torch.ones(300, requires_grad=True)
    parallel = todist.TaskParallel([p], timeout=1.0)

    def loss(task: float) -> Tensor:
        if parallel.steps == 1 and todist.get_rank() == victim:
            if kind == "raise":
                fail("bad task")
            elif kind == "kill":
                die()
            elif kind == "hang":
                wait_here(1000.0)
            elif kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        return (p * task).sum()

    parallel.backward(loss, [1.0, 2.0, 3.0, 4.0])
    p.grad = torch.full_like(p, 5.0)
    found = outcome(lambda: parallel.backward(loss, [1.0, 2.0, 3.0, 4.0]))
    kept = p.grad[0].item()
    again = None
    if kind == "raise":  # the world is whole: the next step works
        parallel.steps = 2
        p.grad = None
        parallel.backward(loss, [1.0, 2.0, 3.0, 4.0])
        again = p.grad[0].item()
    _report((found, kept, again))
    if kind == "stop":
        raise RuntimeError("this run is over")  # so that the launcher ends the stopped process


class _DiesBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        die()


def judge_within(seconds: float) -> None:
    """Shorten the timeout of an open world; opening it may take longer on a busy machine."""
    opened: Any = session.current()
    opened.timeout = opened.watch.timeout = seconds


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def fault_elsewhere(kind: str, victim: int) -> Any:
    """Take two good steps; then one rank fails outside a task, or exits inside one."""
    judge_within(3.0)
    p = torch.ones(300, requires_grad=True)
    parallel = todist.TaskParallel([p], timeout=1.5)
    mine = todist.get_rank() == victim

    def loss(task: float) -> Tensor:
        value = p * task
        if mine and parallel.steps == 2 and kind == "exit in task":
            raise SystemExit(3)
        if mine and parallel.steps == 2 and kind == "leave in task":
            os._exit(7)
        if mine and parallel.steps == 2 and kind == "kill in backward":
            value = _DiesBackwards.apply(value)
        return value.sum()

    tasks = [1.0, 2.0, 3.0, 4.0]
    for _ in range(2):
        parallel.backward(loss, tasks)
    if mine:
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "stuck":
            wait_here(1000.0)
        elif kind == "kill":
            die()
        elif kind == "fewer steps":
            return None
        elif kind == "exit":
            raise SystemExit(0)
    _report(outcome(lambda: parallel.backward(loss, tasks)))
    raise RuntimeError("this run is over")


def started_by_hand(rank: int, size: int, port: int, report: str, stopped: tuple[int, ...]) -> None:
    """Be a rank of a world without a launcher, in which some ranks stop."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        FAULT_REPORT=report,
    )
    fault_elsewhere("stop", rank if rank in stopped else -1)


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def suspended() -> Any:
    """Return the losses of steps; all ranks are stopped for a while between and during them."""
    judge_within(1.0)
    p = torch.ones(300, requires_grad=True)
    parallel = todist.TaskParallel([p], timeout=1.5)
    pids: list[Any] = parallel.group.gather_objects(os.getpid())

    def loss(task: float) -> Tensor:
        if parallel.steps in (1, 2) and task == 1.0:
            if parallel.steps == 1:
                multiprocessing.get_context("fork").Process(target=suspend, args=(pids,)).start()
            time.sleep(0.5)
        return (p * task).sum()

    return [parallel.backward(loss, [1.0, 2.0, 3.0]).loss.item() for _ in range(4)]


def suspend(pids: list[int]) -> None:
    """Stop processes together for longer than their timeout."""
    for how, seconds in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.0)):
        for pid in pids:
            os.kill(pid, how)
        time.sleep(seconds)


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def slow_but_alive(kind: str) -> Any:
    """Return the results if one rank is slow but alive; nobody may kill it."""
    judge_within(1.0)
    p = torch.ones(3, requires_grad=True)
    parallel = todist.TaskParallel([p], timeout=2.0)
    rank = todist.get_rank()

    def loss(task: float) -> Tensor:
        if kind == "tasks" and task == 1.0:
            time.sleep(0.3)  # many tasks, none too long, while the other rank has finished its own
        return (p * task).sum()

    step = parallel.backward(loss, [1.0] * 10 + [2.0] * 10)
    if kind == "end" and rank == 1:
        time.sleep(3.0)
    return step.loss.item(), rank


def started_by_srun(environment: dict[str, str], told: Path) -> None:
    """Return the world of a rank that has the variables of slurm."""
    os.environ.update(environment)

    @todist.auto_init_rpc(backend="collective", timeout=60)
    def main() -> Any:
        theta = torch.tensor([1.0, -1.0], requires_grad=True)
        step = todist.TaskParallel([theta]).backward(lambda t: ((theta - t) ** 2).sum(), [0.0, 1.0])
        assert theta.grad is not None
        return todist.get_rank(), todist.get_world_size(), step.owners, theta.grad.tolist()

    told.write_text(repr(main()))


def started_at_a_port(rank: int, size: int, port: int, told: Path, go: Path) -> None:
    """Be a rank of a world at a port, and take a step on request.

    The first try cannot open it.
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )

    def main() -> Any:
        told.with_suffix(".open").touch()
        while not go.exists():
            time.sleep(0.02)
        theta = torch.tensor([1.0, -1.0], requires_grad=True)
        step = todist.TaskParallel([theta]).backward(lambda t: ((theta - t) ** 2).sum(), [0.0, 1.0])
        assert theta.grad is not None
        return step.owners, theta.grad.tolist()

    try:
        try:
            todist.auto_init_rpc(backend="no such thing", timeout=60.0)(main)()
        except Exception:
            found = todist.auto_init_rpc(backend="gloo", timeout=60.0)(main)()
    except RuntimeError as error:
        found = str(error)
    told.write_text(repr(found))


def started_with_a_token(rank: int, environment: dict[str, str], told: Path) -> None:
    """Tell why a world cannot be opened whose last rank has another token, or none."""
    os.environ.update(environment, RANK=str(rank))
    try:
        todist.auto_init_rpc(backend="gloo", timeout=7.0)(todist.get_rank)()
        found = "nothing"
    except (RuntimeError, TimeoutError) as error:
        found = str(error)
    told.write_text(repr(found))


def across_machines(number: int) -> dict[str, Any]:
    """Return a step, errors, and what others learn of a world that runs on several machines."""
    theta = torch.tensor([1.0, -1.0 * number], requires_grad=True)
    engine = todist.TaskParallel([theta])
    engine.backward(lambda t: ((theta - t) ** 2).sum(), [0.0, 1.0])
    failed = outcome(lambda: engine.backward(lambda t: fail("bad task"), [0.0, 1.0]))
    assert theta.grad is not None
    found: dict[str, Any] = {
        "grad": theta.grad.tolist(),
        "failed": failed[:3],
        "shares files": engine.group.messages is not None,
        "listens at": listening(),
    }
    opened: Any = session.current()
    if (launchers := opened.meeting.launchers) is not None:
        address = json.loads(launchers.get("torchopt/hub"))
        found["token told"] = address[2] != ""
        kept = opened.watch._rendezvous._values  # at rank 0
        found["others' keys"] = [k for k in kept if launchers.check([k])]
    if todist.get_rank() == 1:
        try:
            address = [os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ""]
            if launchers is not None:
                address = json.loads(launchers.get("torchopt/hub"))
            meeting.meet_by(lambda: json.dumps(address), print, "", 1, (0, 1), 30.0)
        except RuntimeError as error:
            found["a second rank 1"] = str(error)
    todist.barrier()  # rank 0 stays until then
    return found


def hanging_at_the_opening() -> None:
    """Report the error if rank 1 lives, and does not open the group after the ranks have met."""
    if todist.get_rank() == 1:
        session._open_group = lambda met, *args: met.watch.failed.wait(PATIENCE)
    started = time.monotonic()
    found = outcome(todist.auto_init_rpc(backend="gloo", timeout=3.0)(todist.get_rank))
    _report((found, time.monotonic() - started))


def worlds_across_machines() -> list[Any]:
    """Return the results of two worlds that the same processes open one after the other."""
    found = []
    for number in (1, 2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            world = todist.auto_init_rpc(backend="gloo", timeout=60.0)(across_machines)(number)
        world["warned"] = any("set TORCHOPT_TOKEN to the same" in str(w.message) for w in told)
        found.append(world)
        todist.shutdown()
    return found


@todist.auto_init_rpc(timeout=60.0)
def calls_across_machines() -> tuple[Any, list[str]]:
    """Return the results of remote calls, and where this process listens."""
    called = None
    if todist.get_rank() == 0:
        called = [on(rank, scaled, nn.Linear(2, 1), torch.ones(1, 2))[0].shape for rank in (0, 1)]
    return called, listening()


def users_own_world(file: str | None = None) -> Any:
    """Return the results in a world that the program opened itself, with a slow rank.

    Args:
        file: Where the ranks meet as if they were on two machines, without `MASTER_ADDR`; None:
            they meet as on one machine.
    """
    import torch.distributed as dist

    if file is None:
        dist.init_process_group("gloo")
    else:
        rank = todist.get_rank()
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
        socket.gethostname = lambda: f"host{rank}"
        socket.gethostbyname = lambda name: "127.0.0.1"
    p = torch.ones(3, requires_grad=True)
    parallel = todist.TaskParallel([p])

    def loss(task: float) -> Tensor:
        if dist.get_rank() == 1:
            time.sleep(1.0)
        return (p * task).sum()

    step = parallel.backward(loss, [1.0, 2.0])
    failed = outcome(lambda: parallel.backward(lambda t: fail("bad"), [1.0, 2.0]))
    todist.shutdown()
    dist.destroy_process_group()
    return step.loss.item(), p.grad[0].item(), failed[:3]


def late_in_their_own_world(late: int, folder: str) -> Any:
    """Return what a rank is told whose group has another one that is late, and a later step."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    p = torch.ones(3, requires_grad=True)
    told, found = Path(folder) / "told", ""
    if dist.get_rank() == late:
        while not told.exists():
            time.sleep(0.02)
    else:
        try:
            todist.TaskParallel([p], timeout=0.5)
        except TimeoutError as error:
            found = str(error)
        told.touch()
    loss = todist.TaskParallel([p]).backward(lambda t: (p * t).sum(), [1.0, 2.0]).loss.item()
    todist.shutdown()
    dist.destroy_process_group()
    return found, loss


@todist.auto_init_rpc(backend="gloo", timeout=30.0)
def sub_groups() -> Any:
    """Return the owners and the failed rank, as each half of four ranks sees them."""
    import torch.distributed as dist

    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    p = torch.ones(3, requires_grad=True)
    parallel = todist.TaskParallel([p], group=groups[todist.get_rank() // 2])

    def loss(task: float) -> Tensor:
        if parallel.steps == 1 and todist.get_rank() == 3:
            fail("bad task")
        return (p * task).sum()

    owners = parallel.backward(loss, [1.0, 2.0]).owners
    found = outcome(lambda: parallel.backward(loss, [1.0, 2.0]))
    return owners, found[:3] if isinstance(found, tuple) else found.owners


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def lives(folder: str) -> None:
    """Report that this process lives, then wait for the others, compute, or hang, by rank."""
    rank = todist.get_rank()
    part = Path(folder) / f"part.{rank}"
    part.write_text(str(os.getpid()))
    part.rename(Path(folder) / f"alive.{rank}")
    if rank == 0:
        todist.TaskParallel([torch.ones(2, requires_grad=True)])
    if rank == 1:
        sum(range(10**12))  # and no other thread of this process can run meanwhile
    os.kill(os.getpid(), signal.SIGSTOP)


def spawning(folder: str, forks: bool) -> None:
    """Start a world that does not end, and wait for it.

    Args:
        folder: Where everybody writes.
        forks: Whether this process also has a child that keeps all its pipes open.
    """
    tempfile.tempdir = folder

    def fork() -> None:
        while not all((Path(folder) / f"alive.{rank}").exists() for rank in range(3)):
            time.sleep(0.02)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
        child.start()
        (Path(folder) / "part").write_text(str(child.pid))
        (Path(folder) / "part").rename(Path(folder) / "forked")

    if forks:
        threading.Thread(target=fork, daemon=True).start()
    modules = ["torch", "torchopt.distributed", "distributed_programs"]
    multiprocessing.set_forkserver_preload(modules)
    todist.spawn(lives, 3, (folder,), start_method="forkserver")


def hold_a_folder(temporary: str, tell: Any) -> None:
    """Hold a folder in `temporary`, as rank 0, until this process is killed."""
    tempfile.tempdir = temporary
    tell.send(str(Folder().claim(HUB).parent))
    time.sleep(PATIENCE)


def introduce() -> Callable[[], None]:
    """Write down the id of this process, so that it can be killed; return a reporter of steps."""
    if "PROGRESS" not in os.environ:
        return lambda: None
    told, attempt = Path(os.environ["PROGRESS"]), os.environ["ATTEMPT"]
    (told / f"pid.{attempt}.{todist.get_rank()}").write_text(str(os.getpid()))

    def progress() -> None:
        if todist.get_rank() == 0:
            with (told / f"progress.{attempt}").open("ab") as file:
                file.write(b".")

    return progress


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def checkpointed(folder: str, steps: int) -> Any:
    """Train from the checkpoint on, with a new checkpoint after each step."""
    return _checkpointed(folder, steps, 1)


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def checkpointed_now_and_then(folder: str, steps: int) -> Any:
    """The same with a checkpoint after every third step."""
    return _checkpointed(folder, steps, 3)


def _checkpointed(folder: str, steps: int, every: int) -> Any:
    """The result depends on everything a checkpoint must hold: the moments of Adam, the tasks
    drawn, and the random numbers drawn inside the tasks.
    """
    progress = introduce()
    net = make_net()
    optimizer = torchopt.Adam(net.parameters(), lr=1e-2)
    parallel = todist.TaskParallel(net, deterministic=True)
    generator = torch.Generator().manual_seed(11)
    checkpoint = todist.Checkpoint(Path(folder) / "state.pt", every=every)
    done = 0
    found = checkpoint.load()
    if found is not None:
        done, state = found
        net.load_state_dict(state["net"])
        optimizer.load_named_state_dict(state["optimizer"])
        parallel.load_state_dict(state["parallel"])
        generator.set_state(state["generator"])
    tasks = make_tasks(8)
    for step in range(done + 1, steps + 1):
        chosen = torch.randperm(8, generator=generator)[:5].tolist()
        optimizer.zero_grad()
        parallel.backward(
            lambda t: explicit_loss(net, t) + 0.01 * torch.rand((), dtype=F64) * _size(net),
            [tasks[i] for i in chosen],
        )
        optimizer.step()
        checkpoint.save(
            step,
            {
                "net": net.state_dict(),
                "optimizer": optimizer.named_state_dict(),
                "parallel": parallel.state_dict(),
                "generator": generator.get_state(),
            },
        )
        progress()
    return [p.detach() for p in net.parameters()]


def _size(net: nn.Module) -> Tensor:
    return sum(((p**2).sum() for p in net.parameters()), torch.zeros((), dtype=F64))


# --- where a world listens ------------------------------------------------------------------------


def another_backend() -> str:
    """Return the error of a main function for the other backend."""
    other = None if todist.get_backend() == "collective" else "gloo"
    try:
        return str(todist.auto_init_rpc(backend=other)(todist.get_rank)())
    except RuntimeError as error:
        return str(error)


def listening() -> list[str]:
    """Return the addresses and ports at which this process listens in an open world (Linux)."""
    todist.barrier()
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1])
    return found


@todist.auto_init_rpc()
def world_facts() -> Any:
    info = todist.get_world_info()
    todist.barrier()
    if todist.get_rank() > 0:
        todist.barrier([f"worker{r}" for r in range(1, info.world_size)])
    return (
        tuple(info),
        info.worker_name,
        todist.rank_zero_only(lambda: "zero")(),
        todist.rank_non_zero_only(lambda: "other")(),
        todist.on_rank(1, 2)(lambda: "one or two")(),
        todist.not_on_rank(1)(lambda: "not one")(),
        todist.get_worker_id("worker1"),
        todist.get_worker_id(),
        todist.driver(lambda: "drives")(),
    )


@todist.auto_init_rpc(timeout=30.0)
@todist.rank_zero_only
def references_to_leaves() -> Any:
    tree = {"w": torch.arange(3.0), "b": [torch.tensor(2.0)]}
    references = torchopt.pytree.tree_as_rref(tree)
    there = todist.remote_sync_call(torchopt.pytree.tree_to_here, args=(references,), partitioner=1)
    return {
        "backend": todist.get_backend(),
        "autograd": todist.autograd.is_available(),
        "owners": [x.owner().name for x in torchopt.pytree.tree_leaves(references)],
        "here": torchopt.pytree.tree_to_here(references),
        "local": torchopt.pytree.tree_local_value(references),
        "there": there[0],
    }
