# SPDX-License-Identifier: Apache-2.0
"""A deep equilibrium model: infinitely many equal layers, in the memory of one.

The hidden state of an image x is the fixed point of one layer, found by Anderson's method,

    z* = f(z*, x) = tanh(W z* + U x + b),

and a linear read-out of z* gives the logits. Differentiating the equation instead of the iterations
that solved it needs z* alone: with J = df/dz at z*, the cotangent of f is the solution u of
(I - J)' u = dL/dz*, found by GMRES. Memory does not grow with the number of iterations. W is scaled
to a norm below one, so f is a contraction: there is one fixed point, and it can be found.

Compared on handwritten digits, with the same layer: the equilibrium by implicit differentiation;
the same number of layers unrolled and differentiated step by step; and a single layer.

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin, C. Kaynak, Optical
Recognition of Handwritten Digits, UCI, 1998).

References:
    S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models, NeurIPS 2019, theorem 1,
    https://arxiv.org/abs/1909.01377
    H. Walker, P. Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM J. Numer. Anal. 2011

    L. El Ghaoui, F. Gu, B. Travacca, A. Askari, A. Tsai, Implicit Deep Learning, SIAM J. Math. Data
    Science 2021, on well-posedness, https://arxiv.org/abs/1908.06315

Deviations: a small dense layer on digits instead of transformers on text.

Run `python deep_equilibrium.py` (about a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import digits, flat_table, plot_curves, progress, run_example
from torch import Tensor

import torchopt
from torchopt.diff.implicit import custom_fixed_point
from torchopt.linear_solve import GMRES

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        steps: Steps of Adam.
        batch: Images in a step.
        width: Size of z.
        iterations: Largest number of iterations for a fixed point, and number of unrolled layers.
        tolerance: Relative residual at which the iteration stops.
        lr: Step size of Adam.
        seed: Seed of all random numbers.
    """

    steps: int = 300
    batch: int = 128
    width: int = 48
    iterations: int = 60
    tolerance: float = 1e-5
    lr: float = 3e-3
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(steps=4, batch=32)}


def fresh_params(width: int, generator: torch.Generator) -> Params:
    """Return the parameters of a contractive layer and of a read-out."""
    return {
        "w": 0.5 * torch.randn(width, width, generator=generator) / width**0.5,
        "u": torch.randn(width, 64, generator=generator) / 8,
        "b": torch.zeros(width),
        "out": torch.randn(10, width, generator=generator) / width**0.5,
        "out_b": torch.zeros(10),
    }


def contractive(params: Params) -> Params:
    """Return the parameters with W scaled to a norm of at most 0.95, differentiably."""
    norm = torch.linalg.matrix_norm(params["w"], ord=2)
    return {**params, "w": params["w"] * (0.95 / norm).clamp(max=1.0)}


def layer(z: Tensor, params: Params, x: Tensor) -> Tensor:
    """Return f(z, x), `[batch, width]`."""
    return torch.tanh(z @ params["w"].mT + x @ params["u"].mT + params["b"])


def anderson(
    f: Callable[[Tensor], Tensor], z: Tensor, iterations: int, tolerance: float, memory: int = 5
) -> tuple[Tensor, int]:
    """Return a fixed point of f and the number of evaluations, by Anderson's method.

    The next point is the combination of the last values of f whose residuals combine to the
    smallest one; the weights add up to one.
    """
    points, images = [z], [f(z)]
    for used in range(1, iterations):
        residuals = torch.stack([(y - x).flatten() for x, y in zip(points, images)])
        if residuals[-1].norm() <= tolerance * images[-1].norm():
            return images[-1], used
        gram = residuals @ residuals.mT
        ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram + ridge, torch.ones(len(gram), dtype=gram.dtype))
        weights = weights / weights.sum()
        z = torch.stack([w * y for w, y in zip(weights, images)]).sum(0)
        points, images = [*points[1 - memory :], z], [*images[1 - memory :], f(z)]
    return images[-1], iterations


class Model:
    """A model, with the number of evaluations of the layer in its last call."""

    def __init__(self, kind: str, config: Config) -> None:
        self.kind = kind
        self.config = config
        self.evaluations = 0
        self.solve = custom_fixed_point(layer, argnums=1, solve=GMRES(rtol=1e-4))(self.equilibrium)

    def equilibrium(self, z: Tensor, params: Params, x: Tensor) -> Tensor:
        """Return z*, outside of any graph."""
        config = self.config
        z, self.evaluations = anderson(
            lambda z: layer(z, params, x), z, config.iterations, config.tolerance
        )
        return z

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        params = contractive(params)
        z = torch.zeros(len(x), self.config.width)
        if self.kind == "equilibrium, implicit":
            z = self.solve(z, params, x)
        else:
            depth = 1 if self.kind == "one layer" else self.config.iterations
            for _ in range(depth):
                z = layer(z, params, x)
            self.evaluations = depth
        return z @ params["out"].mT + params["out_b"]


