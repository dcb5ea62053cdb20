# SPDX-License-Identifier: Apache-2.0
"""Measure time, memory and error of every engine on one bilevel problem; store them as JSON.

The inner problem is a regression with a proximal term, and the outer variable is its centre:

    x(theta) = argmin_x  |A x - b|^2 / (2 n) + lambda / 2 |x - theta|^2
    L(theta) = |C x(theta) - d|^2 / (2 m)

It is solved by gradient descent from theta. It is quadratic, so with H = A'A / n + lambda I

    dL/dtheta = lambda H^-1 C'(C x - d) / m

exactly; the error of an engine is its distance from that, relative to its norm.

    python benchmarks/engines/run.py        # two minutes; writes benchmarks/results/engines.json
    python tools/bench_report.py            # puts the table into the manual
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff.implicit import certified_grad, custom_root
from torchopt.diff.zero_order import Gaussian, Orthogonal, Rademacher, ZeroOrder, estimators
from torchopt.linear_solve import CG, LSMR, MINRES, Cholesky, Neumann

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.harness.machine import describe_machine  # noqa: E402

SIZE, ROWS, PENALTY, RATE = 400, 200, 0.3, 0.25


class Problem:
    """The data, the inner and the outer loss, and the exact meta-gradient."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.steps = steps
        self.a, self.b = draw(ROWS, SIZE), draw(ROWS)
        self.c, self.d = draw(ROWS, SIZE), draw(ROWS)
        self.theta = draw(SIZE)

    def inner(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return the inner objective."""
        fit = ((self.a @ x - self.b) ** 2).sum() / (2 * ROWS)
        return fit + 0.5 * PENALTY * ((x - theta) ** 2).sum()

    def outer(self, x: Tensor) -> Tensor:
        """Return the outer loss."""
        return ((self.c @ x - self.d) ** 2).sum() / (2 * ROWS)

    def descend(
        self,
        x: Tensor,
        theta: Tensor,
        *,
        create_graph: bool,
        window: int | None = None,
    ) -> Tensor:
        """Return x after all steps; with a window, gradients see only the last so many."""
        optimizer = torchopt.sgd(RATE)
        state = optimizer.init(x)
        for step in range(self.steps):
            if not create_graph or (window is not None and step == self.steps - window):
                x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.inner(x, theta), x, create_graph=create_graph)
            updates, state = optimizer.update(g, state, params=x, inplace=False)
            x = torchopt.apply_updates(x, updates, inplace=False)
        return x

    def exact(self) -> Tensor:
        """Return the meta-gradient in closed form."""
        hessian = self.a.mT @ self.a / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
        x = torch.linalg.solve(hessian, self.a.mT @ self.b / ROWS + PENALTY * self.theta)
        pulled = self.c.mT @ (self.c @ x - self.d) / ROWS
        return PENALTY * torch.linalg.solve(hessian, pulled)


def explicit(problem: Problem, window: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return the loss through the steps, or the last `window` of them."""
    return lambda theta: problem.outer(
        problem.descend(theta + 0, theta, create_graph=True, window=window)
    )


def recomputed(problem: Problem, segment: int) -> Callable[[Tensor], Tensor]:
    """Return the loss through all steps, each `segment` of them computed again going backward."""
    part = copy.copy(problem)
    part.steps = segment

    def steps(x: Tensor, theta: Tensor) -> Tensor:
        return part.descend(x, theta, create_graph=True)

    def loss(theta: Tensor) -> Tensor:
        x = theta + 0
        for _ in range(problem.steps // segment):
            x = checkpoint(steps, x, theta, use_reentrant=False)
        return problem.outer(x)

    return loss


def first_order(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the loss whose inner gradients are constants: x = theta - sum of them."""

    def loss(theta: Tensor) -> Tensor:
        x = problem.descend(theta.detach(), theta.detach(), create_graph=False)
        return problem.outer(theta + (x - theta).detach())

    return loss


def solver_of(problem: Problem, linear: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the inner loop as a root of the inner gradient, in terms of (start, theta)."""

    @custom_root(
        torch.func.grad(problem.inner),
        argnums=1,
        solve=linear,
        symmetric=True,
        positive_definite=True,
    )
    def solve(start: Tensor, theta: Tensor) -> Tensor:
        with torch.enable_grad():
            return problem.descend(start, theta.detach(), create_graph=False).detach()

    return solve


def implicit(problem: Problem, linear: Any) -> Callable[[Tensor], Tensor]:
    """Return the loss of the solution, whose derivative is that of the root."""
    solve = solver_of(problem, linear)
    return lambda theta: problem.outer(solve(theta.detach(), theta))


def certified(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the implicit meta-gradient, which comes with an estimate of its own error."""
    solve = solver_of(problem, CG(rtol=1e-8))
    both = certified_grad(lambda x, theta: problem.outer(x), solve)

    def gradient(theta: Tensor) -> Tensor:
        _, (found,), _ = both(theta.detach(), theta.detach())
        return found

    return gradient


def zero_order(
    problem: Problem, num_samples: int, estimator: Any, directions: Any
) -> Callable[[Tensor], Tensor]:
    """Return the meta-gradient from values of the whole inner loop at random points."""
    hessian = problem.a.mT @ problem.a / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
    constant = problem.a.mT @ problem.b / ROWS

    def value(theta: Tensor) -> Tensor:
        x = theta
        for _ in range(problem.steps):
            x = x - RATE * (hessian @ x - constant - PENALTY * theta)
        return problem.outer(x)

    engine = ZeroOrder(
        directions,
        estimator,
        num_samples=num_samples,
        sigma=0.01,
        generator=torch.Generator().manual_seed(0),
        vectorized=True,
    )

    def gradient(theta: Tensor) -> Tensor:
        found: Tensor = engine.estimate(value, theta).gradient
        return found

    return gradient


class Saved:
    """A tensor that was saved for the backward pass, as long as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(loss: Callable[[Tensor], Tensor], theta: Tensor, data: tuple[Tensor, ...]) -> int:
    """Return the memory of the distinct tensors kept for the backward pass, other than `data`."""
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(x: Tensor) -> Saved:
        held = Saved(x)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        value = loss(theta)
    storages = {
        held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes()
        for held in saved
    }
    del value
    for x in data:
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


Engine = Callable[[Tensor], Tensor]


def differentiated(problem: Problem) -> dict[str, Engine]:
    """Return the outer losses whose derivative autograd takes."""
    segment = problem.steps // 10
    inexact = {"rtol": 0.0, "on_fail": "ignore"}
    return {
        "explicit: all steps": explicit(problem),
        f"explicit: all steps, {segment} at a time recomputed": recomputed(problem, segment),
        f"explicit: last {segment} steps": explicit(problem, segment),
        "explicit: first order": first_order(problem),
        "implicit: conjugate gradients": implicit(problem, CG(rtol=1e-8)),
        "implicit: 5 steps of conjugate gradients": implicit(problem, CG(maxiter=5, **inexact)),
        "implicit: MINRES": implicit(problem, MINRES(rtol=1e-8)),
        "implicit: LSMR, which needs no symmetry": implicit(problem, LSMR(rtol=1e-8)),
        "implicit: 5 terms of the Neumann series": implicit(problem, Neumann(5, alpha=RATE)),
        "implicit: 20 terms of the Neumann series": implicit(problem, Neumann(20, alpha=RATE)),
        "implicit: Cholesky": implicit(problem, Cholesky()),
    }


def estimated(problem: Problem) -> dict[str, Engine]:
    """Return the engines that give the gradient themselves; nothing is kept for them."""
    normal, two = Gaussian(), estimators.antithetic
    return {
        "implicit: with a certificate of its error": certified(problem),
        "zero-order: 200 forward differences": zero_order(problem, 200, estimators.forward, normal),
        "zero-order: 200, leave one out": zero_order(
            problem, 200, estimators.leave_one_out, normal
        ),
        "zero-order: 100 antithetic pairs": zero_order(problem, 100, two, normal),
        "zero-order: 100 pairs of SPSA": zero_order(problem, 100, estimators.spsa, Rademacher()),
        "zero-order: 100 orthogonal pairs": zero_order(problem, 100, two, Orthogonal()),
        "zero-order: 400 orthogonal pairs": zero_order(problem, 400, two, Orthogonal()),
        "zero-order: 1000 antithetic pairs": zero_order(problem, 1000, two, normal),
    }


def measure(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each engine: seconds, bytes kept beyond the data, relative error."""
    exact = problem.exact()
    data = (problem.a, problem.b, problem.c, problem.d)
    rows = []
    for name, loss in differentiated(problem).items():
        times = []
        for _ in range(repeats):
            theta = problem.theta.clone().requires_grad_()
            started = time.process_time()
            (found,) = torch.autograd.grad(loss(theta), theta)
            times.append(time.process_time() - started)
        theta = problem.theta.clone().requires_grad_()
        rows.append(row(name, min(times), kept_bytes(loss, theta, data), found, exact))
    for name, gradient in estimated(problem).items():
        times = []
        for _ in range(repeats):
            started = time.process_time()
            found = gradient(problem.theta)
            times.append(time.process_time() - started)
        rows.append(row(name, min(times), 0, found, exact))  # nothing is differentiated
    return rows


def row(name: str, seconds: float, kept: int, found: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return the figures of one engine."""
    error = ((found - exact).norm() / exact.norm()).item()
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0).item()
    return {
        "engine": name,
        "seconds": seconds,
        "kept_bytes": kept,
        "error": error,
        "cosine": cosine,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, nothing is stored")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problem = Problem(steps=100)
    rows = measure(problem, 1 if options.quick else 7)
    for r in rows:
        print(
            f"{r['engine']:42} {1e3 * r['seconds']:8.1f} ms  {r['kept_bytes'] / 1024:9.0f} KiB  "
            f"error {r['error']:.1e}  cosine {r['cosine']:.3f}"
        )
    if not options.quick:
        result = {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "versions": {"torch": torch.__version__, "torchopt": torchopt.__version__},
            "problem": {"size": SIZE, "rows": ROWS, "penalty": PENALTY, "steps": problem.steps},
            "rows": rows,
        }
        path = ROOT / "benchmarks" / "results" / "engines.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
