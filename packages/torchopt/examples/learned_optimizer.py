# SPDX-License-Identifier: Apache-2.0
"""Learn an optimizer: a small network that maps the statistics of a coordinate to its update.

In a task, a new network with one hidden layer learns to classify a subset of the digits in thirty
steps. A random matrix mixes their pixels to ten features. The meta-loss is the training loss,
averaged over the steps. The weights of the optimizer (a perceptron for each coordinate, or an LSTM)
are trained on training tasks,

* by the explicit engine: the derivative of the meta-loss through all thirty steps, without second
  derivatives of the inner loss as in the first paper (the exact derivative explodes once the
  optimizer takes long steps: with it the training below falls apart after some forty meta-steps),
* by persistent evolution strategies (PES), windows of ten steps, unbiased,
* by truncated evolution strategies, the same without memory between windows.

The baseline is Adam. Its learning rate is tuned on a grid by the same meta-loss on training tasks.
All are compared on held-out tasks, with other images, other mixtures and other initial weights.
Everything, including the tuning, is repeated for several seeds.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    M. Andrychowicz et al., Learning to learn by gradient descent by gradient descent, NeurIPS 2016,
    https://arxiv.org/abs/1606.04474
    L. Metz et al., Understanding and correcting pathologies in the training of learned optimizers,
    ICML 2019, https://arxiv.org/abs/1810.10180
    P. Vicol, L. Metz, J. Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation
    Graphs with Persistent Evolution Strategies, ICML 2021, https://arxiv.org/abs/2112.13835

Deviations: one family of small tasks, and minutes of meta-training.

Run `python learned_optimizer.py` (about six minutes on one core) or with `--smoke` (or `--quick`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from example_tools import digits as load_digits
from example_tools import flat_table, mean_and_half_width, plot_curves, progress, run_example
from torch import Tensor

import torchopt
from torchopt.base import GradientTransformation
from torchopt.diff.zero_order import unrolled
from torchopt.optimizers.learned import learned_lstm, learned_mlp, lstm_weights, mlp_weights

Params = dict[str, Tensor]
Make = Callable[..., GradientTransformation]
WORST = 5.0  # the loss of a run that diverged


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        horizon: Inner steps of an episode.
        window: Inner steps between two updates by evolution strategies.
        examples: Images of a task.
        features: Features of an image.
        width: Hidden units of the network that is trained.
        tasks: Tasks in a meta-step.
        meta_steps: Meta-steps of the explicit engine.
        es_steps: Meta-steps of evolution strategies.
        num_pairs: Antithetic pairs of particles.
        sigma: Size of their perturbations.
        meta_lr: Step size of Adam on the weights, decayed to zero by a cosine.
        grid: Learning rates of Adam that are tried.
        test_tasks: Number of held-out tasks.
        seeds: Number of repetitions.
        seed: Seed of all random numbers.
    """

    horizon: int = 30
    window: int = 10
    examples: int = 64
    features: int = 10
    width: int = 8
    tasks: int = 4
    meta_steps: int = 150
    es_steps: int = 200
    num_pairs: int = 8
    sigma: float = 0.01
    meta_lr: float = 1e-2
    grid: int = 13
    test_tasks: int = 60
    seeds: int = 3
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(horizon=10, window=5, meta_steps=3, es_steps=4, grid=3, test_tasks=4, seeds=2),
}


@dataclass(frozen=True)
class Digits:
    """Images `[n, 64]` and labels `[n]`."""

    images: Tensor
    labels: Tensor


def mlp(weights: Params) -> GradientTransformation:
    """Return the perceptron, with a step scale for networks of this size."""
    return learned_mlp(weights, step_scale=0.03, exponent_scale=0.1)


def task(config: Config, digits: Digits) -> tuple[Params, Tensor, Tensor]:
    """Return a fresh network, features and labels, drawn from torch's generator."""
    chosen = torch.randint(len(digits.labels), (config.examples,))
    mixture = torch.randn(64, config.features) / 8
    x, y = digits.images[chosen] @ mixture, digits.labels[chosen]
    net = {
        "w1": torch.randn(config.features, config.width) / config.features**0.5,
        "b1": torch.zeros(config.width),
        "w2": torch.randn(config.width, 10) / config.width**0.5,
        "b2": torch.zeros(10),
    }
    return net, x, y


