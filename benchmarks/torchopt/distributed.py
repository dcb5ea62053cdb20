# SPDX-License-Identifier: Apache-2.0
"""Time MAML meta-steps on the digits tasks: one process against several, on both backends.

From the root of the repository:

    python -m benchmarks.torchopt.distributed [--quick] [--rounds N]

starts the worlds on this machine, in turns, and writes the results into `benchmarks/results`.
On many machines or GPUs, one command on each of them:

    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-endpoint HOST:PORT \\
        -m benchmarks.torchopt.distributed --backend collective [--device cuda]

A meta-step is split into computing (the slowest rank's forward and backward passes), transfer
(waiting for bytes and for slower ranks) and overhead (everything else: drawing tasks, filling
buckets, pickling, the outer step). The speed-up is over a loop of one process without
torchopt.distributed.

The model behind the predictions has a few numbers, each measured separately: c, the seconds of a
task; h, those of a step without tasks; alpha and beta, the seconds of a message and of a byte; and
g, those in which rank 0 packs and unpacks what one remote call needs. With n workers on k cores,
T tasks and P bytes of parameters

    collective   ceil(T/n) max(1, min(n, T)/k) c + h + 2 s (n-1) alpha + 2 (n-1)/n P beta
    rpc          ceil(T/n) max(1, min(n, T)/k) c + h + n (g + m alpha + 2 P beta)

where s buckets are summed, each around a ring, and m = 3 messages of a remote call wait for one
another: parameters and call, the backward pass, and the clean-up of the context. With remote calls
rank 0 talks to each worker separately.

The model is checked against worlds of 1 to 4 processes, and then says what 8 to 1024 workers do.
`ASSUMPTIONS` lists what it assumes for them.

The clock of a shared machine measures its other users as well. The processor time of the busiest
process, also printed, is what the clock would show if each process had its own core.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt
import torchopt.distributed as todist
from benchmarks.harness.examples import load_example
from benchmarks.harness.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
Params = dict[str, Tensor]

RESULTS = ROOT / "benchmarks" / "results" / "torchopt_distributed.json"

WORKERS = tuple(2**k for k in range(3, 11))
ASSUMPTIONS = (
    "Each worker has a core of its own, all tasks take the same time, and no message is hidden "
    "behind the backward pass.\n"
    "Each message takes as long as one between two processes of the measured machine, over its "
    "loopback interface.\n"
    "The last assumption limits the prediction: a ring waits for 2 (n - 1) messages one after the "
    "other, and a network with ten times the latency makes that part ten times as long."
)


@dataclass(frozen=True)
class Setting:
    """What a meta-step is.

    Attributes:
        tasks: T, in a meta-step.
        inner_steps: Differentiated steps of the adaptation.
        width: Units of the two hidden layers.
        queries: Query images of each digit.
        steps: Timed meta-steps in a run; two more come before them.
        device: Where the tensors are.
    """

    tasks: int = 16
    inner_steps: int = 5
    width: int = 256
    queries: int = 15
    steps: int = 12
    device: str = "cpu"


class Problem:
    """Tasks, parameters and the loss of a task."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device(setting.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", todist.get_local_rank())
            torch.cuda.set_device(self.device)
        example = load_example("maml_digits")
        self.learner = example.Learner(setting.width)
        start = self.learner.fresh_params(0)
        self.params = {k: p.to(self.device).requires_grad_() for k, p in start.items()}
        self.inner = torchopt.sgd(0.1)
        self.outer = torchopt.Adam(self.params.values(), lr=1e-3)
        self.sampler = example.TaskSampler("train", 1)

    def draw(self) -> list[tuple[Tensor, ...]]:
        drawn = self.sampler.draw(self.setting.tasks, self.setting.queries).tensors()
        return list(zip(*(x.to(self.device) for x in drawn)))

    def loss(self, params: Params, task: tuple[Tensor, ...]) -> Tensor:
        steps = self.setting.inner_steps
        adapted = self.learner.adapt(params, task[0], task[1], self.inner, steps, first_order=False)
        return self.learner.query(adapted, task[2], task[3])[0]

    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.params.values())


