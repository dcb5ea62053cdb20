# SPDX-License-Identifier: Apache-2.0
"""Learn the hyper-parameters of a meta-learner: three levels, each differentiated its own way.

    adapt    x(w, alpha; task)   a few gradient steps from w on ten points of a sine wave
    MAML     w(alpha, beta)      meta-training: steps with the rate beta on the error after adapting
    tune     minimise over alpha and beta the error of w(alpha, beta) on tasks that MAML never saw

alpha has one step size for each tensor of the network, as in Meta-SGD, but it is not trained
together with w: it is judged by the result of a whole meta-training. Its gradient goes through
every step of that meta-training and through the adaptation in each step; that is an inner loop
inside the loss of an inner loop. The middle level keeps only its states (`keep="steps"`): beyond
them, its memory is that of one meta-step for any length of the training.

The baseline is a random search over the same hyper-parameters with three times as many trainings,
because a gradient takes about as long as three of them.

References:
    A. Raghu, J. Lorraine, S. Kornblith, M. McDermott, D. Duvenaud, Meta-learning to Improve
    Pre-training, NeurIPS 2021, https://arxiv.org/abs/2111.01754 (three levels)
    S. K. Choe, W. Neiswanger, P. Xie, E. Xing, Betty: An Automatic Differentiation Library for
    Multilevel Optimization, ICLR 2023, https://arxiv.org/abs/2207.02849
    Z. Li, F. Zhou, F. Chen, H. Li, Meta-SGD, 2017, https://arxiv.org/abs/1707.09835

Run `python three_levels.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from torch import Tensor, nn
from torch.func import functional_call

import torchopt

Params = dict[str, Tensor]
Waves = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Steps of a meta-training.
        tasks: Tasks averaged in one of them.
        shots: Points of a task that the learner sees; the same number is used to judge it.
        adapt_steps: Steps of an adaptation.
        tune_steps: Gradient steps on the hyper-parameters.
        validation_tasks: Tasks on which a meta-training is judged.
        test_tasks: Tasks of the final test.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 30
    tasks: int = 10
    shots: int = 10
    adapt_steps: int = 1
    tune_steps: int = 40
    validation_tasks: int = 50
    test_tasks: int = 500
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(meta_steps=3, tune_steps=2, validation_tasks=5, test_tasks=10),
}
NET = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
NAMES = tuple(name for name, _ in NET.named_parameters())
START = (math.log(0.02), math.log(0.02))  # log of each alpha, log of beta


def draw(shape: tuple[int, ...], points: int, generator: torch.Generator) -> Waves:
    """Return x and y of waves, each `[*shape, points, 1]`."""
    amplitude = 0.1 + 4.9 * torch.rand(*shape, 1, 1, generator=generator)
    phase = math.pi * torch.rand(*shape, 1, 1, generator=generator)
    x = 10 * torch.rand(*shape, points, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x + phase)


def loss(params: Params, batch: Waves) -> Tensor:
    """Return the mean squared error."""
    x, y = batch
    return ((functional_call(NET, params, (x,)) - y) ** 2).mean()


def sgd_with_rates(log_rates: Tensor) -> torchopt.GradientTransformation:
    """Return SGD with a step size for each tensor."""
    rules = dict(enumerate(map(torchopt.sgd, log_rates.exp())))
    return torchopt.transform.partition(rules, lambda params: dict(zip(params, rules)))


class Levels:
    """The three levels.

    Args:
        config: The settings.
        derivative: How the steps of an adaptation are differentiated.
        keep: What a meta-training keeps.
    """

    def __init__(self, config: Config, derivative: str = "reverse", keep: Any = "steps") -> None:
        self.shots = config.shots
        self.adapt = torchopt.inner_loop(
            loss,
            sgd_with_rates,
            steps=config.adapt_steps,
            derivative=derivative,
            tasks=(None, 0),
        )
        self.train = torchopt.inner_loop(
            self.meta_loss, torchopt.sgd, steps=config.meta_steps, keep=keep
        )

    def errors(self, w: Params, waves: Waves, log_alpha: Tensor) -> Tensor:
        """Return the error of each task after adapting, `[tasks]`."""
        x, y = waves
        seen = (x[:, : self.shots], y[:, : self.shots])
        adapted = self.adapt(w, seen, log_rates=log_alpha).params
        held_out = (x[:, self.shots :], y[:, self.shots :])
        return torch.func.vmap(loss)(adapted, held_out)

    def meta_loss(self, w: Params, waves: Waves, log_alpha: Tensor) -> Tensor:
        """Return the mean error after adapting."""
        return self.errors(w, waves, log_alpha).mean()

    def trained(self, start: Params, waves: Waves, hypers: tuple[Tensor, Tensor]) -> Params:
        """Return the parameters after meta-training; `waves` has a leading dimension of steps."""
        log_alpha, log_beta = hypers
        found: Params = self.train(
            start, None, log_alpha, batches=waves, lr=log_beta.exp(), momentum=0.9
        ).params
        return found


def fresh(seed: int) -> Params:
    """Return newly initialised parameters."""
    torch.manual_seed(seed)
    for layer in NET:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return {name: p.detach().clone() for name, p in NET.named_parameters()}


def tune(
    objective: Callable[[tuple[Tensor, Tensor]], Tensor], steps: int
) -> tuple[tuple[Tensor, Tensor], list[tuple[float, float]]]:
    """Return the best hyper-parameters in a run of Adam, and the errors of that run."""
    hypers = (torch.full((len(NAMES),), START[0]), torch.tensor(START[1]))
    best, curve = hypers, []
    optimizer = torchopt.adam(0.15)
    state = optimizer.init(hypers)
    with progress(steps, "tuned") as bar:
        for step in range(steps):
            at = tuple(x.requires_grad_() for x in hypers)
            value = objective(at)
            slopes = torch.autograd.grad(value, at)
            if not curve or value.item() < min(error for _, error in curve):
                best = tuple(x.detach() for x in at)
            curve.append((float(step), value.item()))
            updates, state = optimizer.update(slopes, state, inplace=False)
            hypers = torchopt.apply_updates(tuple(x.detach() for x in at), updates, inplace=False)
            bar.update()
    return best, curve


def search(
    objective: Callable[[tuple[Tensor, Tensor]], Tensor], trials: int, seed: int
) -> tuple[tuple[Tensor, Tensor], list[tuple[float, float]]]:
    """Return the best of random hyper-parameters, and the least error after each three trials."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(1e-3), math.log(0.1)
    best, least, curve = (torch.empty(0), torch.empty(0)), math.inf, []
    with progress(trials, "random search") as bar, torch.no_grad():
        for trial in range(trials):
            drawn = low + (high - low) * torch.rand(len(NAMES) + 1, generator=generator)
            value = objective((drawn[:-1], drawn[-1])).nan_to_num(math.inf).item()
            if value < least:
                best, least = (drawn[:-1], drawn[-1]), value
            if trial % 3 == 2 and least < math.inf:
                curve.append((trial // 3, least))
            bar.update()
    return best, curve


def run(config: Config, out: Path) -> dict[str, Any]:
    """Tune by gradients and by random search; judge both on new tasks."""
    generator = torch.Generator().manual_seed(config.seed)
    points = 2 * config.shots
    waves = draw((config.meta_steps, config.tasks), points, generator)
    validation = draw((config.validation_tasks,), points, generator)
    test = draw((config.test_tasks,), points, generator)
    levels, start = Levels(config), fresh(config.seed)

    def objective(hypers: tuple[Tensor, Tensor]) -> Tensor:
        return levels.meta_loss(levels.trained(start, waves, hypers), validation, hypers[0])

    tuned, path = tune(objective, config.tune_steps)
    searched, best = search(objective, 3 * config.tune_steps, config.seed + 1)
    untuned = (torch.full((len(NAMES),), START[0]), torch.tensor(START[1]))
    methods: dict[str, Any] = {}
    for name, hypers in {"untuned": untuned, "random search": searched, "tuned": tuned}.items():
        with torch.no_grad():
            w = levels.trained(start, waves, hypers)
            errors = levels.errors(w, test, hypers[0])
            methods[name] = {
                "validation": objective(hypers).item(),
                "test": mean_and_half_width(errors),
                "alpha": dict(zip(NAMES, hypers[0].exp().tolist())),
                "beta": hypers[1].exp().item(),
            }
    plot_curves(
        {"gradient steps": path, "random search, three trainings a step": best},
        out / "three_levels.png",
        xlabel="steps on the hyper-parameters",
        ylabel="error on validation tasks",
        title="Hyper-parameters of MAML",
        yscale="log",
    )
    return {"methods": methods}


def report(results: dict[str, Any]) -> bool:
    """Print the errors and return whether gradients beat random search on new tasks."""
    rows = [["squared error after adapting", "validation tasks", "new tasks"]]
    for name, row in results["methods"].items():
        mean, half = row["test"]
        rows.append([name, f"{row['validation']:.3f}", f"{mean:.3f} ± {half:.3f}"])
    print(flat_table(rows))
    tuned = results["methods"]["tuned"]
    listed = ", ".join(f"{name} {rate:.3f}" for name, rate in tuned["alpha"].items())
    print(f"tuned: alpha {listed}; beta {tuned['beta']:.4f}")
    means = {name: row["test"][0] for name, row in results["methods"].items()}
    return bool(means["tuned"] < means["random search"] < means["untuned"])


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when random search was better."""
    return run_example(__doc__, "three_levels", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
