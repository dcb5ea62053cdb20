# SPDX-License-Identifier: Apache-2.0
"""Meta-learning with implicit gradients: iMAML compared with MAML on codes of digits.

The tasks are those of `maml_digits.py`: one labelled image of each of ten digits, whose labels are
permuted by a secret code. Implicit MAML adapts by solving a proximal problem,

    phi*(theta) = argmin_phi  support_loss(phi) + lam / 2 |phi - theta|^2 ,

by any number of gradient steps, and differentiates the equation that phi* solves:

    d phi* / d theta = (I + H / lam)^-1 ,   H the Hessian of the support loss at phi* ,

by a few steps of conjugate gradients. The memory of a meta-step is that of one inner gradient for
any number of inner steps; explicit MAML keeps every step.

Compared: MAML through the three steps of `maml_digits.py`, MAML through all inner steps of iMAML,
and iMAML; accuracy on unseen images and codes, time and memory of a meta-step, in one table.

iMAML is written as functions, which `vmap` runs on all tasks at once, and as a module, which an
optimizer of torch adapts to one task after the other. The module starts from the parameters that
the functions learned, and must reproduce their meta-gradient and accuracy.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    A. Rajeswaran, C. Finn, S. Kakade, S. Levine, Meta-Learning with Implicit Gradients, NeurIPS
    2019, equations 3 and 6, https://arxiv.org/abs/1909.04630
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, https://arxiv.org/abs/1703.03400

Deviations: a dense network on digits; plain gradient descent as the inner solver.

Run `python imaml_digits.py` (a few minutes) or with `--smoke`.
"""

from __future__ import annotations

import copy
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from maml_digits import Learner, Tasks, TaskSampler
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import torchopt
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import CG
from torchopt.nn import ImplicitMetaGradientModule

