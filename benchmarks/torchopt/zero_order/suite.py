# SPDX-License-Identifier: Apache-2.0
"""The part of the zero-order benchmark that runs in a rival's process.

A rival's estimate is compared with the exact gradient before it is timed: a wrong factor or a
missing baseline is an error, not a figure.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Prepared, UnsupportedError, describe, function_of

__all__ = ["describe", "error", "peak", "prepare"]


@dataclass(frozen=True)
class Case:
    """A network and how often it is evaluated.

    Attributes:
        sizes: Units of the layers.
        batch: Rows of the input.
        samples: Antithetic pairs.
        sigma: Size of the perturbation.
    """

    sizes: tuple[int, ...]
    batch: int
    samples: int = 1000
    sigma: float = 0.02


CASES = {
    "policy 4-32-32-2, batch 32": Case((4, 32, 32, 2), 32),
    "digits 64-32-10, batch 32": Case((64, 32, 10), 32),
    "digits 64-64-10, batch 64": Case((64, 64, 10), 64),
    "64-256-256-10, batch 64": Case((64, 256, 256, 10), 64),
}
MEMORY = Case((64, 128, 128, 10), 16)
MEMORY_SAMPLES = (50, 500, 5000)

METHODS = (
    *("naive", "forward", "antithetic", "leave_one_out", "orthogonal antithetic"),
    *("Sobol antithetic", "signs antithetic", "four points"),
)
SAMPLES = (16, 64, 256, 1024)
REPETITIONS = 20


def arrays(case: Case) -> tuple[list[Any], Any, Any]:
    """Return weights, inputs and targets as float32 NumPy arrays, the same in every process."""
    import numpy

    draw = numpy.random.default_rng(0)
    weights: list[Any] = []
    for m, n in zip(case.sizes, case.sizes[1:]):
        weights += [draw.standard_normal((n, m)) / m**0.5, 0.1 * draw.standard_normal(n)]
    x = draw.standard_normal((case.batch, case.sizes[0]))
    y = draw.standard_normal((case.batch, case.sizes[-1]))
    return [w.astype("float32") for w in weights], x.astype("float32"), y.astype("float32")


def exact_gradient(weights: list[Any], x: Any, y: Any) -> Any:
    """Return the gradient of the mean squared error, by hand in float64."""
    import numpy

    weights = [w.astype("float64") for w in weights]
    inputs, layers = [x.astype("float64")], len(weights) // 2
    for k in range(layers):
        z = inputs[-1] @ weights[2 * k].T + weights[2 * k + 1]
        inputs.append(numpy.tanh(z) if k + 1 < layers else z)
    delta = 2 * (inputs[-1] - y) / y.size
    parts: list[Any] = []
    for k in reversed(range(layers)):
        parts = [(delta.T @ inputs[k]).ravel(), delta.sum(0), *parts]
        if k:
            delta = (delta @ weights[2 * k]) * (1 - inputs[k] ** 2)
    return numpy.concatenate(parts)


def check(run: Any, case: Case, exact: Any) -> None:
    """Compare an estimate with the gradient: <estimate, g> / <g, g> is 1 up to its error.

    For a linear loss the variance of that ratio is 2 / N (dense Gaussian directions) or up to four
    times as much (rank 1); smoothing changes it by O(sigma^2).
    """
    ratio = statistics.fmean(float(run() @ exact) / float(exact @ exact) for _ in range(4))
    if abs(ratio - 1) > 4 * (8 / (4 * case.samples)) ** 0.5 + 0.05:
        raise ArithmeticError(f"the estimate along the gradient is {ratio:.3f} of it")


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return the statement of a case, after its answer has been checked."""
    chosen = Case(**case["case"])
    weights, x, y = arrays(chosen)
    run = function_of(rival, "estimator")(chosen, weights, x, y)
    check(run, chosen, exact_gradient(weights, x, y))
    return Prepared("run()", {"run": run}, clock=time.process_time)


def toys() -> dict[str, Any]:
    """Return functions of a vector of 24 numbers, and points, by name."""
    import torch

    draw = torch.Generator().manual_seed(0)
    a = torch.randn(24, generator=draw, dtype=torch.float64)
    start = torch.randn(24, generator=draw, dtype=torch.float64)
    scales = torch.logspace(0, 2, 24, dtype=torch.float64)

    def rosenbrock(x: Any) -> Any:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return {
        "linear, offset 10": (lambda x: a @ x + 10.0, start),
        "ellipsoid": (lambda x: 0.5 * (scales * x * x).sum(), start),
        "Rosenbrock": (rosenbrock, 0.3 * start),
    }


def error(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the relative error of estimates, root mean square over repetitions."""
    toy = function_of(rival, "toy")
    import torch

    fn, point = toys()[case["tree"]]
    x = point.clone().requires_grad_()
    (exact,) = torch.autograd.grad(fn(x), x)
    squares, evaluations = [], 0
    for seed in range(case["repetitions"]):
        arguments = (case["operation"], case["samples"], case["sigma"], seed)
        got, evaluations = toy(fn, point, *arguments)
        squares.append(float((got - exact).square().sum() / exact.square().sum()))
    return {"error": statistics.fmean(squares) ** 0.5, "evaluations": evaluations}


def peak(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the increase of the process's resident memory during one estimate."""
    from benchmarks.optree.suite import _status_bytes

    chosen = Case(**case["case"])
    small = Case(chosen.sizes, chosen.batch, 2, chosen.sigma)
    arguments = arrays(chosen)
    rival.estimator(small, *arguments)()  # imports and compiles what is not counted
    run = rival.estimator(chosen, *arguments)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
        before = _status_bytes("VmRSS")
        run()
        return {"peak_bytes": _status_bytes("VmHWM") - before}
    except OSError as problem:
        raise UnsupportedError("the peak is read from /proc, which is Linux's") from problem