def task_batch(config: Config, digits: Digits, n: int) -> tuple[Params, Tensor, Tensor]:
    """Return n tasks, stacked."""
    nets, xs, ys = zip(*(task(config, digits) for _ in range(n)))
    return {k: torch.stack([net[k] for net in nets]) for k in nets[0]}, *map(torch.stack, (xs, ys))


def loss_of(net: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a network with one hidden layer."""
    x, y = batch
    hidden = torch.tanh(x @ net["w1"] + net["b1"])
    return torch.nn.functional.cross_entropy(hidden @ net["w2"] + net["b2"], y)


def bounded(losses: Tensor) -> Tensor:
    """Return losses without infinities."""
    return torch.nan_to_num(losses, nan=WORST, posinf=WORST).clamp(max=WORST)


def by_explicit(make: Make, weights: Params, config: Config, digits: Digits) -> Params:
    """Train by the derivative through all steps, several tasks at once."""
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loop = torchopt.inner_loop(
        loss_of, make, steps=config.horizon, tasks=(0, 0), derivative="first_order"
    )
    schedule = torchopt.schedule.cosine_decay(config.meta_lr, config.meta_steps)
    outer = torchopt.Adam(weights.values(), lr=schedule)
    with progress(config.meta_steps, "explicit") as bar:
        for _ in range(config.meta_steps):
            net, x, y = task_batch(config, digits, config.tasks)
            result = loop(net, (x, y), weights=weights)
            meta_loss = result.losses.mean()
            outer.zero_grad()
            meta_loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            outer.step()
            bar.update()
    return {name: w.detach() for name, w in weights.items()}


def by_evolution(
    estimator: Any, make: Make, weights: Params, config: Config, digits: Digits
) -> Params:
    """Train by persistent or by truncated evolution strategies."""

    def start(weights: Params) -> Any:
        net, x, y = task_batch(config, digits, config.tasks)
        each = torch.func.vmap(lambda net: make(weights).init(net))
        return net, each(net), x, y

    def step(weights: Params, carried: Any, t: int) -> tuple[Any, Tensor]:
        def one(net: Params, state: Any, x: Tensor, y: Tensor) -> tuple[Params, Any, Tensor]:
            gradient, loss = torch.func.grad_and_value(loss_of)(net, (x, y))
            updates, state = make(weights).update(gradient, state, params=net, inplace=False)
            return torchopt.apply_updates(net, updates, inplace=False), state, loss

        net, state, x, y = carried
        net, state, losses = torch.func.vmap(one)(net, state, x, y)
        return (net, state, x, y), bounded(losses).mean()

    es = estimator(
        unrolled.InnerLoop(start, step, config.horizon),
        window=config.window,
        num_pairs=config.num_pairs,
        sigma=config.sigma,
    )
    schedule = torchopt.schedule.cosine_decay(config.meta_lr, config.es_steps)
    outer = torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(schedule))
    outer_state = outer.init(weights)
    state = es.init(weights, config.seed)
    with progress(config.es_steps, estimator.__name__) as bar:
        for _ in range(config.es_steps):
            found, state = es.estimate(weights, state)
            updates, outer_state = outer.update(found.gradient, outer_state, inplace=False)
            weights = torchopt.apply_updates(weights, updates, inplace=False)
            bar.update()
    return weights


def judge(optimizer: GradientTransformation, tasks: Any, config: Config) -> Tensor:
    """Return the loss before every step, `[tasks, horizon]`."""
    net, x, y = tasks
    loop = torchopt.inner_loop(loss_of, optimizer, steps=config.horizon, tasks=(0, 0))
    with torch.no_grad():
        return bounded(loop(net, (x, y)).losses)


def tuned_adam(config: Config, digits: Digits) -> tuple[float, list[tuple[float, float]]]:
    """Return the best learning rate of Adam on training tasks, and the whole grid."""
    tasks = task_batch(config, digits, config.test_tasks)
    rates = torch.logspace(-2.5, 0.0, config.grid).tolist()
    losses = [judge(torchopt.adam(rate), tasks, config).mean().item() for rate in rates]
    best = min(range(len(rates)), key=losses.__getitem__)
    return rates[best], list(zip(rates, losses))


METHODS: dict[str, tuple[Any, Make, Callable[[], Params]]] = {
    "MLP, explicit": (by_explicit, mlp, mlp_weights),
    "MLP, PES": (partial(by_evolution, unrolled.persistent_es), mlp, mlp_weights),
    "MLP, truncated ES": (partial(by_evolution, unrolled.truncated_es), mlp, mlp_weights),
    "LSTM, explicit": (by_explicit, learned_lstm, partial(lstm_weights, 12, 1)),
}
ADAM = "Adam, tuned"


def trial(config: Config, train: Digits, held_out: Digits) -> dict[str, Any]:
    """Tune Adam, train the optimizers, compare on held-out tasks, all by one seed."""
    torch.manual_seed(config.seed)
    rate, grid = tuned_adam(config, train)
    rivals: dict[str, GradientTransformation] = {ADAM: torchopt.adam(rate)}
    seconds = {ADAM: 0.0}
    for name, (train_by, make, fresh) in METHODS.items():
        torch.manual_seed(config.seed + 1)
        started = time.process_time()
        rivals[name] = make(train_by(make, fresh(), config, train))
        seconds[name] = time.process_time() - started
    torch.manual_seed(config.seed + 1_000_000)
    tasks = task_batch(config, held_out, config.test_tasks)
    curves = {name: judge(optimizer, tasks, config) for name, optimizer in rivals.items()}
    return {"curves": curves, "seconds": seconds, "rate": rate, "grid": grid}


def run(config: Config, out: Path) -> dict[str, Any]:
    """Repeat the comparison for several seeds."""
    images, labels = load_digits()
    train, held_out = Digits(images[:1200], labels[:1200]), Digits(images[1200:], labels[1200:])
    seeds = [config.seed + 1000 * k for k in range(config.seeds)]
    trials = [trial(replace(config, seed=seed), train, held_out) for seed in seeds]
    rows = {}
    for name in trials[0]["curves"]:
        losses = [t["curves"][name] for t in trials]
        gains = [t["curves"][ADAM].mean(1) - t["curves"][name].mean(1) for t in trials]
        margin, half_width = mean_and_half_width(torch.cat(gains))
        curve = torch.cat(losses).mean(0)
        rows[name] = {
            "mean_loss": curve.mean().item(),
            "final_loss": curve[-1].item(),
            "margin": margin,
            "half_width": half_width,
            "margins": [gain.mean().item() for gain in gains],
            "seconds": sum(t["seconds"][name] for t in trials) / len(trials),
            "curve": curve.tolist(),
        }
    plot_curves(
        {name: list(enumerate(row["curve"])) for name, row in rows.items()},
        out / "learned_optimizer.png",
        xlabel="step",
        ylabel="loss on held-out tasks",
        title="Learned optimizers",
        yscale="log",
    )
    return {"rows": rows, "rates": [t["rate"] for t in trials], "grid": trials[0]["grid"]}


def report(results: dict[str, Any]) -> bool:
    """Print the table and return whether every learned optimizer beats Adam by every seed."""
    adam = results["rows"][ADAM]
    print("learning rates of Adam:", ", ".join(f"{rate:.3g}" for rate in results["rates"]))
    rows = [["", "mean loss", "last loss", "better than Adam by", "by seed", "trained in"]]
    for name, row in results["rows"].items():
        percent = [100 * margin / adam["mean_loss"] for margin in (row["margin"], *row["margins"])]
        judged = [
            f"{row['margin']:.3f} ± {row['half_width']:.3f} ({percent[0]:.0f} %)",
            f"{min(percent[1:]):.0f} to {max(percent[1:]):.0f} %",
            f"{row['seconds']:.0f} s",
        ]
        losses = [f"{row['mean_loss']:.3f}", f"{row['final_loss']:.3f}"]
        rows.append([name, *losses, *(["", "", ""] if row is adam else judged)])
    print(flat_table(rows))
    learned = [row for row in results["rows"].values() if row is not adam]
    return all(row["margin"] > row["half_width"] and min(row["margins"]) > 0 for row in learned)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when tuned Adam was not beaten."""
    given = sys.argv[1:] if arguments is None else arguments
    quick = ["--smoke" if a == "--quick" else a for a in given]
    return run_example(__doc__, "learned_optimizer", PRESETS, run, report, quick)


if __name__ == "__main__":
    sys.exit(main())
