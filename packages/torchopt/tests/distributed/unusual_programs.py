# SPDX-License-Identifier: Apache-2.0
"""Programs with unusual parameters, buffers, groups and arguments; each returns its results."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from distributed_programs import F64, die, judge_within, outcome, see_no_files
from torch import Tensor, nn

import torchopt.distributed as todist
from torchopt.diff.zero_order import Gaussian, ZeroOrder
from torchopt.distributed import group, launch
from torchopt.errors import NotDifferentiableError

Problem = tuple[Any, list[Tensor], Callable[[float], Tensor]]


def table(size: int, dense_task: float | None = None) -> Problem:
    """Return an embedding table with sparse gradients, and its loss; one task's are dense."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Embedding(size + 9, 3, sparse=True), nn.Linear(3, 1)]).double()

    def loss(task: float) -> Tensor:
        rows = torch.tensor([int(task), 8, 8])
        value = net[1](net[0](rows)).pow(2).sum()
        return value + (net[0].weight ** 2).sum() if task == dense_task else value

    return net, list(net.parameters()), loss


def tied(size: int) -> Problem:
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    b.weight = a.weight
    more = torch.ones(size, dtype=F64, requires_grad=True)
    x = torch.ones(2, 3, dtype=F64)

    def loss(task: float) -> Tensor:
        return b(torch.tanh(a(task * x))).pow(2).mean() + (more * task).sum()

    return [a, b, more], [a.weight, a.bias, b.bias, more], loss


def points(size: int) -> Problem:
    """Return a 0-dim tensor, an empty one, and one with other strides, and their loss."""
    torch.manual_seed(0)
    number = torch.tensor(2.0, dtype=F64, requires_grad=True)
    empty = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    turned = torch.randn(size, 4, dtype=F64).t().requires_grad_()
    image = torch.randn(2, 3, 2, 2, dtype=F64).to(memory_format=torch.channels_last)
    params = [number, empty, turned, image.requires_grad_()]

    def loss(task: float) -> Tensor:
        value = (number * turned * task).pow(2).sum() + empty.sum()
        return value + (image + task).pow(3).sum()

    return params, params, loss


class _Inside(torch.autograd.Function):
    """x times the sum of p, whose backward runs a backward pass that reaches p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hold: Callable[[], Tensor]) -> Tensor:
        ctx.hold = hold
        return x * hold().detach().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            ctx.hold().sum().backward(grad)
        return grad * ctx.hold().detach().sum(), None


def inside(size: int) -> Problem:
    """Return a loss whose backward pass runs another one."""
    p, q = (torch.ones(size, dtype=F64, requires_grad=True) for _ in range(2))
    x = torch.ones((), dtype=F64, requires_grad=True)

    def loss(task: float) -> Tensor:
        return _Inside.apply(x, lambda: p) * task + (q * task).sum()

    return [p, q, x], [p, q, x], loss


def signed(size: int) -> Problem:
    """Return parameters that are conjugated and negated views."""
    z = torch.full((size,), 1.0 + 2.0j, dtype=torch.complex128).conj().detach().requires_grad_()
    x = torch.ops.aten._neg_view(torch.ones(size, dtype=F64)).detach()
    params = [z, x.requires_grad_()]
    assert z.is_conj()
    assert x.is_neg()

    def loss(task: float) -> Tensor:
        return (z * task).abs().pow(2).sum() + (x.pow(2) * task).sum()

    return params, params, loss


def signed_of_rank_0() -> list[Any]:
    """Return parameters with the bits for signs, which start as those of rank 0."""
    _, params, _ = signed(2)
    with torch.no_grad():
        for p in params:
            p.add_(todist.get_rank())
    todist.TaskParallel(params)
    return [p.tolist() for p in params]


def second_gradients() -> Any:
    """Return what a parameter is told whose gradient comes once more after it was sent."""
    p, q, x = inside(2000)[0]
    engine = todist.TaskParallel([q, p, x], bucket_bytes=8000)

    def loss(task: float) -> Tensor:
        value: Tensor = sum(_Inside.apply(x, lambda: p) for _ in range(3)) * task
        return value + (q * task).sum()

    told = outcome(lambda: engine.backward(loss, TASKS))
    return told, [p.grad, q.grad]


def of_type(dtype: torch.dtype) -> Callable[[int], Problem]:
    def make(size: int) -> Problem:
        torch.manual_seed(0)
        values = torch.randint(-4, 5, (size,)).to(dtype)
        if dtype.is_complex:
            values = values * (1 + 2j)
        params = [values.requires_grad_(), torch.ones(3, requires_grad=True)]

        def loss(task: float) -> Tensor:
            return (params[0] * task).abs().pow(2).sum().float() + (params[1] * task).sum()

        return params, params, loss

    return make


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "sparse": table,
    "sparse and dense": lambda size: table(size, 3.0),
    "tied": tied,
    "points": points,
    "inside": inside,
    "signed": signed,
    "half": of_type(torch.float16),
    "bfloat16": of_type(torch.bfloat16),
    "complex": of_type(torch.complex128),
}
TASKS = [1.0, 2.0, 3.0, 4.0, 5.0]
SCHEDULES = ("static", "dynamic")


def gradients(options: dict[str, Any]) -> dict[str, Any]:
    """Return the gradients of two steps, and those of a loop."""
    found = {}
    for name, make in PROBLEMS.items():
        for size in (3, 2000):
            held, params, loss = make(size)
            engine = todist.TaskParallel(held, **options)
            for _ in range(2):
                engine.backward(loss, TASKS)
            got = [p.grad for p in params]
            _, params, loss = make(size)
            for _ in range(2):
                for task in TASKS:
                    (loss(task) / len(TASKS)).backward()
            found[f"{name} {size}"] = got, [p.grad for p in params]
    return found


class Buffers(nn.Module):
    """A module with buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=F64))
        for name, start in {
            "count": torch.zeros(2, dtype=torch.int32),
            "small": torch.zeros(2, dtype=torch.uint8),
            "on": torch.ones(2, dtype=torch.bool),
            "off": torch.zeros(2, dtype=torch.bool),
            "phase": torch.zeros((), dtype=torch.complex128),
            "coarse": torch.zeros(2, dtype=torch.bfloat16),
            "empty": torch.zeros(0),
            "least": torch.full((2,), math.inf, dtype=F64),
            "once": torch.full((2,), math.inf, dtype=F64),
            "mask": torch.full((2, 2), -math.inf).triu(1),
            "nothing": None,
        }.items():
            self.register_buffer(name, start)
        self.register_buffer("again", self.phase)

    def forward(self, task: float) -> Tensor:
        self.count += 1
        self.small += 1
        self.on[0] = False
        self.off[1] = True
        self.phase += 1j * task
        self.coarse += 1
        self.least.clamp_(max=task)
        if task == 2.0:
            self.once.fill_(task)
        return (self.weight * task).pow(2).sum()


