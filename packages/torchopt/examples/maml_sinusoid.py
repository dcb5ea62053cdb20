# SPDX-License-Identifier: Apache-2.0
"""Fit a sine wave from ten points: MAML, first-order MAML, Meta-SGD, and a pretrained control.

A task is a wave A sin(x + phi) with A in [0.1, 5] and phi in [0, pi]; a learner sees ten points
with x in [-5, 5] and is judged by its squared error elsewhere, after gradient steps on those ten.

    MAML       theta' = theta - alpha grad L(theta), meta-gradient through the step
    first-order  the same, with the inner gradient as a constant
    Meta-SGD   theta' = theta - alpha o grad L(theta), one learned alpha for each parameter
    pretrained   theta fitted to all tasks at once, then adapted with the best step size of a grid

The mean over all tasks is near zero everywhere, so a pretrained network knows little about any of
them. Meta-learned parameters are those from which one step leads far.

References:
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, section 5.1, https://arxiv.org/abs/1703.03400
    Z. Li, F. Zhou, F. Chen, H. Li, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning,
    2017, section 4.1, https://arxiv.org/abs/1707.09835

Deviations: 5000 meta-steps instead of 60000 to 70000; the control of the pretrained network may
choose its step size on other tasks.

Run `python maml_sinusoid.py` (about two minutes) or with `--smoke`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import torchopt
from torchopt.pytree import tree_map

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Outer steps of each method.
        tasks: Tasks averaged in one outer step.
        shots: Points of a task that the learner sees; the same number is used to judge it.
        inner_lr: Step size of MAML's adaptation, and initial step size of Meta-SGD.
        outer_lr: Step size of Adam.
        test_tasks: Tasks of the final test.
        test_steps: Adaptation is judged after 0, 1, ..., this many steps.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 5000
    tasks: int = 25
    shots: int = 10
    inner_lr: float = 0.01
    outer_lr: float = 1e-3
    test_tasks: int = 500
    test_steps: int = 10
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(meta_steps=30, test_tasks=20, test_steps=2)}
METHODS = ("MAML", "first-order MAML", "Meta-SGD", "pretrained")
CONTROL_LRS = (0.001, 0.003, 0.01, 0.02, 0.05)
# Mean squared error after one step, as the Meta-SGD paper reports it (table 1, 10-shot).
PAPER = {"MAML": 0.77, "Meta-SGD": 0.53}

NET = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def draw(num_tasks: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return x and y of waves, each `[num_tasks, points, 1]`."""
    amplitude = 0.1 + 4.9 * torch.rand(num_tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(num_tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(num_tasks, points, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x + phase)


def fresh_params(seed: int) -> Params:
    """Return newly initialised parameters."""
    torch.manual_seed(seed)
    for layer in NET:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return {name: p.detach().clone().requires_grad_() for name, p in NET.named_parameters()}


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error."""
    return ((functional_call(NET, params, (x,)) - y) ** 2).mean()


def adapt(
    params: Params, x: Tensor, y: Tensor, step_size: float | Params, steps: int, first_order: bool
) -> list[Params]:
    """Return the parameters after 0, 1, ..., `steps` gradient steps on one task."""
    path = [params]
    uniform = isinstance(step_size, float)
    optimizer = torchopt.sgd(step_size if uniform else 1.0)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = grad(loss)(path[-1], x, y)
        if first_order:
            grads = tree_map(torch.Tensor.detach, grads)
        if not uniform:
            grads = tree_map(torch.mul, step_size, grads)
        updates, state = optimizer.update(grads, state, params=path[-1], inplace=False)
        path.append(torchopt.apply_updates(path[-1], updates, inplace=False))
    return path


@dataclass
class Learner:
    """What a method learns: initial parameters, and for Meta-SGD also step sizes."""

    method: str
    params: Params
    step_size: float | Params

    @classmethod
    def fresh(cls, method: str, config: Config) -> Learner:
        """Return an untrained learner."""
        params = fresh_params(config.seed)
        step_size: float | Params = config.inner_lr
        if method == "Meta-SGD":
            step_size = {
                name: torch.full_like(p, config.inner_lr).requires_grad_()
                for name, p in params.items()
            }
        return cls(method, params, step_size)

    def tensors(self) -> list[Tensor]:
        """Return everything that is learned."""
        sizes = [] if isinstance(self.step_size, float) else list(self.step_size.values())
        return [*self.params.values(), *sizes]

    def meta_loss(self, x: Tensor, y: Tensor, shots: int) -> Tensor:
        """Return the error after adaptation; for the pretrained network, that before."""
        if self.method == "pretrained":
            return vmap(loss, (None, 0, 0))(self.params, x, y).mean()

        def task_loss(x: Tensor, y: Tensor) -> Tensor:
            first_order = self.method == "first-order MAML"
            path = adapt(self.params, x[:shots], y[:shots], self.step_size, 1, first_order)
            return loss(path[-1], x[shots:], y[shots:])

        return vmap(task_loss)(x, y).mean()

    def errors(self, x: Tensor, y: Tensor, shots: int, steps: int) -> Tensor:
        """Return the error of each task after 0, 1, ..., `steps` steps, `[tasks, steps + 1]`."""

        def path_errors(x: Tensor, y: Tensor) -> Tensor:
            path = adapt(self.params, x[:shots], y[:shots], self.step_size, steps, True)
            return torch.stack([loss(params, x[shots:], y[shots:]) for params in path])

        with torch.no_grad():
            return vmap(path_errors)(x, y)


def train(learner: Learner, config: Config) -> None:
    """Take the outer steps."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    outer = torchopt.Adam(learner.tensors(), lr=config.outer_lr)
    with progress(config.meta_steps, learner.method) as bar:
        for _ in range(config.meta_steps):
            x, y = draw(config.tasks, 2 * config.shots, generator)
            value = learner.meta_loss(x, y, config.shots)
            outer.zero_grad()
            value.backward()
            outer.step()
            bar.update()


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train and test every method."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    validation = draw(config.test_tasks, config.shots + 100, generator)
    test = draw(config.test_tasks, config.shots + 100, generator)
    methods: dict[str, Any] = {}
    for method in METHODS:
        learner = Learner.fresh(method, config)
        train(learner, config)
        if method == "pretrained":

            def validation_error(lr: float, learner: Learner = learner) -> float:
                learner.step_size = lr
                errors = learner.errors(*validation, config.shots, config.test_steps)
                return errors[:, -1].mean().nan_to_num(math.inf).item()

            learner.step_size = min(CONTROL_LRS, key=validation_error)
        errors = learner.errors(*test, config.shots, config.test_steps)
        methods[method] = {
            # Meta-SGD's step sizes are learned for one step; more steps diverge.
            "errors": [
                mean_and_half_width(column) if column.isfinite().all() else None
                for column in errors.unbind(1)
            ]
        }
        if isinstance(learner.step_size, dict):
            sizes = torch.cat([x.detach().flatten() for x in learner.step_size.values()])
            methods[method]["step_sizes"] = [sizes.min().item(), sizes.max().item()]
    curves = {
        method: [
            (float(k), error[0]) for k, error in enumerate(row["errors"]) if error and error[0] < 10
        ]
        for method, row in methods.items()
    }
    plot_curves(
        curves,
        out / "maml_sinusoid.png",
        xlabel="gradient steps on ten points",
        ylabel="mean squared error on new points",
        title="Sine waves",
        yscale="log",
    )
    return {"methods": methods}


def report(results: dict[str, Any]) -> bool:
    """Print the errors and return whether the methods are in the papers' order."""
    steps = [0, 1, results["config"]["test_steps"]]
    rows = [["mean squared error", *(f"{k} steps" for k in steps), "paper, 1 step"]]
    for method, row in results["methods"].items():
        chosen = [row["errors"][k] for k in steps]
        cells = [f"{e[0]:.3f} ± {e[1]:.3f}" if e else "diverges" for e in chosen]
        rows.append([method, *cells, str(PAPER.get(method, ""))])
    print(flat_table(rows))
    low, high = results["methods"]["Meta-SGD"]["step_sizes"]
    print(f"Meta-SGD's step sizes: from {low:.3f} to {high:.3f}")
    one = {method: row["errors"][1][0] for method, row in results["methods"].items()}
    many = {m: results["methods"][m]["errors"][-1][0] for m in ("MAML", "pretrained")}
    return bool(
        one["Meta-SGD"] < one["MAML"] < one["first-order MAML"] < one["pretrained"]
        and many["MAML"] < 0.5 * many["pretrained"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the methods are not in the papers' order."""
    return run_example(__doc__, "maml_sinusoid", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
