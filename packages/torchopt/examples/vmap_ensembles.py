# SPDX-License-Identifier: Apache-2.0
"""Train many networks at once: ensembles, and the tasks of MAML, under `torch.func.vmap`.

Functional optimizers are functions of tensors, so `vmap` maps them like any other: a whole training
step of 50 networks is one program over stacked parameters, and so is the adaptation of 32 tasks.

1. An ensemble on two spirals. Members differ in their initial weights and in their bootstrap
   samples. The mean of their probabilities is more accurate than the average member and has a
   smaller log-loss, and its entropy is larger where it is wrong.
2. One meta-step of MAML on sine waves: the same meta-gradient from a loop over tasks, from one
   vmap, and from `torchopt.inner_loop` with `tasks=`, which is traced once, and the time of each.

References:
    B. Lakshminarayanan, A. Pritzel, C. Blundell, Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles, NeurIPS 2017, https://arxiv.org/abs/1612.01474
    C. Finn, P. Abbeel, S. Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks, ICML 2017, https://arxiv.org/abs/1703.03400

Run `python vmap_ensembles.py` (below a minute) or with `--smoke`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, progress, run_example
from torch import Tensor
from torch.func import grad, vmap

import torchopt

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        members: Number of networks in the ensemble.
        steps: Steps of Adam.
        points: Points of each spiral.
        noise: Standard deviation of the points from their spiral.
        width: Hidden units, two layers.
        lr: Step size of Adam.
        tasks: Tasks of the MAML step.
        repeats: Repetitions of each timing; the fastest counts.
        seed: Seed of all random numbers.
    """

    members: int = 50
    steps: int = 600
    points: int = 100
    noise: float = 0.8
    width: int = 32
    lr: float = 0.01
    tasks: int = 32
    repeats: int = 7
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(members=4, steps=10, tasks=3, repeats=1)}


def fresh_params(sizes: tuple[int, ...], generator: torch.Generator) -> Params:
    """Return the weights and biases of a network with layers of these sizes."""
    params = {}
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:])):
        params[f"w{i}"] = torch.randn(rows, columns, generator=generator) * (2 / rows) ** 0.5
        params[f"b{i}"] = torch.zeros(columns)
    return params


def network(params: Params, x: Tensor) -> Tensor:
    """Return the outputs."""
    layers = len(params) // 2
    for i in range(layers):
        x = x @ params[f"w{i}"] + params[f"b{i}"]
        if i < layers - 1:
            x = torch.relu(x)
    return x


def stacked(trees: list[Params]) -> Params:
    """Return trees as one with a leading dimension."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def spirals(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the points of two spirals and the spiral of each point."""
    angle = 0.5 + 2.5 * math.pi * torch.rand(2 * config.points, generator=generator).sqrt()
    label = torch.arange(2 * config.points) % 2
    turn = angle + math.pi * label
    x = torch.stack([angle * torch.cos(turn), angle * torch.sin(turn)], dim=1)
    return (x + config.noise * torch.randn(x.shape, generator=generator)) / 3, label


def classification_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return torch.nn.functional.cross_entropy(network(params, x), y)