def buffers(options: dict[str, Any]) -> Any:
    net = Buffers()
    todist.TaskParallel(net, **options).backward(net, TASKS)
    return {name: x.tolist() for name, x in net.named_buffers()}


def overlapping_groups() -> Any:
    """Return the owners, and the ranks that raised, in groups with common ranks."""
    import torch.distributed as dist

    rank, found = dist.get_rank(), {}
    for ranks in ([0, 2], [1, 2], [2], [2, 0]):
        group = dist.new_group(ranks)
        if rank not in ranks:
            continue
        p = torch.ones(2, requires_grad=True)
        engine = todist.TaskParallel([p], group=group)

        def loss(task: float, p: Tensor = p) -> Tensor:
            if task < 0 and rank == 2:
                raise LookupError("bad task")
            return (p * task).sum()

        owners = engine.backward(loss, TASKS).owners
        try:
            engine.backward(loss, [-1.0, -2.0])
        except LookupError as error:
            found[tuple(ranks)] = owners, getattr(error, "rank", None)
    return found


def refused(how: str) -> Any:
    """Return every rank's error if one cannot begin its step, and the next step."""
    p = torch.ones(2, dtype=F64, requires_grad=True)
    engine = todist.TaskParallel([p], timeout=20.0)

    def loss(task: float) -> Tensor:
        return (p * task).sum()

    mine = todist.get_rank() == todist.get_world_size() - 1
    tasks: Any = TASKS
    weights: Any = None
    if mine and how == "empty":
        tasks = []
    elif mine and how == "generator":
        tasks = (t for t in TASKS)
    elif mine and how == "weights":
        weights = [1.0, 1.0, -1.0, 1.0, 1.0]
    elif how == "learned weights":
        weights = torch.ones(5, requires_grad=True)
    elif mine and how == "frozen":
        p.requires_grad_(False)
    elif mine and how == "any dtype":
        p.grad_dtype = None
    try:
        told: Any = outcome(lambda: engine.backward(loss, tasks, weights=weights))
    except (ValueError, TypeError, NotDifferentiableError) as error:
        told = f"{type(error).__name__}: {error}"
    p.requires_grad_(True)
    if how == "any dtype":
        p.grad_dtype = F64
    step = engine.backward(loss, TASKS)
    return told, step.losses.tolist(), p.grad


