# SPDX-License-Identifier: Apache-2.0
"""Distil a data set into ten images, one per digit, on which a few steps of training suffice.

The pixels of ten images, and the step sizes of a few steps on them, are learned so that a network
that is trained on these images alone, from known initial parameters, classifies real images:

    theta_{t+1} = theta_t - alpha_t grad L(theta_t; distilled)        t = 0, ..., T - 1
    minimise over the distilled images and alpha the loss of theta_T on real images

The meta-gradient goes through all steps. Two settings of the paper: one fixed initialisation, and
random ones that differ at each meta-step and in the test.

Controls: training until convergence on ten real images, either drawn at random or those nearest to
the means of their classes.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    T. Wang, J.-Y. Zhu, A. Torralba, A. Efros, Dataset Distillation, 2018, algorithm 1,
    https://arxiv.org/abs/1811.10959

Deviations: 8 x 8 pixels and a network with one hidden layer instead of MNIST and LeNet.

Run `python dataset_distillation.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import digits, flat_table, mean_and_half_width, progress, run_example
from torch import Tensor
from torch.func import grad, vmap

import torchopt

Params = dict[str, Tensor]
NUM_DIGITS = 10


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        meta_steps: Updates of the distilled images.
        inner_steps: Steps of training on them.
        batch: Real images in the outer loss of a meta-step.
        starts: Random initialisations of a meta-step, in the second setting.
        lr: Step size of Adam.
        width: Hidden units.
        test_starts: Random initialisations in the test.
        seed: Seed of all random numbers.
    """

    meta_steps: int = 600
    inner_steps: int = 5
    batch: int = 512
    starts: int = 8
    lr: float = 0.02
    width: int = 32
    test_starts: int = 50
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(meta_steps=5, starts=2, test_starts=3)}
# Accuracy on MNIST that the paper reports for ten images and a fixed start: section 4.1.
PAPER = {"fixed": 93.8}


def fresh_params(width: int, generator: torch.Generator) -> Params:
    """Return newly initialised parameters of a network with one hidden layer."""
    return {
        "w1": torch.randn(64, width, generator=generator) / 8,
        "b1": torch.zeros(width),
        "w2": torch.randn(width, NUM_DIGITS, generator=generator) / width**0.5,
        "b2": torch.zeros(NUM_DIGITS),
    }