def timed(setting: Setting, step: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """Run meta-steps and return the split of each, in seconds."""
    rows = []
    for number in range(setting.steps + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        used, started = time.process_time(), time.perf_counter()
        row = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row["total"] = time.perf_counter() - started
        row.setdefault("cpu", time.process_time() - used)
        if number >= 2:
            rows.append(row)
    return rows


def run_sequential(setting: Setting) -> dict[str, Any]:
    """A loop over tasks, and the numbers of the model that need one process."""
    problem = Problem(setting)

    def step() -> dict[str, float]:
        tasks = problem.draw()
        problem.outer.zero_grad()
        started = time.perf_counter()
        for task in tasks:
            (problem.loss(problem.params, task) / len(tasks)).backward()
        compute = time.perf_counter() - started
        problem.outer.step()
        return {"compute": compute, "transfer": 0.0}

    def vmapped() -> dict[str, float]:
        tasks = [torch.stack(x) for x in zip(*problem.draw())]
        problem.outer.zero_grad()
        started = time.perf_counter()
        loss = torch.func.vmap(lambda *task: problem.loss(problem.params, task))(*tasks)
        loss.mean().backward()
        compute = time.perf_counter() - started
        problem.outer.step()
        return {"compute": compute, "transfer": 0.0}

    rows, end = timed(setting, step), end_of(problem)
    return {
        "rows": rows,
        "vmapped": timed(setting, vmapped),
        "end": end,
        "parameter_bytes": problem.bytes(),
    }


def end_of(problem: Problem) -> float:
    """Return a number that shows whether runs end in the same place."""
    return sum(p.detach().double().abs().sum().item() for p in problem.params.values())


@todist.auto_init_rpc(backend="collective")
def run_collective(setting: Setting) -> dict[str, Any]:
    problem = Problem(setting)
    engine = todist.TaskParallel(problem.params, bucket_bytes=2**18, seed=None)
    engine.group.slots = None  # the model describes machines, which share no memory
    sent = sums = 0

    def step() -> dict[str, float]:
        nonlocal sent, sums
        before = engine.group.operations
        tasks = problem.draw()
        problem.outer.zero_grad()
        found = engine.backward(lambda task: problem.loss(problem.params, task), tasks)
        problem.outer.step()
        sent = found.bytes_sent
        # Across machines the first check is an operation too, beside the tasks.
        sums = engine.group.operations - before - (engine.group.messages is None)
        return {"compute": found.compute_seconds, "transfer": found.transfer_seconds}

    rows = timed(setting, step)
    return {
        "rows": rows,
        "end": end_of(problem),
        "bytes_per_step": sent,
        "sums_per_step": sums,
        "latency": collective_latency(engine.group, problem.bytes()),
    }


def collective_latency(group: Any, size: int) -> dict[str, float]:
    """Return the seconds of a sum of one number, and of one of the size of the parameters."""
    found = {}
    for name, n in (("small", 1), ("large", size // 4)):
        x = torch.zeros(n)
        found[name] = min(_seconds(partial(group.sum_, x)) for _ in range(30))
    return found


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


_problems: dict[Setting, Problem] = {}
_spent = {"seconds": 0.0, "started": 0.0}


def remote_part(params: Params, setting: Setting, *tasks: Tensor) -> Tensor:
    """Return the sum of the losses of some tasks; note the time, backward included."""
    if setting not in _problems:
        _problems[setting] = Problem(setting)
    problem = _problems[setting]
    started = time.perf_counter()

    def begin(g: Tensor) -> None:
        _spent["started"] = time.perf_counter()

    def end(g: Tensor) -> None:
        # Called for every parameter; the last call is the end of the backward pass.
        now = time.perf_counter()
        _spent["seconds"] += now - _spent["started"]
        _spent["started"] = now

    for p in params.values():
        if p.requires_grad:
            p.register_hook(end)
    rows = list(zip(*(x.unbind(0) for x in tasks)))
    total = torch.stack([problem.loss(params, row) for row in rows]).mean()
    if total.requires_grad:
        total.register_hook(begin)
    _spent["seconds"] += time.perf_counter() - started
    return total


remote_loss = todist.parallelize(todist.dim_partitioner(0), todist.weighted_mean_reducer)(
    remote_part
)


@todist.parallelize(todist.dim_partitioner(0), todist.sum_reducer)
def remote_nothing(params: Params, x: Tensor) -> Tensor:
    """Return a value that depends on the parameters, for hardly any computation."""
    return torch.stack([p.view(-1)[0] for p in params.values()]).sum() * x.sum()


def packing(problem: Problem) -> float:
    """Return the processor time that a call of one worker takes here, packing and unpacking."""
    times = []
    x = torch.ones(todist.get_world_size(), 1)
    for _ in range(10):
        with torch.no_grad():
            for p in problem.params.values():  # a new version, as after an optimizer step
                p.mul_(1.0 + 1e-6)
        problem.outer.zero_grad()
        used = time.process_time()
        with todist.autograd.context() as context_id:
            loss = remote_nothing(todist.share(problem.params), x)
            todist.autograd.backward(context_id, loss)
        times.append(time.process_time() - used)
    return min(times) / len(x)


def spent() -> float:
    """Return the seconds of computing since the last time this was asked."""
    seconds, _spent["seconds"] = _spent["seconds"], 0.0
    return seconds


def processor_time() -> float:
    """Return the seconds of processor time that this process has used."""
    return time.process_time()


def echo(x: Tensor | None) -> Tensor | None:
    return x


@todist.auto_init_rpc()
@todist.rank_zero_only
def run_rpc(setting: Setting) -> dict[str, Any]:
    problem = Problem(setting)
    ranks = range(todist.get_world_size())

    def used() -> list[float]:
        return [todist.remote_sync_call(processor_time, partitioner=r)[0] for r in ranks[1:]]

    def step() -> dict[str, float]:
        before = used()
        own = time.process_time()  # without the questions
        tasks = [torch.stack(x) for x in zip(*problem.draw())]
        problem.outer.zero_grad()
        started = time.perf_counter()
        with todist.autograd.context() as context_id:
            loss = remote_loss(todist.share(problem.params), setting, *tasks)
            todist.autograd.backward(context_id, loss)
        called = time.perf_counter() - started
        problem.outer.step()
        own = time.process_time() - own
        cpu = max([own, *(b - a for a, b in zip(before, used()))])
        compute = max(todist.remote_sync_call(spent, partitioner=r)[0] for r in ranks)
        return {"compute": compute, "transfer": called - compute, "cpu": cpu}

    rows, end = timed(setting, step), end_of(problem)
    todist.wire_stats(reset=True)
    step()
    stats = todist.wire_stats()
    block = torch.zeros(problem.bytes() // 4)
    last = todist.get_world_size() - 1
    return {
        "rows": rows,
        "end": end,
        "bytes_per_step": asdict(stats),
        "latency": {
            "packing": packing(problem),
            "small": min(
                _seconds(lambda: todist.rpc.rpc_sync(last, echo, (None,))) for _ in range(30)
            ),
            "large": min(
                _seconds(lambda: todist.rpc.rpc_sync(last, echo, (block,))) for _ in range(15)
            ),
        },
    }


MAINS = {"collective": run_collective, "rpc": run_rpc}


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The seconds of a meta-step as a function of the number of workers.

    Attributes:
        task: c.
        step: h.
        alpha: Of a message.
        beta: Of a byte.
        tasks: T.
        parameter_bytes: P.
        sums: s.
        packing: g.
    """

    backend: str
    task: float
    step: float
    alpha: float
    beta: float
    tasks: int
    parameter_bytes: int
    sums: int
    packing: float = 0.0

    def parts(self, workers: int, cores: int) -> dict[str, float]:
        """Return compute, latency, bandwidth and step of one meta-step."""
        n, p = workers, self.parameter_bytes
        rounds = math.ceil(self.tasks / n) * max(1.0, min(n, self.tasks) / cores)
        if n == 1:
            latency = transfer = 0.0
        elif self.backend == "collective":
            latency = 2 * self.sums * (n - 1) * self.alpha
            transfer = 2 * (n - 1) / n * p * self.beta
        else:
            latency, transfer = 3 * n * self.alpha, 2 * n * p * self.beta
        return {
            "computing": rounds * self.task,
            "latency of messages": latency,
            "bytes of parameters and gradients": transfer,
            "packing of calls": n * self.packing if n > 1 else 0.0,
            "the step itself": self.step,
        }

    def seconds(self, workers: int, cores: int) -> float:
        return sum(self.parts(workers, cores).values())

    def prediction(self, workers: int, sequential: float) -> dict[str, Any]:
        """Return the speed-up with a core for each worker, and what keeps it from `workers`."""
        parts = self.parts(workers, workers)
        total = sum(parts.values())
        # What each part costs beyond an equal share of the sequential work.
        ideal = sequential / workers
        lost = {**parts, "computing": parts["computing"] - self.task * self.tasks / workers}
        lost["tasks that do not divide"] = lost.pop("computing")
        lost["the step itself"] -= (sequential - self.task * self.tasks) / workers
        return {
            "workers": workers,
            "tasks": self.tasks,
            "seconds": total,
            "speed_up": sequential / total,
            "ideal_seconds": ideal,
            "lost_seconds": lost,
            "limit": max(lost, key=lambda name: lost[name]),
        }


def fit(backend: str, runs: dict[str, Any], setting: Setting) -> Model:
    """Return the model from single measurements; no measured speed-up goes into it."""
    alone = runs["sequential"]
    size = alone["parameter_bytes"]
    measured = runs[f"{backend} 2"]["latency"]
    if backend == "collective":  # of two ranks: 2 (n - 1) alpha, and 2 (n - 1)/n P = P bytes
        alpha = measured["small"] / 2
        beta = max(measured["large"] - measured["small"], 0.0) / size
    else:  # there and back
        alpha = measured["small"]
        beta = max(measured["large"] - measured["small"], 0.0) / (2 * size)
    # Processor time: that of the clock depends on who else uses the machine.
    share = alone["best"]["compute"] / alone["best"]["total"]
    return Model(
        backend,
        alone["cpu"] * share / setting.tasks,
        alone["cpu"] * (1 - share),
        alpha,
        beta,
        setting.tasks,
        size,
        runs[f"{backend} 2"].get("sums_per_step", 1),
        measured.get("packing", 0.0),
    )


def predictions(model: Model) -> list[dict[str, Any]]:
    """Return what many workers do with the tasks that were measured, and with 1024 of them."""
    rows = []
    for tasks in (model.tasks, max(WORKERS)):
        more = replace(model, tasks=tasks)
        alone = model.task * tasks + model.step
        rows += [more.prediction(n, alone) for n in WORKERS]
    return rows


# --- running --------------------------------------------------------------------------------------


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the fastest meta-step, the medians, and the least processor time."""
    for row in rows:
        row["overhead"] = row["total"] - row["compute"] - row["transfer"]
    best = min(rows, key=lambda row: row["total"])
    medians = {name: statistics.median(row[name] for row in rows) for name in best}
    return {"best": best, "median": medians, "cpu": min(row["cpu"] for row in rows)}


def slowest(results: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the result of a world: of every step the split of the rank that computed longest."""
    found = [result for result in results if result is not None]
    rows = []
    for step in zip(*(r["rows"] for r in found)):
        row = max(step, key=lambda row: row["compute"])
        rows.append({**row, "cpu": max(other["cpu"] for other in step)})
    return {**found[0], "rows": rows}


def run_world(backend: str, size: int, setting: Setting) -> dict[str, Any]:
    from benchmarks.torchopt import distributed as program  # not __main__: workers import it

    main = program.MAINS[backend]
    theirs = program.Setting(**asdict(setting))
    return slowest(spawned(main, size, theirs))


def spawned(main: Callable[..., Any], size: int, setting: Any) -> list[Any]:
    """Return the results of a world whose processes, even a single one, have one thread each."""
    one = {"OMP_NUM_THREADS": "1"}
    return todist.spawn(main, size, (setting,), env=one, start_method="forkserver", timeout=900)


def measure(setting: Setting, rounds: int, sizes: list[int]) -> dict[str, Any]:
    """Return the results of all worlds, run in turns so that a busy minute spares none."""
    from benchmarks.torchopt import distributed as program

    runs: dict[str, Any] = {}
    theirs = program.Setting(**asdict(setting))
    for number in range(rounds):
        (alone,) = spawned(program.run_sequential, 1, theirs)
        keep(runs, "sequential", alone)
        for backend in MAINS:
            for size in sizes:
                keep(runs, f"{backend} {size}", run_world(backend, size, setting))
        print(f"round {number + 1} of {rounds} done", flush=True)
    for run in runs.values():
        run.update(summary(run.pop("rows")))
        if "vmapped" in run:
            run["vmapped"] = summary(run["vmapped"])
    ends = {name: run["end"] for name, run in runs.items()}
    far = {name: end for name, end in ends.items() if abs(end / ends["sequential"] - 1) > 1e-4}
    if far:
        raise RuntimeError(f"expected every run to end in the same place, got {ends}")
    return runs


def keep(runs: dict[str, Any], name: str, run: dict[str, Any]) -> None:
    """Add the steps of another round to those of a run; of latencies keep the smallest."""
    if name not in runs:
        runs[name] = run
        return
    for key in ("rows", "vmapped"):
        if key in run:
            runs[name][key] += run[key]
    if "latency" in run:
        runs[name]["latency"] = {
            k: min(v, run["latency"][k]) for k, v in runs[name]["latency"].items()
        }


def tables(result: dict[str, Any]) -> str:
    """Return the results as text."""
    runs, lines = result["runs"], []
    sequential = runs["sequential"]["best"]["total"]
    lines.append(
        f"{'':14}{'ms/meta-step':>13}{'compute':>10}{'transfer':>10}{'overhead':>10}"
        f"{'speed-up':>10}{'CPU ms':>9}{'speed-up':>10}{'model':>8}"
    )
    for name, run in runs.items():
        best = run["best"]
        model = result["check"].get(name, {}).get("predicted_speed_up")
        lines.append(
            f"{name:14}{1e3 * best['total']:13.1f}{1e3 * best['compute']:10.1f}"
            f"{1e3 * best['transfer']:10.1f}{1e3 * best['overhead']:10.1f}"
            f"{sequential / best['total']:10.2f}{1e3 * run['cpu']:9.1f}"
            f"{runs['sequential']['cpu'] / run['cpu']:10.2f}" + (f"{model:8.2f}" if model else "")
        )
    vmapped = runs["sequential"]["vmapped"]["best"]["total"]
    lines.append(f"one process with vmap over the tasks: {1e3 * vmapped:.1f} ms a meta-step")
    for name, row in result["check"].items():
        if "measured_sum_seconds" in row:
            lines.append(
                f"{name}: a sum of the parameters takes {1e3 * row['measured_sum_seconds']:.2f} ms,"
                f" by the model {1e3 * row['predicted_sum_seconds']:.2f}"
            )
    for backend, predictions in result["predictions"].items():
        for row in predictions:
            lines.append(
                f"{backend}, {row['tasks']} tasks, {row['workers']} workers on as many cores: "
                f"speed-up {row['speed_up']:.1f}; the most is lost to {row['limit']}"
            )
    lines.append(ASSUMPTIONS)
    return "\n".join(lines)


def check(runs: dict[str, Any], models: dict[str, Model]) -> dict[str, Any]:
    """Return, for every world, what the model says and what was measured.

    Speed-ups are compared in processor time of the busiest process, which is what the clock would
    show with a core for each; sums over the ranks as they are, also at numbers of ranks that the
    model has not seen.
    """
    sequential = runs["sequential"]["cpu"]
    found = {}
    for name, run in runs.items():
        backend, _, size = name.partition(" ")
        if not size:
            continue
        n, model = int(size), models[backend]
        parts = model.parts(n, n)
        local = ("computing", "packing of calls", "the step itself")
        predicted = sequential / sum(parts[name] for name in local)
        row = {
            "measured_speed_up": sequential / run["cpu"],
            "predicted_speed_up": predicted,
            "relative_error": predicted * run["cpu"] / sequential - 1,
            "speed_up_by_the_clock": runs["sequential"]["best"]["total"] / run["best"]["total"],
        }
        if backend == "collective" and n > 1:
            row["measured_sum_seconds"] = run["latency"]["large"]
            # One sum of all parameters.
            row["predicted_sum_seconds"] = (
                parts["latency of messages"] / model.sums
                + parts["bytes of parameters and gradients"]
            )
        found[name] = row
    return found


def run_under_launcher(setting: Setting, backend: str) -> None:
    """Measure the world that torchrun has started; rank 0 prints."""
    found = MAINS[backend](setting)
    if backend == "collective":
        group = todist.task_parallel.Group()
        gathered = group.gather_objects(found)
    else:
        gathered = [found]
    if todist.get_rank() == 0:
        row = slowest(gathered)
        row.update(summary(row.pop("rows")))
        row["world_size"] = todist.get_world_size()
        row["backend"] = backend
        print(json.dumps(row))


def main() -> None:
    """Measure, check the model, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small tasks, one round, not stored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--tasks", type=int, default=Setting.tasks)
    parser.add_argument("--backend", choices=sorted(MAINS), default="collective")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    setting = Setting(tasks=options.tasks, device=options.device)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        run_under_launcher(setting, options.backend)
        return
    # Worlds are forked from a process that has done the imports, those of first use as well.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch._dynamo", "torchopt.distributed", "sklearn.datasets"]
    )
    rounds = options.rounds
    if options.quick:
        setting, rounds = replace(setting, width=32, steps=3, tasks=4), 1
    machine = describe_machine()
    runs = measure(setting, rounds, options.sizes)
    models = {backend: fit(backend, runs, setting) for backend in MAINS}
    result = {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchopt": torchopt.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "method": "fastest meta-step of all rounds, worlds in turns, one thread a process",
        "setting": asdict(setting),
        "runs": runs,
        "models": {name: asdict(model) for name, model in models.items()},
        "check": check(runs, models),
        "assumptions": ASSUMPTIONS,
        "predictions": {name: predictions(model) for name, model in models.items()},
    }
    print(tables(result))
    if not options.quick:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
