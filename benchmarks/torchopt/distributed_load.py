# SPDX-License-Identifier: Apache-2.0
"""The cost of `TaskParallel`, compared with a hand-written loop on torch.distributed.

From the root of the repository:

    python -m benchmarks.torchopt.distributed_load [--quick] [--seconds S] [--only TEXT]

starts two processes on this machine. In each row both sides do the same work. Their gradients are
compared before anything is timed, and then they take turns. Ratios are those of medians and of
minima. The results are stored in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchopt
import torchopt.distributed as todist
from benchmarks.harness.results import RESULTS, new_result, write_result
from torchopt.errors import WorkerError

NAME = "torchopt_distributed_load"
WORLD = 2


@dataclass
class Row:
    """Two ways to the same gradients.

    Attributes:
        name: The name of the row.
        ours: A step with torchopt.
        by_hand: The same without torchopt.
        params: The parameters that have the gradients afterwards.
        limit: Upper bound of the ratio.
        rival: The name of the other side.
    """

    name: str
    ours: Callable[[], Any]
    by_hand: Callable[[], Any]
    params: Sequence[Tensor]
    limit: float | None
    rival: str = "by hand"


def by_hand(params: Sequence[Tensor], loss: Callable[[Any], Tensor], tasks: Sequence[Any]) -> None:
    """Leave the gradient of the mean over tasks in `.grad`, on every rank."""
    size, rank, n = dist.get_world_size(), dist.get_rank(), len(tasks)
    for p in params:
        p.grad = None
    for i in range(n * rank // size, n * (rank + 1) // size):
        (loss(tasks[i]) / n).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


def cleared(params: Sequence[Tensor], step: Callable[[], Any]) -> None:
    for p in params:
        p.grad = None
    step()


def task_rows(counts: Sequence[int]) -> list[Row]:
    """Return rows of tiny tasks: the distance of four numbers from one."""
    theta = torch.ones(4, requires_grad=True)

    def loss(task: Any) -> Tensor:
        return ((theta - task) ** 2).sum()

    rows = []
    for n in counts:
        tasks = [float(i % 100) for i in range(n)]
        hand = partial(by_hand, [theta], loss, tasks)
        limit = 1.3 if n == 100 else 1.5
        for how in ("static", "dynamic"):
            engine = todist.TaskParallel([theta], schedule=how)
            ours = partial(cleared, [theta], partial(engine.backward, loss, tasks))
            rows.append(Row(f"{n} tasks, {how}", ours, hand, [theta], limit))
        if n > 2:
            engine = todist.TaskParallel([theta], tasks_at_once=None)
            columns = [torch.tensor(task) for task in tasks]
            ours = partial(cleared, [theta], partial(engine.backward, loss, columns))
            rows.append(Row(f"{n} tasks, by vmap", ours, hand, [theta], limit))
    return rows


def network_row() -> Row:
    """Return the row of data parallel training, 0.4 million parameters, against DDP."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    net = nn.Sequential(*layers)
    batches = torch.randn(64 * WORLD, 256).chunk(WORLD)
    ddp = nn.parallel.DistributedDataParallel(net)
    engine = todist.TaskParallel(net)

    def ours() -> None:
        net.zero_grad()
        engine.backward(lambda x: (net(x) ** 2).mean(), batches)

    def theirs() -> None:
        net.zero_grad()
        (ddp(batches[dist.get_rank()]) ** 2).mean().backward()

    return Row("0.4 M parameters", ours, theirs, list(net.parameters()), 1.05, "DDP")


def tree_row(count: int) -> Row:
    """Return the row of a tree of tensors of 4 MB."""
    params = [torch.randn(1000, 1000).requires_grad_() for _ in range(count)]

    def loss(task: float) -> Tensor:
        return torch.stack([(p * task).sum() for p in params]).sum()

    tasks = [1.0, 2.0]
    engine = todist.TaskParallel(params)
    ours = partial(cleared, params, partial(engine.backward, loss, tasks))
    hand = partial(by_hand, params, loss, tasks)
    return Row(f"a tree of {4 * count} MB", ours, hand, params, 0.95 if count >= 50 else None)


