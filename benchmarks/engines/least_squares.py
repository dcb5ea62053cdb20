# SPDX-License-Identifier: Apache-2.0
"""Nonlinear least squares: the minimum compared with scipy's, and its implicit derivative.

The residuals are shifted by t d, d random: the derivative of the solution in t at 0 is compared
with central differences of solutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.engines.figures import timed
from torchopt.solvers import Dogleg, GaussNewton, LevenbergMarquardt

METHODS = {
    "LevenbergMarquardt": LevenbergMarquardt,
    "Dogleg": Dogleg,
    "GaussNewton": GaussNewton,
}


class Problem(NamedTuple):
    """Residuals, a start, and the options of the solver."""

    residuals: Callable[[Tensor], Tensor]
    start: Tensor
    options: Mapping[str, Any] = MappingProxyType({})


def f64(*values: float) -> Tensor:
    """Return a vector."""
    return torch.tensor(values, dtype=torch.float64)


def problems() -> dict[str, Problem]:
    """Return the problems by name."""
    draw = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 4, 200, dtype=torch.float64)
    noise = torch.randn(200, dtype=torch.float64, generator=draw)
    decay = 3 * torch.exp(-0.5 * t) + torch.exp(-3 * t) + 0.01 * noise
    outliers = decay + 5 * (torch.arange(200) % 20 == 7)
    a = torch.randn(400, 60, dtype=torch.float64, generator=draw)
    y = torch.exp(0.1 * a @ torch.randn(60, dtype=torch.float64, generator=draw))

    def fit(data: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x[0] * torch.exp(-x[1] * t) + x[2] * torch.exp(-x[3] * t) - data

    start = f64(1, 0.1, 1, 1)
    return {
        "Rosenbrock": Problem(
            lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), f64(-1.2, 1)
        ),
        "two decays, 200 points": Problem(fit(decay), start),
        "the same with outliers, Cauchy": Problem(
            fit(outliers), start, {"loss": "cauchy", "scale": 0.05}
        ),
        "60 unknowns, 400 points": Problem(
            lambda x: torch.exp(0.1 * a @ x) - y, torch.zeros(60, dtype=torch.float64)
        ),
        "the same within [-0.5, 0.5]": Problem(
            lambda x: torch.exp(0.1 * a @ x) - y,
            torch.zeros(60, dtype=torch.float64),
            {"lower": -0.5, "upper": 0.5},
        ),
    }


def by_scipy(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return scipy's answers, with the tolerance at rounding level and at its default."""
    from scipy.optimize import least_squares

    def residuals(x: Any) -> Any:
        return problem.residuals(torch.from_numpy(x)).numpy()

    def jacobian(x: Any) -> Any:
        found: Any = torch.func.jacfwd(problem.residuals)(torch.from_numpy(x))
        return found.numpy()

    options = {
        "loss": problem.options.get("loss", "linear"),
        "f_scale": problem.options.get("scale", 1.0),
        "bounds": (
            problem.options.get("lower", -float("inf")),
            problem.options.get("upper", float("inf")),
        ),
    }
    tight = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    x = problem.start.numpy()
    return (
        lambda: least_squares(residuals, x, jacobian, **options, **tight, max_nfev=10_000),
        lambda: least_squares(residuals, x, jacobian, **options),
    )


def derivative_error(solver: Any, problem: Problem) -> float:
    """Return the error of an implicit derivative, relative to central differences."""
    m = len(problem.residuals(problem.start))
    d = torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def solution(t: Tensor) -> Tensor:
        found: Tensor = solver(lambda x, t: problem.residuals(x) - t * d, problem.start, t)
        return found

    zero, h = torch.zeros((), dtype=torch.float64), 1e-5
    slope = (solution(zero + h) - solution(zero - h)) / (2 * h)
    found = torch.func.jacfwd(solution)(zero)
    return float((found - slope).norm() / slope.norm())


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each problem and method."""
    rows = []
    for name, problem in problems().items():
        best, default = by_scipy(problem)
        reference = torch.from_numpy(best().x)
        found, times = timed(default, repeats)
        error = float((torch.from_numpy(found.x) - reference).norm() / reference.norm())
        scipy = {"method": "scipy, trf", "steps": found.nfev, "error": error}
        rows.append({"problem": name, **scipy, **times})
        for method, make in METHODS.items():
            solver = make(**problem.options, on_fail="ignore")
            result, times = timed(lambda: solver.run(problem.residuals, problem.start), repeats)  # noqa: B023
            close = (result.value - reference).norm() / reference.norm()
            tight = make(**problem.options, tol=1e-11, on_fail="ignore")
            rows.append(
                {
                    "problem": name,
                    "method": method,
                    "steps": int(result.iterations),
                    "status": int(result.status),
                    "error": float(close),
                    "derivative_error": derivative_error(tight, problem),
                    **times,
                }
            )
            check(rows[-1])
    return rows


def check(row: dict[str, Any]) -> None:
    """Raise unless a solver has found the minimum, and its derivative.

    Solvers stop when the gradient is below the root of the rounding error, 1.5e-8, so a minimum
    with a curvature of order one is found to 1e-7. Differences of solutions that are accurate to
    1e-11, with a step of 1e-5, have an error of 1e-6, and a few times that where the curvature is
    smaller.
    """
    for figure, most in (("error", 1e-6), ("derivative_error", 1e-5)):
        if not row[figure] <= most:
            what = f"{row['problem']}, {row['method']}: {figure}"
            raise AssertionError(f"{what}: expected at most {most}, got {row[figure]:.2e}")
