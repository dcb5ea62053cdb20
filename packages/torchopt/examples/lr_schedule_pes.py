# SPDX-License-Identifier: Apache-2.0
"""Learn a learning-rate schedule by persistent evolution strategies (PES).

A small network learns handwritten digits by 150 steps of stochastic gradient descent on batches of
ten images. The schedule interpolates the logarithm of the learning rate linearly between five
knots. The meta-objective is the loss on held-out images after every step, averaged over the run.

Its derivative through 150 steps is expensive, and short windows are misleading: within a few steps
a small learning rate looks best, because it averages out the noise of the batches, although a large
one gets further in the long run (the short-horizon bias). PES updates the schedule after every
window of ten steps, with particles that keep their own inner states, and is still unbiased: the
loss of a particle is attributed to the sum of all its perturbations. Truncated ES is the same
program without that memory. Both get the same number of inner steps. The control is the best
constant learning rate of a fine grid.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    P. Vicol, L. Metz, J. Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation
    Graphs with Persistent Evolution Strategies, ICML 2021, https://arxiv.org/abs/2112.13835
    Y. Wu, M. Ren, R. Liao, R. Grosse, Understanding Short-Horizon Bias in Stochastic
    Meta-Optimization, ICLR 2018, https://arxiv.org/abs/1803.02021

Run `python lr_schedule_pes.py` (about two minutes) or with `--smoke` (seconds).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import digits as load_digits
from example_tools import flat_table, progress, run_example
from torch import Tensor

import torchopt
from torchopt.diff.zero_order import unrolled

Params = dict[str, Tensor]
WORST = 5.0  # the loss of a run that diverged


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        horizon: Inner steps of an episode.
        window: Inner steps between two updates of the schedule.
        knots: Number of knots of the schedule.
        batch: Images of an inner step.
        width: Hidden units.
        meta_steps: Updates of the schedule.
        num_pairs: Antithetic pairs of particles.
        sigma: Size of the perturbation of log learning rates.
        meta_lr: Step size of Adam on the schedule, decayed to zero by a cosine.
        start: Learning rate of the first schedule.
        test_runs: Runs with other weights and batches in the test of a schedule.
        grid: Constant learning rates that are tried as a control.
        seed: Seed of all random numbers.
    """

    horizon: int = 150
    window: int = 10
    knots: int = 5
    batch: int = 10
    width: int = 32
    meta_steps: int = 600
    num_pairs: int = 16
    sigma: float = 0.2
    meta_lr: float = 0.04
    start: float = 0.05
    test_runs: int = 24
    grid: int = 13
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(horizon=40, meta_steps=60, num_pairs=8, meta_lr=0.12, test_runs=8, grid=5),
}


@dataclass(frozen=True)
class Digits:
    """Images `[n, 64]` and labels `[n]` for training and for the meta-objective."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load() -> Digits:
    """Return the digits, 1400 of them for training."""
    images, labels = load_digits()
    return Digits(images[:1400], labels[:1400], images[1400:], labels[1400:])


def rate(log_rates: Tensor, t: int, horizon: int) -> Tensor:
    """Return the learning rate of step t, by linear interpolation of its logarithm."""
    place = t / max(horizon - 1, 1) * (len(log_rates) - 1)
    left = min(int(place), len(log_rates) - 2)
    between = place - left
    return torch.exp((1 - between) * log_rates[left] + between * log_rates[left + 1])


def loss_of(net: Params, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of a network with one hidden layer."""
    hidden = torch.tanh(images @ net["w1"] + net["b1"])
    return torch.nn.functional.cross_entropy(hidden @ net["w2"] + net["b2"], labels)


def training(config: Config, digits: Digits) -> unrolled.InnerLoop:
    """Return the inner loop: stochastic gradient descent, its batches drawn from torch."""

    def start(log_rates: Tensor) -> Params:
        del log_rates
        return {
            "w1": torch.randn(64, config.width) / 8,
            "b1": torch.zeros(config.width),
            "w2": torch.randn(config.width, 10) / config.width**0.5,
            "b2": torch.zeros(10),
        }

    def step(log_rates: Tensor, net: Params, t: int) -> tuple[Params, Tensor]:
        chosen = torch.randint(len(digits.labels), (config.batch,))
        images, labels = digits.images[chosen], digits.labels[chosen]
        gradient = torch.func.grad(loss_of)(net, images, labels)
        lr = rate(log_rates, t, config.horizon)
        net = {name: w - lr * gradient[name] for name, w in net.items()}
        judged = torch.randint(len(digits.held_out_labels), (50,))
        loss = loss_of(net, digits.held_out_images[judged], digits.held_out_labels[judged])
        return net, torch.nan_to_num(loss, nan=WORST, posinf=WORST).clamp(max=WORST)

    return unrolled.InnerLoop(start, step, config.horizon)