def train_member(optimizer: Any) -> Callable[..., tuple[Params, Any]]:
    """Return one training step of one network, a function to map."""

    def step(params: Params, state: Any, x: Tensor, y: Tensor) -> tuple[Params, Any]:
        grads = grad(classification_loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    return step


def train_ensemble(config: Config, x: Tensor, y: Tensor, samples: Tensor) -> Params:
    """Return the members' parameters, stacked, each trained on its own sample of the points."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    sizes = (2, config.width, config.width, 2)
    params = stacked([fresh_params(sizes, generator) for _ in range(config.members)])
    optimizer = torchopt.adam(config.lr)
    state = vmap(optimizer.init)(params)
    step = vmap(train_member(optimizer))
    with progress(config.steps, f"{config.members} networks") as bar:
        for _ in range(config.steps):
            params, state = step(params, state, x[samples], y[samples])
            bar.update()
    return params


def ensemble(config: Config, out: Path) -> dict[str, Any]:
    """Train and judge the ensemble."""
    generator = torch.Generator().manual_seed(config.seed)
    x, y = spirals(config, generator)
    x_test, y_test = spirals(config, generator)
    samples = torch.randint(len(y), (config.members, len(y)), generator=generator)
    started = time.perf_counter()
    params = train_ensemble(config, x, y, samples)
    together = time.perf_counter() - started
    # The first members alone, one after the other: the same numbers, but slower.
    few = min(3, config.members)
    optimizer = torchopt.adam(config.lr)
    step = train_member(optimizer)
    begin = torch.Generator().manual_seed(config.seed + 1)
    sizes = (2, config.width, config.width, 2)
    started = time.perf_counter()
    for member in range(few):
        single = fresh_params(sizes, begin)
        state = optimizer.init(single)
        for _ in range(min(config.steps, 100)):
            single, state = step(single, state, x[samples[member]], y[samples[member]])
    alone = (time.perf_counter() - started) / few / min(config.steps, 100) * config.steps
    probabilities = torch.softmax(vmap(network, (0, None))(params, x_test), -1)
    mean = probabilities.mean(0)
    members = (probabilities.argmax(-1) == y_test).float().mean(1)
    entropy = -(mean * mean.clamp(min=1e-9).log()).sum(-1)
    right = mean.argmax(-1) == y_test
    draw(params, x, y, out / "vmap_ensembles.png")
    chosen = probabilities[:, torch.arange(len(y_test)), y_test]
    return {
        "member_accuracy": members.mean().item(),
        "best_member_accuracy": members.max().item(),
        "accuracy": (mean.argmax(-1) == y_test).float().mean().item(),
        "member_log_loss": -chosen.clamp(min=1e-9).log().mean().item(),
        "log_loss": -chosen.mean(0).clamp(min=1e-9).log().mean().item(),
        "entropy_right": entropy[right].mean().item(),
        "entropy_wrong": entropy[~right].mean().nan_to_num().item(),
        "seconds_together": together,
        "seconds_one_by_one": alone * config.members,
    }


def draw(params: Params, x: Tensor, y: Tensor, path: Path) -> None:
    """Write a picture of the ensemble's probability and its training points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = torch.linspace(-4.2, 4.2, 120)
    grid = torch.cartesian_prod(side, side)
    p = torch.softmax(vmap(network, (0, None))(params, grid), -1).mean(0)[:, 1].view(120, 120)
    figure, axes = pyplot.subplots(figsize=(5, 4.4))
    colours = {"cmap": "coolwarm", "vmin": 0, "vmax": 1}
    ticks = side.numpy()
    shade = axes.contourf(ticks, ticks, p.mT.numpy(), levels=20, **colours)
    points = x.mT.numpy()
    axes.scatter(*points, c=y.numpy(), edgecolors="white", s=16, linewidths=0.5, **colours)
    figure.colorbar(shade, label="mean probability of one spiral")
    axes.set(title=f"{len(next(iter(params.values())))} networks, one vmap")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def error(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error."""
    x, y = batch
    return ((network(params, x) - y) ** 2).mean()


adapt = torchopt.inner_loop(error, torchopt.adam(0.01), steps=3, tasks=(None, 0), execute="trace")


def task_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the error of one task on half of its points after three steps on the other half."""
    half = len(x) // 2
    optimizer = torchopt.adam(0.01)
    state = optimizer.init(params)
    for _ in range(3):
        grads = grad(error)(params, (x[:half], y[:half]))
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return error(params, (x[half:], y[half:]))


def mapped_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of all tasks by one vmap."""
    return vmap(task_loss, (None, 0, 0))(params, x, y).mean()


def looped_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of all tasks, one after the other."""
    return torch.stack([task_loss(params, *task) for task in zip(x, y)]).mean()


def adapted_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of all tasks by an inner loop of many tasks."""
    half = x.shape[1] // 2
    adapted = adapt(params, (x[:, :half], y[:, :half])).params
    return vmap(error)(adapted, (x[:, half:], y[:, half:])).mean()


def maml(config: Config) -> dict[str, Any]:
    """Compare the meta-gradients of a loop, of a vmap over tasks, and of `torchopt.inner_loop`."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    params = {k: p.requires_grad_() for k, p in fresh_params((1, 40, 40, 1), generator).items()}
    amplitude = 0.1 + 4.9 * torch.rand(config.tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(config.tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(config.tasks, 20, 1, generator=generator) - 5
    y = amplitude * torch.sin(x + phase)
    found: dict[str, Any] = {}
    ways = {"loop": looped_loss, "vmap": mapped_loss, "inner_loop": adapted_loss}
    gradients: dict[str, tuple[Tensor, ...]] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with progress(len(ways) * config.repeats, "MAML, three ways") as bar:
        for _ in range(config.repeats):
            for name, loss in ways.items():
                started = time.perf_counter()
                gradients[name] = torch.autograd.grad(loss(params, x, y), list(params.values()))
                times[name].append(time.perf_counter() - started)
                bar.update()
    found |= {f"{name}_ms": 1e3 * min(each) for name, each in times.items()}
    found["gap"] = max(
        ((g - expected).norm() / expected.norm()).item()
        for name in ("vmap", "inner_loop")
        for g, expected in zip(gradients[name], gradients["loop"])
    )
    return found


def run(config: Config, out: Path) -> dict[str, Any]:
    """Run both parts."""
    return {"ensemble": ensemble(config, out), "maml": maml(config)}


def report(results: dict[str, Any]) -> bool:
    """Print both parts and return whether the ensemble helps and the meta-gradients agree."""
    e, m = results["ensemble"], results["maml"]
    rows = [
        ["", "test accuracy", "test log-loss"],
        ["average member", f"{100 * e['member_accuracy']:.1f} %", f"{e['member_log_loss']:.3f}"],
        ["best member", f"{100 * e['best_member_accuracy']:.1f} %", ""],
        ["ensemble", f"{100 * e['accuracy']:.1f} %", f"{e['log_loss']:.3f}"],
    ]
    print(flat_table(rows))
    print(
        f"entropy of the ensemble: {e['entropy_right']:.3f} where it is right, "
        f"{e['entropy_wrong']:.3f} where it is wrong"
    )
    print(
        f"{results['config']['members']} networks: {e['seconds_together']:.1f} s by one vmap, "
        f"{e['seconds_one_by_one']:.1f} s one by one (from three)"
    )
    print(
        f"MAML, {results['config']['tasks']} tasks, 3 steps of Adam: {m['loop_ms']:.1f} ms by a "
        f"loop, {m['vmap_ms']:.1f} ms by one vmap ({m['loop_ms'] / m['vmap_ms']:.1f} times "
        f"faster), {m['inner_loop_ms']:.1f} ms by inner_loop(tasks=...); relative gap of the "
        f"meta-gradients {m['gap']:.1e}"
    )
    return bool(
        e["accuracy"] >= e["member_accuracy"]
        and e["log_loss"] < e["member_log_loss"]
        and e["entropy_wrong"] > 2 * e["entropy_right"]
        and m["gap"] < 1e-3
        and m["vmap_ms"] < m["loop_ms"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the ensemble did not help."""
    return run_example(__doc__, "vmap_ensembles", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