def check(row: Row) -> None:
    """Compare the gradients of both sides.

    Raises:
        RuntimeError: They differ.
    """
    row.by_hand()
    want = [p.grad.double().clone() for p in row.params if p.grad is not None]
    row.ours()
    for p, g in zip(row.params, want):
        assert p.grad is not None
        error = float((p.grad.double() - g).norm() / g.norm())
        if len(want) != len(row.params) or not error < 1e-5:
            raise RuntimeError(f"{row.name}: expected the gradients of {row.rival}, off by {error}")


def timed(row: Row, seconds: float) -> dict[str, Any]:
    """Return median and minimum of both sides, which take turns."""
    check(row)
    sides = {"ours": row.ours, "by_hand": row.by_hand}
    found: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    until = time.perf_counter() + seconds
    while True:
        for name, step in sides.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - started)
        sides = dict(reversed(sides.items()))
        enough = torch.tensor(float(time.perf_counter() > until and len(found["ours"]) >= 5))
        dist.all_reduce(enough, dist.ReduceOp.MIN)
        if enough:
            break
    cell: dict[str, Any] = {"row": row.name, "rival": row.rival, "limit": row.limit}
    for name, times in found.items():
        cell[name] = {"median": statistics.median(times), "min": min(times)}
    cell["steps"] = len(found["ours"])
    for which in ("median", "min"):
        cell[f"ratio_of_{which}s"] = cell["ours"][which] / cell["by_hand"][which]
    return cell