def judge(schedules: Tensor, config: Config, digits: Digits) -> Tensor:
    """Return the held-out loss after every step, averaged over runs.

    Args:
        schedules: `[n, knots]`.
        config: The settings.
        digits: The data.

    Returns:
        `[n, horizon]`. All schedules see the same initial weights and batches.
    """
    loop = training(config, digits)

    def one(log_rates: Tensor) -> Tensor:
        net, losses = loop.start(log_rates), []
        for t in range(config.horizon):
            net, _ = loop.step(log_rates, net, t)
            loss = loss_of(net, digits.held_out_images, digits.held_out_labels)
            losses.append(torch.nan_to_num(loss, nan=WORST, posinf=WORST).clamp(max=WORST))
        return torch.stack(losses)

    total = torch.zeros(len(schedules), config.horizon)
    with torch.random.fork_rng(devices=[]):
        for run in range(config.test_runs):
            torch.manual_seed(1_000_000 + run)
            total += torch.func.vmap(one, randomness="same")(schedules)
    return total / config.test_runs


def meta_learn(
    make: Any, label: str, config: Config, digits: Digits
) -> tuple[Tensor, list[list[float]], float]:
    """Return the learned log learning rates, their history and the seconds it took."""
    es = make(
        training(config, digits),
        window=config.window,
        num_pairs=config.num_pairs,
        sigma=config.sigma,
    )
    log_rates = torch.full((config.knots,), config.start).log()
    optimizer = torchopt.adam(torchopt.schedule.cosine_decay(config.meta_lr, config.meta_steps))
    optimizer_state = optimizer.init(log_rates)
    state = es.init(log_rates, config.seed)
    history = [log_rates.tolist()]
    started = time.perf_counter()
    with progress(config.meta_steps, label) as bar:
        for _ in range(config.meta_steps):
            result, state = es.estimate(log_rates, state)
            updates, optimizer_state = optimizer.update(
                result.gradient, optimizer_state, inplace=False
            )
            log_rates = torchopt.apply_updates(log_rates, updates, inplace=False)
            history.append(log_rates.tolist())
            bar.update()
    return log_rates, history, time.perf_counter() - started


def plot(results: dict[str, Any], config: Config, path: Path) -> None:
    """Write the schedules and the losses of training with them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    steps = range(config.horizon)
    for label, one in results["schedules"].items():
        rates = [rate(torch.tensor(one["log_rates"]), t, config.horizon).item() for t in steps]
        left.plot(steps, rates, label=label)
        middle.plot(steps, one["losses"], label=f"{label}: mean {one['mean_loss']:.3f}")
    left.set(xlabel="inner step", ylabel="learning rate", yscale="log", title="schedules")
    middle.set(xlabel="inner step", ylabel="held-out loss", yscale="log", title="training")
    rates, losses = zip(*results["grid"])
    right.plot(rates, losses, marker="o", markersize=3, color="grey", label="constant rates")
    for k, (label, one) in enumerate(results["schedules"].items()):
        right.axhline(one["mean_loss"], color=f"C{k}", linestyle="--", label=label)
    right.set(
        xlabel="constant learning rate",
        ylabel="mean held-out loss of the run",
        xscale="log",
        yscale="log",
        title="meta-objective",
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Learn both schedules, judge them, and write the results."""
    digits = load()
    learned = {}
    for label, make in (("PES", unrolled.persistent_es), ("truncated ES", unrolled.truncated_es)):
        learned[label] = meta_learn(make, label, config, digits)
    constants = torch.logspace(-2, 0.4, config.grid).log()
    grid = judge(constants[:, None].expand(-1, config.knots), config, digits).mean(1)
    best = constants[grid.argmin()].expand(config.knots)
    names = [*learned, "best constant", "start"]
    first = torch.full((config.knots,), config.start).log()
    schedules = torch.stack([*(one[0] for one in learned.values()), best, first])
    losses = judge(schedules, config, digits)
    results: dict[str, Any] = {
        "schedules": {
            name: {
                "log_rates": schedule.tolist(),
                "losses": curve.tolist(),
                "mean_loss": curve.mean().item(),
                "final_loss": curve[-1].item(),
            }
            for name, schedule, curve in zip(names, schedules, losses)
        },
        "grid": list(zip(constants.exp().tolist(), grid.tolist())),
        "history": {label: one[1] for label, one in learned.items()},
        "meta_seconds": {label: one[2] for label, one in learned.items()},
        "inner_steps": config.meta_steps * config.window * 2 * config.num_pairs,
    }
    plot(results, config, out / "lr_schedule_pes.png")
    return results


def report(results: dict[str, Any]) -> bool:
    """Print a row for each schedule, and return whether PES was better than the others."""
    found = results["schedules"]
    rows = [["schedule", "mean loss", "final loss", "learning rates at the knots"]]
    for label, one in found.items():
        rates = " ".join(f"{rate:.3f}" for rate in torch.tensor(one["log_rates"]).exp().tolist())
        rows.append([label, f"{one['mean_loss']:.4f}", f"{one['final_loss']:.4f}", rates])
    print(flat_table(rows))
    seconds = ", ".join(f"{label} {s:.0f} s" for label, s in results["meta_seconds"].items())
    print(f"{results['inner_steps']} inner steps each: {seconds}")
    rivals = ("best constant", "truncated ES")
    return all(found["PES"]["mean_loss"] < found[name]["mean_loss"] for name in rivals)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when PES did not learn the best schedule."""
    return run_example(__doc__, "lr_schedule_pes", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