def different_operations() -> Any:
    """Return every rank's error if one waits for the others in a different operation."""
    p = torch.ones(2, requires_grad=True)
    engine = todist.TaskParallel([p], timeout=1.0)
    engine.backward(lambda t: (p * t).sum(), TASKS)
    if todist.get_rank() == 1:
        return outcome(todist.barrier)
    return outcome(lambda: engine.backward(lambda t: (p * t).sum(), TASKS))


def a_rank_that_cannot_exchange() -> Any:
    """Return every rank's error if one fails after its tasks."""
    p = torch.ones(2, requires_grad=True)
    engine = todist.TaskParallel([p], timeout=30.0)

    def loss(task: float) -> Tensor:
        value = (p * task).sum()
        if todist.get_rank() == 1:
            value.register_hook(lambda g: setattr(engine.group.messages, "tell", no_room))
        return value

    try:
        return outcome(lambda: engine.backward(loss, TASKS))
    except MemoryError as error:
        return str(error)


def no_room(*args: Any) -> None:
    raise MemoryError("no room")


def outside_of_the_world() -> Any:
    """Return the errors of a forked process and of a rank that has left; then the last losses."""
    p = torch.ones(2, dtype=F64, requires_grad=True)
    engines = [todist.TaskParallel([p], schedule=how) for how in ("static", "dynamic")]
    told, tell = multiprocessing.Pipe(duplex=False)

    def refused() -> list[str]:
        found = []
        for engine in engines:
            try:
                engine.backward(lambda t: (p * t).sum(), TASKS)
                found.append("nothing")
            except RuntimeError as error:
                found.append(str(error))
        return found

    child = multiprocessing.get_context("fork").Process(target=lambda: tell.send(refused()))
    child.start()
    by_child = told.recv()
    child.join()
    losses = [engine.backward(lambda t: (p * t).sum(), TASKS).losses.tolist() for engine in engines]
    todist.shutdown()
    return by_child, refused(), losses


def lives_on() -> None:
    time.sleep(60.0)


def killed_beside_its_child(report: str) -> Any:
    """Die while a process that was forked in a task survives."""
    p = torch.ones(2, requires_grad=True)
    engine = todist.TaskParallel([p], timeout=30.0)

    def loss(task: float) -> Tensor:
        context = multiprocessing.get_context("fork")
        context.Process(target=os.getpid).start()  # one that comes to its end
        if todist.get_rank() == 1:
            context.Process(target=lives_on, daemon=True).start()
            time.sleep(0.2)
            die()
        return (p * task).sum()

    found = outcome(lambda: engine.backward(loss, TASKS))
    with open(f"{report}.{todist.get_rank()}", "w") as file:
        file.write(repr(found))


def inside_a_task() -> dict[str, Any]:
    """Return the errors of collective operations inside a task, by kind; then a step's losses."""
    p = torch.ones(2, dtype=F64, requires_grad=True)
    theta = torch.ones(2, dtype=F64, requires_grad=True)
    inner = todist.TaskParallel([theta], timeout=30.0)
    estimate = todist.zero_order(ZeroOrder(Gaussian(), num_samples=4))(lambda x: (x**2).sum())

    def step(task: float) -> None:
        inner.backward(lambda t: (theta * t).sum(), [1.0, 2.0])

    kinds: dict[str, Any] = {
        "step": step,
        "engine": lambda task: todist.TaskParallel([theta]),
        "call": lambda task: todist.remote_sync_call(abs, args=(task,), partitioner=0),
        "estimate": lambda task: estimate(theta),
        "barrier": lambda task: todist.barrier(),
        "barrier of two": lambda task: todist.barrier(["worker0", "worker2"]),
    }
    found: dict[str, Any] = {}
    for schedule in SCHEDULES:
        engine = todist.TaskParallel([p], schedule=schedule, timeout=30.0)
        for kind, operation in kinds.items():

            def loss(task: float, operation: Any = operation) -> Tensor:
                operation(task)
                return (p * task).sum()

            found[f"{kind}, {schedule}"] = outcome(functools.partial(engine.backward, loss, TASKS))
        step = engine.backward(lambda t: (p * t).sum(), TASKS)
        found[f"afterwards, {schedule}"] = step.losses.tolist()
    return found


