# SPDX-License-Identifier: Apache-2.0
"""Learning to reweight: find weights of training examples by means of a small clean set.

The data are handwritten fours and nines. Nearly all training images are of one class, so a network
learns to predict that class. Ten images, five of each class, are clean. In every step, the weight
of an image i of the batch is the rate at which it would lower the loss on the clean images:

    theta'(e) = theta - alpha grad sum_i e_i l_i(theta)          one step, e = 0
    w_i = max(-d l_clean(theta'(e)) / d e_i, 0), divided by their sum

and the step is taken with w. The derivative with respect to e goes through one step of `MetaSGD`.

Controls: equal weights; weights by class size (the "proportion" of the paper); training on the ten
clean images alone.

Data: fours and nines among the images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C.
Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998), shifted by fractions of a pixel at
random for the 1000 training images, with noise on every pixel: without it ten images suffice.

References:
    M. Ren, W. Zeng, B. Yang, R. Urtasun, Learning to Reweight Examples for Robust Deep Learning,
    ICML 2018, algorithm 1 and section 4.1, https://arxiv.org/abs/1803.09050

Deviations: digits of 8 x 8 pixels and a network with one hidden layer instead of MNIST and LeNet.

Run `python learning_to_reweight.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import digits, flat_table, plot_curves, progress, run_example
from torch import Tensor, nn

import torchopt

MAJORITY, MINORITY = 9, 4


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        proportions: Fractions of the larger class among the training images.
        images: Training images.
        steps: Of SGD.
        batch: Images in a step.
        lr: Step size, also of the trial step.
        noise: Standard deviation of the noise; that of the pixels is 1.
        width: Hidden units.
        repeats: Number of runs, each with its own images; their mean is reported.
        seed: Seed of all random numbers.
    """

    proportions: tuple[float, ...] = (0.9, 0.98, 0.99, 0.995)
    images: int = 1000
    steps: int = 400
    batch: int = 100
    lr: float = 0.1
    noise: float = 1.5
    width: int = 64
    repeats: int = 5
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(proportions=(0.98,), steps=10, repeats=1)}
METHODS = ("equal", "proportion", "clean only", "learned")


@dataclass(frozen=True)
class Split:
    """Images `[n, 64]` and labels (1 for the rare class) of three disjoint sets."""

    images: Tensor
    labels: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images moved by up to 0.7 pixels in each direction."""
    moves = (2 * torch.rand(len(images), 2, generator=generator) - 1) * 0.7 * 2 / 8
    theta = torch.eye(2).expand(len(images), 2, 2)
    theta = torch.cat([theta, moves.unsqueeze(-1)], dim=-1)
    square = images.view(-1, 1, 8, 8)
    grid = nn.functional.affine_grid(theta, list(square.shape), align_corners=False)
    moved = nn.functional.grid_sample(square, grid, padding_mode="border", align_corners=False)
    return moved.flatten(1)


def draw(proportion: float, config: Config, generator: torch.Generator) -> Split:
    """Return training images of which `proportion` are of the larger class, and balanced sets."""
    images, labels = digits()
    parts: dict[str, list[Tensor]] = {"train": [], "clean": [], "test": []}
    rare = round(config.images * (1 - proportion))
    for digit, count in ((MAJORITY, config.images - rare), (MINORITY, rare)):
        own = images[labels == digit]
        own = own[torch.randperm(len(own), generator=generator)]
        parts["clean"].append(own[:5])
        parts["test"].append(own[5:75])
        base = own[75:]
        chosen = base[torch.arange(count) % len(base)]  # images repeat if there are too few
        parts["train"].append(shifted(chosen, generator))

    def labelled(name: str) -> tuple[Tensor, Tensor]:
        both = parts[name]
        images = torch.cat(both)
        images = images + config.noise * torch.randn(images.shape, generator=generator)
        return images, torch.cat([torch.full((len(x),), i) for i, x in enumerate(both)])

    return Split(*labelled("train"), *labelled("clean"), *labelled("test"))


class Network(nn.Sequential):
    """A network with one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))


