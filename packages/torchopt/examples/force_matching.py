# SPDX-License-Identifier: Apache-2.0
"""Force matching: learn the potential of a cluster of atoms from the forces on them.

A network gives the energy of each pair of atoms, and the force on an atom is minus the slope of the
energy. Training compares forces with data, so each step differentiates a gradient. The step runs
eagerly and with `torchopt.second_order.compile`: the losses and parameters are the same, the time
is shorter. The data are forces of a Morse potential on random clusters, for which the answer is
known.

References:
    J. Behler, M. Parrinello, Generalized Neural-Network Representation of High-Dimensional
    Potential-Energy Surfaces, Phys. Rev. Lett. 98, 2007
    S. Chmiela et al., Machine learning of accurate energy-conserving molecular force fields,
    Science Advances 3, 2017, https://arxiv.org/abs/1611.04678

Run `python force_matching.py` (half a minute) or with `--smoke`.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import fastest_ms, flat_table, plot_curves, progress, run_example
from torch import Tensor, nn

import torchopt


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        clusters: Clusters of the training set; the same number is held out.
        atoms: Atoms of a cluster.
        batch: Clusters in a step.
        width: Hidden units, two layers.
        steps: Steps of Adam.
        execute: Argument of `torchopt.second_order.compile`.
        repeats: Repetitions of each timing; the fastest counts.
        seed: Seed of all random numbers.
    """

    clusters: int = 512
    atoms: int = 6
    batch: int = 16
    width: int = 32
    steps: int = 3000
    execute: str = "compile"
    repeats: int = 500
    seed: int = 0


PRESETS = {
    "full": Config(),
    "smoke": Config(clusters=32, width=8, steps=10, execute="trace", repeats=2),
}


def distances(positions: Tensor) -> Tensor:
    """Return the distances of all pairs, `[clusters, pairs]`; positions `[clusters, atoms, 3]`."""
    first, second = torch.triu_indices(positions.shape[1], positions.shape[1], offset=1)
    return (positions[:, first] - positions[:, second]).norm(dim=-1)


def morse(positions: Tensor) -> Tensor:
    """Return the energies of clusters; the equilibrium distance of a pair is 1.5."""
    return ((1 - torch.exp(1.5 - distances(positions))) ** 2).sum(1)


class Potential(nn.Module):
    """The sum over pairs of atoms of a network of their distance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Return the energies, `[clusters]`."""
        energies: Tensor = self.pair(distances(positions).unsqueeze(-1)).sum((1, 2))
        return energies


def forces(potential: Any, positions: Tensor) -> Tensor:
    """Return minus the slope of the energy, `[clusters, atoms, 3]`."""
    with torch.enable_grad():
        at = positions.detach().requires_grad_()
        (slope,) = torch.autograd.grad(potential(at).sum(), at, create_graph=True)
    return -slope


def force_loss(potential: Potential, positions: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean square error of the forces."""
    return ((forces(potential, positions) - wanted) ** 2).mean()


def train(
    loss: Any, potential: Potential, data: tuple[Tensor, Tensor], config: Config, label: str
) -> list[float]:
    """Train the potential in place and return the losses."""
    optimizer = torchopt.Adam(potential.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    with progress(config.steps, label) as bar:
        for _ in range(config.steps):
            rows = torch.randint(config.clusters, (config.batch,), generator=generator)
            value = loss(potential, *(x[rows] for x in data))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            bar.update()
    return losses


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train twice, eagerly and with the compiled gradient, and compare."""
    generator = torch.Generator().manual_seed(config.seed)
    positions = 1.5 * torch.randn(2 * config.clusters, config.atoms, 3, generator=generator)
    wanted = forces(morse, positions).detach()
    data = positions[: config.clusters], wanted[: config.clusters]
    fast = torchopt.second_order.compile(force_loss, execute=config.execute)
    start = Potential(config.width)
    results: dict[str, Any] = {}
    curves, batch = {}, tuple(x[: config.batch] for x in data)
    for name, loss in (("eager", force_loss), ("second_order.compile", fast)):
        potential = copy.deepcopy(start)
        losses = train(loss, potential, data, config, name)
        held_out = forces(potential, positions[config.clusters :]).detach()
        error = (held_out - wanted[config.clusters :]).norm() / wanted[config.clusters :].norm()
        curves[name] = list(enumerate(losses))[:: max(1, config.steps // 100)]
        results[name] = {"losses": [value for _, value in curves[name]], "error": error.item()}

    def step(loss: Any) -> Any:
        return lambda: loss(start, *batch).backward()

    results["ms"] = fastest_ms(
        {"eager": step(force_loss), "second_order.compile": step(fast)}, config.repeats
    )
    labels = {"xlabel": "step", "ylabel": "loss of the forces", "covered": "eager"}
    plot_curves(curves, out / "force_matching.png", yscale="log", **labels)
    return results


def report(results: dict[str, Any]) -> bool:
    """Print errors and times, and return whether training worked, and in less time."""
    rows = [["", "error of held-out forces", "ms a gradient"]]
    for name, ms in results["ms"].items():
        rows.append([name, f"{100 * results[name]['error']:.1f} %", f"{ms:.2f}"])
    print(flat_table(rows))
    slow, quick = results["ms"].values()
    print(f"{slow / quick:.1f} times as fast")
    first, second = (results[name] for name in results["ms"])
    return bool(slow > quick and max(first["error"], second["error"]) < 0.1)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when forces were not learned or no time was saved."""
    return run_example(__doc__, "force_matching", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