Params = dict[str, Tensor]
Adapt = Callable[[Params, Tensor, Tensor], Params]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Outer steps of each method.
        tasks_per_step: Tasks averaged in one outer step.
        queries: Query images of each digit in a task.
        short_steps: Inner steps of MAML as in `maml_digits.py`.
        inner_steps: Inner steps of iMAML, and of the second run of MAML.
        inner_lr: Step size of the adaptation.
        lam: Weight of the proximal term, which keeps the adapted parameters near the initial ones.
        cg_steps: Steps of conjugate gradients in an implicit gradient.
        memory_steps: Inner steps of a second measurement of memory.
        outer_lr: Step size of Adam on the initial parameters.
        width: Units of the two hidden layers.
        test_tasks: Meta-test tasks.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 250
    tasks_per_step: int = 16
    queries: int = 5
    short_steps: int = 3
    inner_steps: int = 20
    inner_lr: float = 0.4
    lam: float = 0.02
    cg_steps: int = 5
    memory_steps: int = 100
    outer_lr: float = 2e-3
    width: int = 64
    test_tasks: int = 200
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(
        meta_steps=3, tasks_per_step=4, queries=2, inner_steps=8, memory_steps=16, test_tasks=8
    ),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were made while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._watch(x.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def explicit(learner: Learner, lr: float, steps: int) -> Adapt:
    """Return the adaptation by `steps` gradient steps, differentiated through the steps."""
    inner = torchopt.sgd(lr)

    def adapt(params: Params, images: Tensor, labels: Tensor) -> Params:
        return learner.adapt(params, images, labels, inner, steps, first_order=False)

    return adapt


def implicit(learner: Learner, config: Config, steps: int) -> Adapt:
    """Return the proximal adaptation by `steps` gradient steps, differentiated implicitly."""

    def objective(phi: Params, theta: Params, images: Tensor, labels: Tensor) -> Tensor:
        distance = sum(((phi[name] - theta[name]) ** 2).sum() for name in theta)
        return learner.loss(phi, images, labels) + config.lam / 2 * distance

    solver = CG(rtol=0.0, maxiter=config.cg_steps, on_fail="ignore")

    @custom_root(grad(objective), argnums=1, solve=solver, symmetric=True)
    def descend(phi: Params, theta: Params, images: Tensor, labels: Tensor) -> Params:
        for _ in range(steps):
            gradient = grad(objective)(phi, theta, images, labels)
            phi = {name: x - config.inner_lr * gradient[name] for name, x in phi.items()}
        return phi

    def adapt(params: Params, images: Tensor, labels: Tensor) -> Params:
        start = {name: x.detach() for name, x in params.items()}
        return descend(start, params, images, labels)

    return adapt


class MetaTrainer:
    """One set of initial parameters and a function that adapts them."""

    def __init__(self, learner: Learner, adapt: Adapt, config: Config) -> None:
        self.learner = learner
        self.adapt = adapt
        start = learner.fresh_params(config.seed)
        self.params = {name: p.requires_grad_() for name, p in start.items()}
        self.outer = torchopt.Adam(self.params.values(), lr=config.outer_lr)

    def query(self, params: Params, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy on the queries of each task after adaptation, `[tasks]`."""

        def one(*task: Tensor) -> tuple[Tensor, Tensor]:
            return self.learner.query(self.adapt(params, task[0], task[1]), task[2], task[3])

        return vmap(one)(*tasks.tensors())

    def step(self, tasks: Tasks) -> float:
        """Take one outer step and return the meta-loss."""
        loss = self.query(self.params, tasks)[0].mean()
        self.outer.zero_grad()
        loss.backward()
        self.outer.step()
        return loss.item()

    def test_accuracy(self, tasks: Tasks) -> Tensor:
        """Return the accuracy on each task after adaptation."""
        with torch.no_grad():
            return self.query({name: p.detach() for name, p in self.params.items()}, tasks)[1]


def proximal_module(config: Config, steps: int) -> type[ImplicitMetaGradientModule]:
    """Return the module whose parameters are the proximal adaptation of a given network."""
    solver = CG(rtol=0.0, maxiter=config.cg_steps, on_fail="ignore")

    class Proximal(ImplicitMetaGradientModule, linear_solve=solver):
        def __init__(self, start: nn.Module) -> None:
            super().__init__()
            self.start = start  # given, so its parameters are meta-parameters
            self.net = copy.deepcopy(start)

        def objective(self, images: Tensor, labels: Tensor) -> Tensor:
            pairs = zip(self.net.parameters(), self.start.parameters())
            distance = torch.stack([((p - q) ** 2).sum() for p, q in pairs]).sum()
            fit = nn.functional.cross_entropy(self.net(images), labels)
            return fit + config.lam / 2 * distance

        def solve(self, images: Tensor, labels: Tensor) -> Proximal:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=config.inner_lr)
            with torch.enable_grad():
                for _ in range(steps):
                    optimizer.zero_grad()
                    self.objective(images, labels).backward(inputs=list(self.net.parameters()))
                    optimizer.step()
            return self

    return Proximal


class ModuleTrainer(MetaTrainer):
    """The same with a module, whose parameters are adapted in place, one task after the other."""

    def __init__(
        self, learner: Learner, config: Config, steps: int, start: Params | None = None
    ) -> None:
        super().__init__(learner, implicit(learner, config, steps), config)
        self.proximal = proximal_module(config, steps)
        self.net = copy.deepcopy(learner.net)
        self.net.load_state_dict(self.params if start is None else start)
        self.params = dict(self.net.named_parameters())
        self.outer = torchopt.Adam(self.net.parameters(), lr=config.outer_lr)

    def query(self, params: Params, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy for the initial parameters of `self.net`."""
        del params
        found = []
        for images, labels, query, query_labels in zip(*tasks.tensors()):
            adapted = self.proximal(self.net).solve(images, labels)
            logits = adapted.net(query)
            accuracy = (logits.argmax(-1) == query_labels).float().mean()
            found.append((nn.functional.cross_entropy(logits, query_labels), accuracy))
        losses, accuracies = zip(*found)
        return torch.stack(losses), torch.stack(accuracies)


def peak_mib(trainer: MetaTrainer, tasks: Tasks) -> float:
    """Return the peak of live tensors during a meta-step in MiB."""
    with LiveBytes() as counter:
        trainer.step(tasks)
    return counter.peak / 2**20


def train(trainer: MetaTrainer, label: str, config: Config, test_tasks: Tasks) -> dict[str, Any]:
    """Meta-train and return accuracy, time and the learning curve."""
    sampler = TaskSampler("train", config.seed + 1)
    few = Tasks(*(x[: min(50, config.test_tasks)] for x in test_tasks.tensors()))
    every = max(1, config.meta_steps // 10)
    curve, seconds = [], []
    with progress(config.meta_steps, label) as bar:
        for step in range(config.meta_steps):
            if step % every == 0:
                curve.append((step, trainer.test_accuracy(few).mean().item()))
                bar.set_postfix(accuracy=f"{curve[-1][1]:.3f}")
            tasks = sampler.draw(config.tasks_per_step, config.queries)
            start = time.perf_counter()
            trainer.step(tasks)
            seconds.append(time.perf_counter() - start)
            bar.update()
    accuracy = mean_and_half_width(trainer.test_accuracy(test_tasks))
    curve.append((config.meta_steps, accuracy[0]))
    return {
        "accuracy": accuracy,
        "meta_step_ms": 1e3 * sorted(seconds)[len(seconds) // 2],
        "curve": curve,
    }


def module_row(
    learner: Learner, start: Params, config: Config, tasks: Tasks, test_tasks: Tasks
) -> dict[str, Any]:
    """Return the results of the module with the parameters that the functions learned."""
    functions = MetaTrainer(learner, implicit(learner, config, config.inner_steps), config)
    module = ModuleTrainer(learner, config, config.inner_steps, start)
    slopes = []
    for trainer, params in ((functions, start), (module, module.params)):
        loss = trainer.query(params, tasks)[0].mean()
        found = torch.autograd.grad(loss, list(params.values()))
        slopes.append(torch.cat([g.flatten() for g in found]))
    row: dict[str, Any] = {
        "gradient_distance": ((slopes[1] - slopes[0]).norm() / slopes[0].norm()).item(),
        "accuracy": mean_and_half_width(module.test_accuracy(test_tasks)),
    }
    for column, count in (
        ("peak_mib", config.inner_steps),
        ("peak_mib_long", config.memory_steps),
    ):
        row[column] = peak_mib(ModuleTrainer(learner, config, count, start), tasks)
    started = time.perf_counter()
    module.step(tasks)
    row["meta_step_ms"] = 1e3 * (time.perf_counter() - started)
    return row


def run(config: Config, out: Path) -> dict[str, Any]:
    """Run the comparison and return the results."""
    learner = Learner(config.width)
    test_tasks = TaskSampler("test", config.seed + 5).draw(config.test_tasks, config.queries)
    tasks = TaskSampler("train", config.seed + 6).draw(config.tasks_per_step, config.queries)

    def maml(steps: int) -> MetaTrainer:
        return MetaTrainer(learner, explicit(learner, config.inner_lr, steps), config)

    def imaml(steps: int) -> MetaTrainer:
        return MetaTrainer(learner, implicit(learner, config, steps), config)

    methods = (
        ("MAML", maml, config.short_steps),
        ("MAML", maml, config.inner_steps),
        ("iMAML", imaml, config.inner_steps),
    )
    rows = {}
    for name, trainer_of, steps in methods:
        label = f"{name}, {steps} steps"
        trainer = trainer_of(steps)
        rows[label] = train(trainer, label, config, test_tasks)
        for column, count in (("peak_mib", steps), ("peak_mib_long", config.memory_steps)):
            rows[label][column] = peak_mib(trainer_of(count), tasks)
    module = module_row(learner, trainer.params, config, tasks, test_tasks)
    plot_curves(
        {label: row["curve"] for label, row in rows.items()},
        out / "imaml_digits.png",
        xlabel="meta-step",
        ylabel="accuracy on meta-test tasks",
        title="10-way 1-shot codes of digits",
    )
    rows[f"iMAML as a module, {config.inner_steps} steps"] = module
    return {"methods": rows}


def report(results: dict[str, Any]) -> bool:
    """Print the table and return whether iMAML learns as well as MAML in less memory.

    It does if its accuracy is at most five points below that of MAML through as many inner steps,
    its memory with many steps is less than a third, and module and functions agree.
    """
    long_steps = results["config"]["memory_steps"]
    table = [["", "accuracy", "ms/meta-step", "peak MiB", f"with {long_steps} steps"]]
    for label, row in results["methods"].items():
        mean, half = row["accuracy"]
        table.append(
            [
                label,
                f"{100 * mean:.1f} ± {100 * half:.1f} %",
                f"{row['meta_step_ms']:.0f}",
                f"{row['peak_mib']:.1f}",
                f"{row['peak_mib_long']:.1f}",
            ]
        )
    print(flat_table(table))
    _, through, functions, module = results["methods"].values()
    print(f"meta-gradients of module and functions differ by {module['gradient_distance']:.0e}")
    as_good = functions["accuracy"][0] > through["accuracy"][0] - 0.05
    same = module["gradient_distance"] < 1e-3
    same &= abs(module["accuracy"][0] - functions["accuracy"][0]) < 1e-3
    short = all(3 * row["peak_mib_long"] < through["peak_mib_long"] for row in (functions, module))
    return bool(as_good and same and short)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the result did not come out."""
    return run_example(__doc__, "imaml_digits", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