def steps_of_two_threads() -> tuple[list[Any], list[Any]]:
    """Return whether losses are correct in steps by two threads at once, and then by one."""
    params = [torch.full((3,), scale, dtype=F64, requires_grad=True) for scale in (2.0, 3.0)]
    engines = [todist.TaskParallel([p], schedule=how) for p, how in zip(params, SCHEDULES)]
    together = threading.Barrier(2)

    def step(which: int, k: int) -> Any:
        p, tasks = params[which], [float(k + task) for task in TASKS]
        found = outcome(lambda: engines[which].backward(lambda t: (p * t).sum(), tasks))
        if isinstance(found, tuple):
            return found[2]
        return found.losses.tolist() == [3.0 * (which + 2) * task for task in tasks]

    def steps(which: int) -> list[Any]:
        found = []
        for k in range(30):
            together.wait(30.0)
            found.append(step(which, k))
        return found

    with ThreadPoolExecutor(2) as pool:
        at_once = [x for found in pool.map(steps, (0, 1)) for x in found]
    return at_once, [step(which, 50) for which in (0, 1)]


def group_in_a_task() -> Any:
    """Return the errors of a group first used in a task, and of uses after groups have ended."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    two = dist.new_group([0, 1])
    p = torch.ones(2, requires_grad=True)
    engine = todist.TaskParallel([p], timeout=30.0)

    def loss(task: float) -> Tensor:
        if dist.get_rank() < 2:
            todist.TaskParallel([p], group=two)
        return (p * task).sum()

    told = outcome(lambda: engine.backward(loss, TASKS))
    dist.destroy_process_group()
    try:
        todist.TaskParallel([p])
        afterwards = "nothing"
    except RuntimeError as error:
        afterwards = str(error)
    todist.shutdown()
    return told, afterwards


def estimates(how: str) -> Any:
    """Return every rank's error of an estimate that fails on the last rank, and a good estimate."""
    mine = todist.get_rank() == todist.get_world_size() - 1
    start = torch.ones(3, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        if mine and how == "raises" and not torch.equal(x, start):
            raise LookupError("bad point")
        return (x**2).sum()

    samples = 8 if mine and how == "samples" else 6
    engine = ZeroOrder(
        Gaussian(),
        "antithetic",
        num_samples=samples,
        sigma=0.1,
        vectorized=False,
        generator=torch.Generator().manual_seed(3),
    )
    x = torch.ones(4 if mine and how == "tensors" else 3, dtype=F64, requires_grad=True)
    told = outcome(lambda: todist.zero_order(engine)(loss)(x).backward())
    y = start.clone().requires_grad_()
    good = replace(engine, num_samples=4, generator=torch.Generator().manual_seed(4))
    todist.zero_order(good)(lambda y: (y**2).sum())(y).backward()
    return told, y.grad


@todist.auto_init_rpc(backend="gloo", timeout=30.0)
def run(name: str, *args: Any) -> Any:
    """Run one of the programs above in a collective world."""
    return globals()[name](*args)


def engines_of_before() -> Any:
    """Return the owners of a step if one rank had engines of its own before the world opened."""
    p = torch.ones(2, dtype=F64, requires_grad=True)
    if todist.get_rank() == 0:  # such as a check of the program in one process
        with mock.patch.dict(os.environ):
            del os.environ["WORLD_SIZE"]
            todist.TaskParallel([p]).backward(lambda t: (p * t).sum(), TASKS)
    return run("owners_of_dynamic_steps")


def owners_of_dynamic_steps() -> Any:
    p = torch.ones(2, dtype=F64, requires_grad=True)
    engine = todist.TaskParallel([p], schedule="dynamic")
    return outcome(lambda: engine.backward(lambda t: (p * t).sum(), TASKS).losses.tolist())


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def hub_that_stops_at_a_draw(report: str) -> None:
    """Write down the error of a rank that draws a task, across machines, from a stopped rank 0."""
    judge_within(3.0)
    p = torch.ones(2, requires_grad=True)
    engine = todist.TaskParallel([p], schedule="dynamic", timeout=1.5)
    see_no_files(engine)

    def loss(task: float) -> Tensor:
        if engine.steps == 1 and todist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if engine.steps == 1:
            time.sleep(0.3)
        return (p * task).sum()

    engine.backward(loss, TASKS)
    found = outcome(lambda: engine.backward(loss, TASKS))
    with open(f"{report}.{todist.get_rank()}", "w") as file:
        file.write(repr(found))
    raise RuntimeError("this run is over")


def turns_of_a_fork() -> tuple[bool, bool]:
    """Return whether a process that is forked beside a busy thread can take steps, and spawn."""
    told, tell = multiprocessing.Pipe(duplex=False)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with group._turn, launch._polling:
            held.set()
            over.wait(60.0)

    threading.Thread(target=hold).start()
    held.wait(60.0)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: tell.send(
            (group._turn.acquire(timeout=1.0), launch._polling.acquire(timeout=1.0))
        )
    )
    child.start()
    found: tuple[bool, bool] = told.recv()
    child.join()
    over.set()
    return found
