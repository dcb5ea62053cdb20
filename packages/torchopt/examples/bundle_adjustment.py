# SPDX-License-Identifier: Apache-2.0
"""Bundle adjustment, differentiable: cameras and points from images, and what depends on them.

Cameras see points of a scene. The positions of the cameras, their rotations (vectors w; a rotation
is the exponential of the cross-product matrix of w) and the positions of the points are the
unknowns of one least-squares problem, over all observations u_ij of point j by camera i,

    min  sum rho(|f project(R(w_i) (p_j - c_i)) - u_ij|^2),   project(x, y, z) = (x, y) / z,

solved by the method of Levenberg and Marquardt. Some observations are outliers; Huber's rho limits
their influence. A few points are known, which fixes the position of the scene.

The solution is differentiable. The focal length f that the solver gets is 3 % wrong at first. It is
learned by gradient descent on the error of eight more points, which are known but not used in the
adjustment, with the implicit derivative of the whole adjustment.

References:
    B. Triggs, P. McLauchlan, R. Hartley, A. Fitzgibbon, Bundle Adjustment - A Modern Synthesis,
    2000, section 4
    S. Agarwal, N. Snavely, S. Seitz, R. Szeliski, Bundle Adjustment in the Large, ECCV 2010

Deviations: a generated scene of some forty points, and a dense factorisation.

Run `python bundle_adjustment.py` (about half a minute) or with `--smoke`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_tools import flat_table, plot_curves, progress, run_example
from torch import Tensor

import torchopt
from torchopt.linear_solve import LU
from torchopt.solvers import LevenbergMarquardt, SolveStatus

Tree = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """The settings of a run.

    Attributes:
        cameras: Number of cameras.
        points: Number of unknown points.
        control: Number of known points.
        check: Number of unknown points, the first ones, whose positions the outer loss knows.
        noise: Standard deviation of an observation, in pixels.
        outliers: Fraction of the observations that are outliers.
        focal: True focal length, in pixels.
        steps: Gradient steps on the focal length.
        lr: Size of these steps, relative to the focal length.
        seed: Seed of all random numbers.
    """

    cameras: int = 5
    points: int = 40
    control: int = 4
    check: int = 8
    noise: float = 0.2
    outliers: float = 0.05
    focal: float = 800.0
    steps: int = 15
    lr: float = 5e-3
    seed: int = 0


PRESETS = {"full": Config(), "smoke": Config(cameras=3, points=10, steps=2)}


def rotate(w: Tensor, x: Tensor) -> Tensor:
    """Return x turned by the rotation vectors w, by Rodrigues' formula.

    Args:
        w: `[cameras, 3]`.
        x: `[cameras, points, 3]`.
    """
    square = (w * w).sum(-1)[:, None, None] + 1e-24
    angle = square.sqrt()
    axis = w[:, None, :].expand_as(x)
    once = torch.linalg.cross(axis, x)
    twice = torch.linalg.cross(axis, once)
    return x + torch.sin(angle) / angle * once + (1 - torch.cos(angle)) / square * twice


def images(unknown: Tree, control: Tensor, focal: Tensor) -> Tensor:
    """Return the images of the points, `[cameras, points, 2]`, the known points first."""
    points = torch.cat([control, unknown["points"]])
    seen = rotate(unknown["turn"], points[None] - unknown["place"][:, None])
    return focal * seen[..., :2] / seen[..., 2:]


def misfit(unknown: Tree, focal: Tensor, control: Tensor, observed: Tensor) -> Tensor:
    """Return the residuals, in pixels."""
    return images(unknown, control, focal) - observed


def scene(config: Config) -> tuple[Tree, Tensor, Tensor, Tensor]:
    """Return the truth, the known points, the observations, and which of them are outliers."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    span = torch.linspace(-2, 2, config.cameras, dtype=torch.float64)
    place = torch.stack([span, 0.3 * normal(config.cameras), 0.3 * normal(config.cameras)], -1)
    turn = torch.stack([0 * span, torch.atan(span / 8), 0 * span], -1) * -1
    truth = {
        "place": place,
        "turn": turn + 0.02 * normal(config.cameras, 3),
        "points": normal(config.points, 3) + torch.tensor([0.0, 0.0, 8.0]).double(),
    }
    control = normal(config.control, 3) + torch.tensor([0.0, 0.0, 8.0]).double()
    focal = torch.tensor(config.focal, dtype=torch.float64)
    seen = images(truth, control, focal)
    wrong = torch.rand(seen.shape[:2], generator=generator) < config.outliers
    observed = seen + config.noise * normal(*seen.shape)
    observed = observed + wrong[..., None] * 60 * normal(*seen.shape)
    return truth, control, observed, wrong


