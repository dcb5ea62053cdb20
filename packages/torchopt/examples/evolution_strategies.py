# SPDX-License-Identifier: Apache-2.0
"""Train a network on its error rate, which has no derivative: evolution strategies on digits.

The fraction of misclassified images is piecewise constant: its gradient is zero wherever it exists.
Evolution strategies need only values. Each step draws directions z_i, evaluates the error rate on
one minibatch at theta + sigma z_i and theta - sigma z_i, all by one vmap, replaces the errors by
their centred ranks u, and gives

    g = 1 / (2 sigma N) sum_i (u_i+ - u_i-) z_i

to Adam.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    T. Salimans, J. Ho, X. Chen, S. Sidor, I. Sutskever, Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning, 2017, https://arxiv.org/abs/1703.03864

Run `python evolution_strategies.py` (below a minute).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from example_tools import digits, plot_curves, progress
from torch import Tensor

import torchopt
from torchopt.diff.zero_order import Gaussian, ZeroOrder, estimators

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        steps: Steps of Adam.
        num_pairs: Antithetic pairs in each step.
        sigma: Size of the perturbation.
        lr: Step size of Adam.
        batch: Images on which the particles of a step are compared.
        width: Hidden units.
        seed: Seed of all random numbers.
    """

    steps: int = 160
    num_pairs: int = 100
    sigma: float = 0.05
    lr: float = 0.02
    batch: int = 256
    width: int = 32
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(steps=40, num_pairs=30)}


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for training, and others for testing."""
    images, labels = digits()
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def fresh_params(width: int, generator: torch.Generator) -> Params:
    """Return the parameters of a network with one hidden layer."""
    return {
        "w1": torch.randn(64, width, generator=generator) / 8,
        "b1": torch.zeros(width),
        "w2": torch.randn(width, 10, generator=generator) / width**0.5,
        "b2": torch.zeros(10),
    }


def error_rate(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of wrong labels, through which no gradient flows."""
    hidden = torch.tanh(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return (logits.argmax(-1) != labels).float().mean()


def train(config: Config) -> dict[str, object]:
    """Train, and return the results."""
    images, labels, test_images, test_labels = load()
    generator = torch.Generator().manual_seed(config.seed)
    params = fresh_params(config.width, generator)
    engine = ZeroOrder(
        Gaussian(),
        estimators.shaped(estimators.antithetic),
        num_samples=config.num_pairs,
        sigma=config.sigma,
        generator=generator,
        vectorized=True,
    )
    optimizer = torchopt.adam(config.lr)
    state = optimizer.init(params)
    curve = [(0, error_rate(params, test_images, test_labels).item())]
    evaluations = 0
    started = time.perf_counter()
    every = max(1, config.steps // 20)
    with progress(config.steps, "ES") as bar:
        for step in range(1, config.steps + 1):
            batch = torch.randint(len(labels), (config.batch,), generator=generator)
            result = engine.estimate(error_rate, params, images[batch], labels[batch])
            evaluations += result.evaluations
            updates, state = optimizer.update(result.gradient, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
            if step % every == 0 or step == config.steps:
                curve.append((step, error_rate(params, test_images, test_labels).item()))
                bar.set_postfix(test_error=f"{curve[-1][1]:.3f}")
            bar.update()
    seconds = time.perf_counter() - started
    return {
        "config": asdict(config),
        "curve": curve,
        "evaluations": evaluations,
        "seconds": seconds,
        "test_error": curve[-1][1],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when it did not learn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few seconds; judged leniently")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = replace(PRESETS["smoke" if options.smoke else "full"], seed=options.seed)
    results = train(config)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "evolution_strategies.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    curve = results["curve"]
    assert isinstance(curve, list)
    plot_curves(
        {"by error rates alone": curve},
        options.out / "evolution_strategies.png",
        xlabel="step",
        ylabel="test error",
    )
    first, last = curve[0][1], curve[-1][1]
    print(
        f"test error {100 * first:.1f} % -> {100 * last:.1f} % (chance 90 %) after "
        f"{results['evaluations']} evaluations, {results['seconds']:.1f} s; wrote {path}"
    )
    limit = 0.6 if options.smoke else 0.35
    learned = last < limit
    print("learned" if learned else f"FAILED TO LEARN: expected a test error below {limit}")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