def example_losses(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image."""
    return nn.functional.cross_entropy(net(images), labels, reduction="none")


def example_weights(
    net: nn.Module, images: Tensor, labels: Tensor, clean: tuple[Tensor, Tensor], lr: float
) -> Tensor:
    """Return the weights of the images by their effect on the clean images; their sum is one.

    The network is left as it was.
    """
    start = torchopt.extract_state_dict(net, by="reference")
    e = torch.zeros(len(images), dtype=images.dtype, requires_grad=True)
    inner = torchopt.MetaSGD(net, lr=lr)
    inner.step((e * example_losses(net, images, labels)).sum())
    clean_loss = example_losses(net, *clean).mean()
    slope = torch.autograd.grad(clean_loss, e)[0]
    torchopt.recover_state_dict(net, start)
    weights = (-slope).clamp(min=0)
    total = weights.sum()
    return weights / total if total > 0 else weights


def train(
    method: str, split: Split, config: Config, seed: int, bar: Any
) -> tuple[list[tuple[int, float]], float]:
    """Return the curve of test accuracies, and the fraction of weight on the rare class."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Network(config.width)
    optimizer = torchopt.SGD(net.parameters(), lr=config.lr)
    clean = (split.clean_images, split.clean_labels)
    frequency = split.labels.bincount(minlength=2) / len(split.labels)
    curve, rare_share = [], []
    for step in range(config.steps + 1):
        if step % max(1, config.steps // 20) == 0:
            with torch.no_grad():
                right = net(split.test_images).argmax(-1) == split.test_labels
            curve.append((step, right.float().mean().item()))
        chosen = torch.randint(len(split.labels), (config.batch,), generator=generator)
        images, labels = split.images[chosen], split.labels[chosen]
        if method == "clean only":
            images, labels = clean
        if method == "learned":
            weights = example_weights(net, images, labels, clean, config.lr)
        elif method == "proportion":
            weights = 1 / frequency[labels]
            weights = weights / weights.sum()
        else:
            weights = torch.full((len(labels),), 1 / len(labels))
        rare_share.append(weights[labels == 1].sum().item())
        loss = (weights * example_losses(net, images, labels)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bar.update()
    return curve, sum(rare_share) / len(rare_share)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train with every method on every imbalance."""
    table: dict[str, Any] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    with progress(len(config.proportions) * len(METHODS) * config.repeats, "training") as bar:
        for proportion in config.proportions:
            rows: dict[str, Any] = {}
            for method in METHODS:
                accuracies, shares = [], []
                for repeat in range(config.repeats):
                    seed = 1000 * config.seed + repeat
                    generator = torch.Generator().manual_seed(seed)
                    split = draw(proportion, config, generator)
                    curve, share = train(method, split, config, seed, bar)
                    accuracies.append([accuracy for _, accuracy in curve])
                    shares.append(share)
                found = torch.tensor(accuracies)
                rows[method] = {
                    "accuracy": found[:, -1].mean().item(),
                    "worst": found[:, -1].min().item(),
                    "weight_of_rare_class": sum(shares) / len(shares),
                }
                steps = [step for step, _ in curve]
                curves[method] = list(zip(steps, found.mean(0).tolist()))
            table[str(proportion)] = rows
    plot_curves(
        curves,
        out / "learning_to_reweight.png",
        xlabel="step",
        ylabel="test accuracy",
        title=f"Fours and nines, {100 * config.proportions[-1]:.1f} % nines",
        ylim=(0.4, 1.0),
    )
    return {"proportions": table}


def report(results: dict[str, Any]) -> bool:
    """Print test accuracies and return whether learned weights hold where the others fail."""
    rows = [["share of the larger class", *METHODS, "learned weight of the rare class"]]
    for proportion, methods in results["proportions"].items():
        cells = [f"{100 * methods[m]['accuracy']:.1f} %" for m in METHODS]
        share = methods["learned"]["weight_of_rare_class"]
        rows.append([f"{100 * float(proportion):.1f} %", *cells, f"{share:.2f}"])
    print(f"test accuracy (balanced), mean of {results['config']['repeats']} runs")
    print(flat_table(rows))
    hardest = results["proportions"][str(results["config"]["proportions"][-1])]
    learned = hardest["learned"]["accuracy"]
    return bool(
        learned > hardest["equal"]["accuracy"] + 0.1
        and all(learned > hardest[m]["accuracy"] for m in METHODS if m != "learned")
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when learned weights were not the best."""
    return run_example(__doc__, "learning_to_reweight", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
