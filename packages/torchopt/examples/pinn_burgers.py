# SPDX-License-Identifier: Apache-2.0
"""A physics-informed network: solve Burgers' equation by the residual of a network.

    u_t + u u_x = nu u_xx        for -1 <= x <= 1, 0 <= t <= 1

The loss is the mean square of the residual at random points, which contains second derivatives of
the network, plus that of the error at t = 0 and x = -1, 1. Each step differentiates this loss once
more. It runs eagerly and with `torchopt.second_order.compile`. The solution is a travelling front,
u = c - a tanh(a (x - c t) / (2 nu)), so that the error is known.

References:
    M. Raissi, P. Perdikaris, G. E. Karniadakis, Physics-informed neural networks, Journal of
    Computational Physics 378, 2019, https://arxiv.org/abs/1711.10561

Run `python pinn_burgers.py` (half a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import fastest_ms, flat_table, plot_curves, progress, run_example
from torch import Tensor, nn

import torchopt

NU, A, C = 0.05, 0.5, 0.5


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        points: Random points of a step inside, and the same number on the boundary.
        width: Hidden units, three layers.
        steps: Steps of Adam.
        execute: Argument of `torchopt.second_order.compile`.
        repeats: Repetitions of each timing; the fastest counts.
        seed: Seed of all random numbers.
    """

    points: int = 64
    width: int = 24
    steps: int = 6000
    execute: str = "compile"
    repeats: int = 500
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(points=16, width=8, steps=10, execute="trace", repeats=2),
}


def front(x: Tensor, t: Tensor) -> Tensor:
    """Return the solution."""
    return C - A * torch.tanh(A * (x - C * t) / (2 * NU))


def residual(net: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return u_t + u u_x - nu u_xx at points, each argument `[points]`."""
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    u = net(torch.stack([x, t], 1)).squeeze(1)
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - NU * u_xx


def loss(net: Any, inside: Tensor, border: Tensor) -> Tensor:
    """Return the mean squares of the residual and of the boundary error; points are (x, t)."""
    error = net(border).squeeze(1) - front(*border.unbind(1))
    return (residual(net, *inside.unbind(1)) ** 2).mean() + (error**2).mean()


def draw(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random points, inside and on the boundary."""
    inside, border = torch.rand(2, config.points, 2, generator=generator)
    scale, shift = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 0.0])
    inside, border = inside * scale + shift, border * scale + shift
    half = config.points // 2
    border[:half, 1] = 0.0
    border[half:, 0] = border[half:, 0].sign()
    return inside, border


def fresh_net(config: Config) -> nn.Module:
    """Return a network from (x, t) to u; the same for the same seed."""
    torch.manual_seed(config.seed)
    sizes = (2, config.width, config.width, config.width)
    layers = [x for a, b in zip(sizes, sizes[1:]) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(config.width, 1))


def train(function: Any, net: nn.Module, config: Config, label: str) -> list[float]:
    """Train the network in place and return the losses."""
    rate = torchopt.schedule.cosine_decay(5e-3, config.steps)
    optimizer = torchopt.Adam(net.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    with progress(config.steps, label) as bar:
        for _ in range(config.steps):
            value = function(net, *draw(config, generator))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            bar.update()
    return losses


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train twice, eagerly and with the compiled gradient, and compare."""
    fast = torchopt.second_order.compile(loss, execute=config.execute)
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(0, 1, 51))
    wanted = front(*grid.unbind(1))
    results: dict[str, Any] = {}
    curves = {}
    for name, function in (("eager", loss), ("second_order.compile", fast)):
        net = fresh_net(config)
        losses = train(function, net, config, name)
        with torch.no_grad():
            error = (net(grid).squeeze(1) - wanted).norm() / wanted.norm()
        curves[name] = list(enumerate(losses))[:: max(1, config.steps // 100)]
        results[name] = {"losses": [value for _, value in curves[name]], "error": error.item()}
    net, points = fresh_net(config), draw(config, torch.Generator().manual_seed(config.seed))
    results["ms"] = fastest_ms(
        {
            "eager": lambda: loss(net, *points).backward(),
            "second_order.compile": lambda: fast(net, *points).backward(),
        },
        config.repeats,
    )
    labels = {"xlabel": "step", "ylabel": "loss", "covered": "eager"}
    plot_curves(curves, out / "pinn_burgers.png", yscale="log", **labels)
    return results


def report(results: dict[str, Any]) -> bool:
    """Print errors and times, and return whether the equation was solved, and in less time."""
    rows = [["", "error of the solution", "ms a gradient"]]
    for name, ms in results["ms"].items():
        rows.append([name, f"{100 * results[name]['error']:.2f} %", f"{ms:.2f}"])
    print(flat_table(rows))
    slow, quick = results["ms"].values()
    print(f"{slow / quick:.1f} times as fast")
    errors = [results[name]["error"] for name in results["ms"]]
    return bool(slow > quick and max(errors) < 0.05)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when the equation was not solved or no time was saved."""
    return run_example(__doc__, "pinn_burgers", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
