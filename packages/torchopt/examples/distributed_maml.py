# SPDX-License-Identifier: Apache-2.0
"""MAML on digits by several processes: the same meta-gradients, by collectives or by remote calls.

The processes share the tasks of a meta-step. With `--backend collective` every process runs this
program and takes groups of tasks from a shared counter, and the meta-gradients are summed while the
last backward pass still runs. With `--backend rpc` the first process calls the others: it sends
them the initial parameters once per meta-step, and gets the gradients back through torch's
distributed autograd. Both compute the result of a single process; the difference is measured.

The tasks are those of `maml_digits.py`: secret codes of digits, one labelled image of each.

References:
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, https://arxiv.org/abs/1703.03400

Run `torchrun --standalone --nproc-per-node 2 distributed_maml.py` (about a minute), without
torchrun `python distributed_maml.py --nproc 2`, or on many machines, on each of them,
`torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HOST:PORT distributed_maml.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt
import torchopt.distributed as todist

# The processes import this file and the files beside it by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from example_tools import flat_table, progress
from maml_digits import Learner, Params, TaskSampler


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Outer steps.
        tasks_per_step: Tasks of one outer step.
        group: Tasks that a process takes at once and runs by one vmap.
        queries: Query images of each digit in a task.
        inner_steps: Gradient steps of the adaptation.
        inner_lr: Step size of the adaptation.
        outer_lr: Step size of Adam on the initial parameters.
        width: Units of the two hidden layers.
        test_tasks: Meta-test tasks.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 400
    tasks_per_step: int = 16
    group: int = 2
    queries: int = 5
    inner_steps: int = 3
    inner_lr: float = 0.4
    outer_lr: float = 2e-3
    width: int = 64
    test_tasks: int = 200
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(meta_steps=4, tasks_per_step=6, test_tasks=8)}


class Training:
    """The parts that do not depend on the number of processes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.learner = Learner(config.width)
        self.inner = torchopt.sgd(config.inner_lr)
        self.sampler = TaskSampler("train", config.seed + 1)
        start = self.learner.fresh_params(config.seed)
        self.params = {name: p.double().requires_grad_() for name, p in start.items()}
        self.learner.net.double()
        self.outer = torchopt.Adam(self.params.values(), lr=config.outer_lr)

    def draw(self) -> tuple[Tensor, ...]:
        """Return the tasks of a meta-step; every process that asks draws the same."""
        drawn = self.sampler.draw(self.config.tasks_per_step, self.config.queries).tensors()
        return tuple(x.double() if x.is_floating_point() else x for x in drawn)

    def loss(self, params: Params, *tasks: Tensor) -> Tensor:
        """Return the mean query loss after adaptation."""

        def one(support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
            steps = self.config.inner_steps
            adapted = self.learner.adapt(
                params, support, labels, self.inner, steps, first_order=False
            )
            return self.learner.query(adapted, query, query_labels)[0]

        return torch.func.vmap(one)(*tasks).mean()

    def accuracy(self, steps: int) -> float:
        """Return the accuracy on meta-test tasks after `steps` inner steps."""
        config = self.config
        tasks = TaskSampler("test", config.seed + 5).draw(config.test_tasks, config.queries)
        params = {name: p.detach().float() for name, p in self.params.items()}
        self.learner.net.float()
        found = self.learner.evaluate(params, tasks, self.inner, steps)
        self.learner.net.double()
        return found.mean().item()

    def results(self, losses: list[float], seconds: list[float]) -> dict[str, Any]:
        """Return the results of a run."""
        return {
            "losses": losses,
            "meta_step_ms": 1e3 * sorted(seconds)[len(seconds) // 2],
            "before": self.accuracy(0),
            "after": self.accuracy(self.config.inner_steps),
            "world_size": todist.get_world_size(),
        }


def groups(tasks: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """Return tasks in groups of `size`; the last one may be smaller."""
    return list(zip(*(x.split(size) for x in tasks)))


def steps(config: Config) -> Iterator[int]:
    """Yield the numbers of the meta-steps; the first process shows the progress."""
    label = f"MAML, {todist.get_world_size()} processes"
    with progress(config.meta_steps, label, shown=todist.get_rank() == 0) as bar:
        for step in range(config.meta_steps):
            yield step
            bar.update()


@todist.auto_init_rpc(backend="collective")
def train_collectively(config: Config) -> dict[str, Any]:
    """Train in every process; all have the same parameters after every step."""
    training = Training(config)
    engine = todist.TaskParallel(training.params, schedule="dynamic")
    losses, seconds = [], []
    for _ in steps(config):
        tasks = groups(training.draw(), config.group)
        started = time.perf_counter()
        training.outer.zero_grad()
        step = engine.backward(
            lambda group: training.loss(training.params, *group),
            tasks,
            weights=[len(group[0]) for group in tasks],
        )
        training.outer.step()
        seconds.append(time.perf_counter() - started)
        losses.append(step.loss.item())
    return training.results(losses, seconds)


_worker: dict[Config, Training] = {}


@todist.parallelize(todist.dim_partitioner(0), todist.weighted_mean_reducer, timeout=300)
def remote_loss(params: Params, config: Config, *tasks: Tensor) -> Tensor:
    """Return the mean query loss over some of the tasks."""
    if config not in _worker:
        _worker[config] = Training(config)
    return _worker[config].loss(params, *tasks)


@todist.auto_init_rpc()
@todist.rank_zero_only
def train_by_remote_calls(config: Config) -> dict[str, Any]:
    """Train in the first process, which calls the others."""
    training = Training(config)
    losses, seconds = [], []
    for _ in steps(config):
        tasks = training.draw()
        started = time.perf_counter()
        training.outer.zero_grad()
        with todist.autograd.context() as context_id:
            loss = remote_loss(todist.share(training.params), config, *tasks)
            todist.autograd.backward(context_id, loss)
        training.outer.step()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return training.results(losses, seconds)


MAINS = {"collective": train_collectively, "rpc": train_by_remote_calls}


def report(results: dict[str, Any], alone: dict[str, Any] | None) -> bool:
    """Print the table and return whether meta-learning worked and the processes agree."""
    table = [["processes", "ms/meta-step", "before adaptation", "after"]]
    for row in (results, *([] if alone is None else [alone])):
        table.append(
            [
                f"{row['world_size']}, {results['backend']}",
                f"{row['meta_step_ms']:.1f}",
                f"{100 * row['before']:.1f} %",
                f"{100 * row['after']:.1f} %",
            ]
        )
    print(flat_table(table))
    reached = results["after"] - results["before"] > 0.4
    if alone is not None:
        pairs = zip(results["losses"], alone["losses"])
        results["distance"] = max(abs(a - b) / abs(b) for a, b in pairs)
        print(
            f"the meta-losses of all {len(alone['losses'])} steps agree with those of one process "
            f"to {results['distance']:.1e}"
        )
        reached &= results["distance"] < 1e-6
    return reached


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when it did not learn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=sorted(MAINS), default="collective")
    parser.add_argument("--nproc", type=int, default=2, help="processes, without torchrun (2)")
    parser.add_argument("--smoke", action="store_true", help="seconds; too short to be judged")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = Config(
        **{**asdict(PRESETS["smoke" if options.smoke else "full"]), "seed": options.seed}
    )
    train = MAINS[options.backend]
    torch.set_num_threads(1)
    # Processes are forked from one that has done all imports, including the lazy ones.
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torchopt.distributed"])
    alone = None
    if "RANK" in os.environ:  # torchrun has started the processes
        found = [train(config)]
    else:
        found = todist.spawn(train, options.nproc, (config,), start_method="forkserver")
        alone = todist.spawn(train, 1, (config,), start_method="forkserver")[0]
    if found[0] is None or todist.get_rank() != 0:
        return 0
    results = {"backend": options.backend, "config": asdict(config), **found[0]}
    reached = report(results, alone)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"distributed_maml_{options.backend}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {path}")
    if options.smoke:
        print("smoke run: too short, not judged")
        return 0
    print("reached" if reached else "NOT REACHED: the result of the paper did not come out")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