def disturbed(truth: Tree, seed: int) -> Tree:
    """Return a starting point that is off by a few per cent."""
    generator = torch.Generator().manual_seed(seed + 1)
    sizes = {"place": 0.2, "turn": 0.03, "points": 0.3}
    return {
        name: x + sizes[name] * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for name, x in truth.items()
    }


def rms(x: Tensor) -> float:
    """Return the root mean square of the lengths of vectors."""
    return (x**2).sum(-1).mean().sqrt().item()


def adjust(config: Config) -> dict[str, Any]:
    """Return what plain and robust adjustments find with the right focal length."""
    truth, control, observed, wrong = scene(config)
    focal = torch.tensor(config.focal, dtype=torch.float64)
    rows = {}
    for loss in ("linear", "huber"):
        solver = LevenbergMarquardt(loss=loss, scale=2 * config.noise, tol=1e-6, on_fail="ignore")
        found = solver.run(misfit, disturbed(truth, config.seed), focal, control, observed)
        residuals = misfit(found.value, focal, control, observed)
        rows[loss] = {
            "status": SolveStatus(int(found.status)).name,
            "iterations": int(found.iterations),
            "pixels": rms(residuals[~wrong]),
            "points": rms(found.value["points"] - truth["points"]),
        }
    return rows


def calibrate(config: Config) -> dict[str, Any]:
    """Learn the focal length from points that are known but not used."""
    truth, control, observed, _ = scene(config)
    known = truth["points"][: config.check]
    solver = LevenbergMarquardt(
        loss="huber", scale=2 * config.noise, tol=1e-6, on_fail="raise", linear_solve=LU()
    )

    def error(log_focal: Tensor, start: Tree) -> tuple[Tensor, Tree]:
        found = solver(misfit, start, log_focal.exp(), control, observed)
        return ((found["points"][: config.check] - known) ** 2).sum(-1).mean(), found

    start = disturbed(truth, config.seed)
    log_focal = torch.tensor(1.03 * config.focal, dtype=torch.float64).log().requires_grad_()
    optimizer = torchopt.Adam([log_focal], lr=config.lr)
    curve, slopes = [], []
    with progress(config.steps, "focal length") as bar:
        for step in range(config.steps):
            loss, found = error(log_focal, start)
            optimizer.zero_grad()
            loss.backward()
            assert log_focal.grad is not None
            if step == 0:
                h = 1e-4
                ends = [error(log_focal.detach() + s * h, found)[0].item() for s in (1, -1)]
                slopes = [log_focal.grad.item(), (ends[0] - ends[1]) / (2 * h)]
            start = {name: x.detach() for name, x in found.items()}
            curve.append((log_focal.exp().item(), loss.sqrt().item()))
            optimizer.step()
            bar.update()
    curve.append((log_focal.exp().item(), error(log_focal.detach(), start)[0].sqrt().item()))
    return {"curve": curve, "slope": slopes[0], "difference": slopes[1]}


def run(config: Config, out: Path) -> dict[str, Any]:
    """Adjust, then calibrate."""
    results = {"adjusted": adjust(config), "calibrated": calibrate(config)}
    focal = [(step, f) for step, (f, _) in enumerate(results["calibrated"]["curve"])]
    plot_curves(
        {"learned": focal, "true": [(0, config.focal), (config.steps, config.focal)]},
        out / "bundle_adjustment.png",
        xlabel="step",
        ylabel="focal length, pixels",
        title="Calibration through bundle adjustment",
    )
    return results


def report(results: dict[str, Any]) -> bool:
    """Print the table and return whether the robust fit and the calibration worked."""
    rows = [["", "steps", "error in the images, px", "error of the points"]]
    for loss, row in results["adjusted"].items():
        rows.append([loss, str(row["iterations"]), f"{row['pixels']:.2f}", f"{row['points']:.4f}"])
    print(flat_table(rows))
    found = results["calibrated"]
    (before, error_before), (after, error_after) = found["curve"][0], found["curve"][-1]
    gap = abs(found["slope"] / found["difference"] - 1)
    print(
        f"focal length {before:.1f} -> {after:.1f} (true {results['config']['focal']:.1f}); error "
        f"of the check points {error_before:.4f} -> {error_after:.4f}"
    )
    print(f"implicit derivative against differences: relative gap {gap:.1e}")
    plain, robust = results["adjusted"].values()
    true = results["config"]["focal"]
    return bool(
        robust["status"] == "CONVERGED"
        and robust["points"] < 0.5 * plain["points"]
        and abs(after - true) < 0.3 * abs(before - true)
        and gap < 1e-3
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the example; return 1 when it did not work."""
    return run_example(__doc__, "bundle_adjustment", PRESETS, run, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