def saved_bytes(compute: Callable[[], Tensor]) -> int:
    """Return the memory of the distinct tensors that a computation keeps for its derivative."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = compute()
    del kept
    return sum(sizes.values())


def train(kind: str, config: Config) -> tuple[dict[str, Any], list[float], Params]:
    """Train one model; return its costs and accuracy, its losses, and its parameters."""
    images, labels = digits()
    train_set, test_set = slice(0, 1200), slice(1200, None)
    generator = torch.Generator().manual_seed(config.seed)
    params = fresh_params(config.width, generator)
    params = {name: p.requires_grad_() for name, p in params.items()}
    model = Model(kind, config)
    optimizer = torchopt.Adam(params.values(), lr=config.lr)

    def batch_loss(chosen: Tensor) -> Tensor:
        logits = model.logits(params, images[train_set][chosen])
        return torch.nn.functional.cross_entropy(logits, labels[train_set][chosen])

    losses, evaluations = [], []
    started = time.perf_counter()
    with progress(config.steps, kind) as bar:
        for _ in range(config.steps):
            loss = batch_loss(torch.randint(1200, (config.batch,), generator=generator))
            evaluations.append(model.evaluations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.update()
    seconds = time.perf_counter() - started
    chosen = torch.arange(config.batch)
    memory = saved_bytes(lambda: batch_loss(chosen))
    with torch.no_grad():
        right = model.logits(params, images[test_set]).argmax(-1) == labels[test_set]
    row = {
        "accuracy": right.float().mean().item(),
        "saved_kib": memory / 1024,
        "ms_per_step": 1e3 * seconds / config.steps,
        "evaluations": sum(evaluations) / len(evaluations),
    }
    return row, losses, {name: p.detach() for name, p in params.items()}


def gradient_gap(params: Params, config: Config) -> float:
    """Return the relative distance of the implicit gradient from that through 200 layers."""
    images, labels = digits()
    deep = Model("unrolled", Config(**{**vars(config), "iterations": 200}))
    gradients = []
    for model in (Model("equilibrium, implicit", config), deep):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        logits = model.logits(leaves, images[: config.batch])
        loss = torch.nn.functional.cross_entropy(logits, labels[: config.batch])
        gradients.append(torch.autograd.grad(loss, leaves["w"])[0])
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train the three models."""
    kinds = ("equilibrium, implicit", f"unrolled, {config.iterations} layers", "one layer")
    trained = {kind: train(kind, config) for kind in kinds}
    smooth = {}
    for kind, (_, losses, _) in trained.items():
        windows = [losses[max(0, step - 10) : step + 1] for step in range(len(losses))]
        smooth[kind] = [(step, sum(w) / len(w)) for step, w in enumerate(windows)]
    plot_curves(
        smooth,
        out / "deep_equilibrium.png",
        covered=kinds[0],
        xlabel="step",
        ylabel="training loss, mean of 11 steps",
        title="Digits",
        yscale="log",
    )
    return {
        "models": {kind: row for kind, (row, _, _) in trained.items()},
        "gradient_gap": gradient_gap(trained[kinds[0]][2], config),
    }


def report(results: dict[str, Any]) -> bool:
    """Print the table and return whether the equilibrium is as good, in less memory."""
    rows = [["", "test accuracy", "kept for the derivative", "evaluations of f", "ms/step"]]
    for kind, row in results["models"].items():
        rows.append(
            [
                kind,
                f"{100 * row['accuracy']:.1f} %",
                f"{row['saved_kib']:.0f} KiB",
                f"{row['evaluations']:.1f}",
                f"{row['ms_per_step']:.1f}",
            ]
        )
    print(flat_table(rows))
    print(f"implicit gradient against 200 layers: relative gap {results['gradient_gap']:.1e}")
    implicit, unrolled, _ = results["models"].values()
    return bool(
        implicit["accuracy"] > unrolled["accuracy"] - 0.01
        and implicit["accuracy"] > 0.9
        and implicit["saved_kib"] < 0.5 * unrolled["saved_kib"]
        and results["gradient_gap"] < 0.01
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the equilibrium was worse or larger."""
    return run_example(__doc__, "deep_equilibrium", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