def logits(params: Params, images: Tensor) -> Tensor:
    """Return the network's outputs."""
    hidden = torch.tanh(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return torch.nn.functional.cross_entropy(logits(params, images), labels)


def train(params: Params, images: Tensor, log_rates: Tensor) -> Params:
    """Return the parameters after one step for each rate on the distilled images."""
    labels = torch.arange(NUM_DIGITS)
    for log_rate in log_rates.unbind():
        optimizer = torchopt.sgd(log_rate.exp())
        grads = grad(loss)(params, images, labels)
        updates, _ = optimizer.update(grads, optimizer.init(params), params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def stacked(starts: list[Params]) -> Params:
    """Return several networks as one tree with a leading dimension."""
    return {name: torch.stack([start[name] for start in starts]) for name in starts[0]}


def distil(
    setting: str, config: Config, real: tuple[Tensor, Tensor], fixed: Params
) -> tuple[Tensor, Tensor]:
    """Return distilled images `[10, 64]` and the logarithms of the step sizes."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    learned = {
        "images": torch.randn(NUM_DIGITS, 64, generator=generator).requires_grad_(),
        "log_rates": torch.full((config.inner_steps,), -1.6).requires_grad_(),
    }
    outer = torchopt.Adam(learned.values(), lr=config.lr)
    images, labels = real
    with progress(config.meta_steps, f"distil, {setting} start") as bar:
        for _ in range(config.meta_steps):
            chosen = torch.randint(len(labels), (config.batch,), generator=generator)
            if setting == "fixed":
                starts = stacked([fixed])
            else:
                starts = stacked(
                    [fresh_params(config.width, generator) for _ in range(config.starts)]
                )

            def real_loss(start: Params, chosen: Tensor = chosen) -> Tensor:
                params = train(start, learned["images"], learned["log_rates"])
                return loss(params, images[chosen], labels[chosen])

            value = vmap(real_loss)(starts).mean()
            outer.zero_grad()
            value.backward()
            outer.step()
            bar.set_postfix(loss=f"{value.item():.2f}", refresh=False)
            bar.update()
    return learned["images"].detach(), learned["log_rates"].detach()


def train_on_real(start: Params, images: Tensor) -> Params:
    """Return the parameters after training to the end on ten real images."""
    optimizer = torchopt.adam(0.01)
    state = optimizer.init(start)
    params = start
    labels = torch.arange(NUM_DIGITS)
    for _ in range(100):
        grads = grad(loss)(params, images, labels)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def picture(rows: dict[str, Tensor], path: Path) -> None:
    """Write the distilled images of each setting in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), NUM_DIGITS, figsize=(10, 1.3 * len(rows)))
    for line, (label, images) in zip(axes, rows.items()):
        for digit, (cell, image) in enumerate(zip(line, images)):
            cell.imshow(image.view(8, 8).numpy(), cmap="gray")
            cell.set(xticks=[], yticks=[], title=str(digit))
        line[0].set_ylabel(label, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Distil in both settings and compare with real images."""
    images, labels = digits()
    real, test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
    generator = torch.Generator().manual_seed(config.seed)
    fixed = fresh_params(config.width, generator)
    fresh = stacked([fresh_params(config.width, generator) for _ in range(config.test_starts)])

    def accuracy(params: Params) -> Tensor:
        return (logits(params, test[0]).argmax(-1) == test[1]).float().mean()

    found: dict[str, Any] = {}
    pictures = {}
    for setting in ("fixed", "random"):
        distilled, log_rates = distil(setting, config, real, fixed)
        starts = stacked([fixed]) if setting == "fixed" else fresh
        with torch.no_grad():
            values = vmap(lambda p, d=distilled, r=log_rates: accuracy(train(p, d, r)))(starts)
        single = len(values) == 1
        found[setting] = {
            "accuracy": [values.item(), 0.0] if single else mean_and_half_width(values),
            "rates": log_rates.exp().tolist(),
        }
        pictures[f"{setting} start"] = distilled
    by_class = [real[0][real[1] == digit] for digit in range(NUM_DIGITS)]
    nearest = torch.stack([x[(x - x.mean(0)).norm(dim=1).argmin()] for x in by_class])
    found["nearest to the mean"] = {
        "accuracy": mean_and_half_width(vmap(lambda p: accuracy(train_on_real(p, nearest)))(fresh))
    }
    drawn = torch.stack(
        [
            torch.stack([x[torch.randint(len(x), (), generator=generator)] for x in by_class])
            for _ in range(config.test_starts)
        ]
    )
    values = vmap(lambda p, d: accuracy(train_on_real(p, d)))(fresh, drawn)
    found["random real images"] = {"accuracy": mean_and_half_width(values)}
    pictures["nearest"] = nearest
    picture(pictures, out / "dataset_distillation.png")
    return {"methods": found}


def report(results: dict[str, Any]) -> bool:
    """Print accuracies and return whether ten distilled images beat ten real ones."""
    methods = results["methods"]
    steps = results["config"]["inner_steps"]
    rows = [["ten images, one of each digit", "test accuracy", "paper (MNIST)"]]
    titles = {
        "fixed": f"distilled, fixed start, {steps} steps",
        "random": f"distilled, random starts, {steps} steps",
        "nearest to the mean": "real, nearest to the mean, 100 steps",
        "random real images": "real, drawn at random, 100 steps",
    }
    for name, title in titles.items():
        mean, half = methods[name]["accuracy"]
        text = f"{100 * mean:.1f} %" if half == 0 else f"{100 * mean:.1f} ± {100 * half:.1f} %"
        rows.append([title, text, f"{PAPER[name]} %" if name in PAPER else ""])
    print(flat_table(rows))
    best_real = max(
        methods[name]["accuracy"][0] for name in ("nearest to the mean", "random real images")
    )
    return bool(
        methods["fixed"]["accuracy"][0] > best_real + 0.05
        and methods["random"]["accuracy"][0] > best_real
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when distilled images were not the best."""
    return run_example(__doc__, "dataset_distillation", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