def resident() -> float:
    """Return the memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def memory(steps: int) -> list[float]:
    """Return the resident MiB of this rank at a quarter, a half and the end of many steps."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    engines = [todist.TaskParallel(net, schedule=how) for how in ("static", "dynamic")]
    batches = list(torch.randn(4, 8, 64))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    found = []
    for k in range(1, steps + 1):
        optimizer.zero_grad()
        engines[k % 2].backward(lambda x: (net(x) ** 2).mean(), batches)
        optimizer.step()
        if k in (steps // 4, steps // 2, steps):
            found.append(resident())
    return found


def many_leaves(x: Tensor) -> list[Tensor]:
    """Return 100,000 tensors."""
    return [torch.full((1,), float(i)) for i in range(int(x[0, 0]))]


many = todist.parallelize(todist.batch_partitioner, list)(many_leaves)


def leaves_row(leaves: int) -> dict[str, Any]:
    """Return the time of results with many leaves, one tree from each rank."""
    times = []
    for _ in range(3):
        dist.barrier()
        started = time.perf_counter()
        found = many(torch.full((WORLD, 1), float(leaves)))
        times.append(time.perf_counter() - started)
        if [float(tree[-1]) for tree in found] != [leaves - 1.0] * WORLD:
            raise RuntimeError(f"expected two trees of {leaves} leaves, got others")
    ours = {"median": statistics.median(times), "min": min(times)}
    return {"row": f"two result trees of {leaves} leaves", "ours": ours, "limit_seconds": 2.0}


@todist.auto_init_rpc(backend="collective")
def run_collective(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the rows of the collective backend in one process of the world."""
    torch.set_num_threads(1)
    quick, only = options["quick"], options["only"]
    makers: list[Callable[[], list[Row]]] = [
        partial(task_rows, (2, 100, 200 if quick else 10_000)),
        lambda: [network_row()],
        lambda: [tree_row(2 if quick else 50)],
    ]
    cells = []
    for make in makers:
        for row in make():
            if only in row.name:
                cells.append(timed(row, options["seconds"]))
    if only in "result trees":
        cells.append(leaves_row(1000 if quick else 100_000))
    if only in "memory":
        steps = 40 if quick else 2000
        cells.append({"row": f"memory over {steps} steps", "mib": memory(steps)})
    return cells


def square(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) ** 2).mean()


def sleeping(net: nn.Module, x: Tensor) -> Tensor:
    time.sleep(0.6)
    return (net(x) ** 2).mean()


on_the_last = todist.dim_partitioner(0, workers=[WORLD - 1])
remote_square = todist.parallelize(on_the_last, todist.sum_reducer)(square)
remote_sleep = todist.parallelize(on_the_last, todist.sum_reducer, timeout=0.3)(sleeping)


@todist.auto_init_rpc()
@todist.rank_zero_only
def run_remote(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the memory of caller and worker over many remote calls, late ones included."""
    torch.set_num_threads(1)
    steps, late = (40, 2) if options["quick"] else (2000, 20)
    net = nn.Linear(200, 250)
    x = torch.randn(4, 200)
    found: list[list[float]] = []

    def note() -> None:
        theirs = todist.remote_sync_call(resident, partitioner=WORLD - 1)[0]
        found.append([resident(), theirs])

    for k in range(1, steps + 1):
        net.zero_grad()
        with todist.autograd.context() as context_id:
            todist.autograd.backward(context_id, remote_square(todist.share(net), x))
        with torch.no_grad():
            for p in net.parameters():
                p -= 1e-4 * p.grad
        if k in (steps // 4, steps // 2, steps):
            note()
    for _ in range(late):
        with torch.no_grad():
            net.weight.mul_(0.99)
        try:
            remote_sleep(todist.share(net), x)
        except WorkerError:
            continue
        raise RuntimeError("expected a call that is late")
    time.sleep(2.0)
    note()
    caller, worker = ([row[side] for row in found] for side in (0, 1))
    name = f"memory over {steps} remote calls, then {late} late ones"
    return [
        {"row": f"{name}: caller", "mib": caller},
        {"row": f"{name}: worker", "mib": worker},
    ]


def lines(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Return the results as text."""
    found = []
    for cell in cells:
        if "by_hand" in cell:
            ours, theirs = cell["ours"], cell["by_hand"]
            limit = "" if cell["limit"] is None else f" (at most {cell['limit']:g})"
            found.append(
                f"{cell['row']:24} {1e3 * ours['median']:9.3f} ms, {cell['rival']} "
                f"{1e3 * theirs['median']:9.3f} ms: {cell['ratio_of_medians']:.2f} of medians, "
                f"{cell['ratio_of_mins']:.2f} of minima{limit}"
            )
        elif "mib" in cell:
            found.append(f"{cell['row']}: {', '.join(f'{x:.1f}' for x in cell['mib'])} MiB")
        else:
            ours = cell["ours"]
            limit = f" (at most {cell['limit_seconds']:g})"
            times = f"{ours['median']:.2f} s, at best {ours['min']:.2f} s"
            found.append(f"{cell['row']}: {times}{limit}")
    return found


def measure(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of all rows."""
    from benchmarks.torchopt import distributed_load as program  # workers import it by this name

    start = partial(todist.spawn, nprocs=WORLD, args=(options,), start_method="forkserver")
    first, *others = start(program.run_collective)
    for k, cell in enumerate(list(first)):
        for rank, other in enumerate(others, 1):
            if "mib" in cell:
                name = f"{cell['row']}: rank {rank}"
                first.append({"row": name, "mib": other[k]["mib"]})
    if options["only"] in "memory":
        first += start(program.run_remote)[0]
    return first


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small rows, nothing is stored")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--only", default="", help="rows with this text; nothing is stored")
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["torch", "torchopt.distributed", "torch._dynamo"])
    versions = {
        "available": True,
        "label": "torchopt",
        "versions": {"torch": torch.__version__, "torchopt": torchopt.__version__},
    }
    result = new_result(NAME, {"torchopt": versions}, {"processes": WORLD, **options})
    result["cells"] = measure(options)
    print("\n".join(lines(result["cells"])))
    if not options["quick"] and not options["only"]:
        path = RESULTS / f"{NAME}.json"
        write_result(result, path)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
