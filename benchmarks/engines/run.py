# SPDX-License-Identifier: Apache-2.0
"""Measure time, memory and error of every engine on one bilevel problem; store them as JSON.

The inner problem is a regression with a proximal term, and the outer variable is its centre:

    x(theta) = argmin_x  |A x - b|^2 / (2 n) + lambda / 2 |x - theta|^2
    L(theta) = |C x(theta) - d|^2 / (2 m)

It is solved by gradient descent from theta. It is quadratic, so with H = A'A / n + lambda I

    dL/dtheta = lambda H^-1 C'(C x - d) / m

exactly; the error of an engine is its distance from this vector, relative to the vector's norm.

Further parts: three levels, the weights of a learned optimizer, linear solvers with preconditioners
and with minibatches, nonlinear least squares; each in its own module, with its exact answer.

    python -m benchmarks.engines.run        # seven minutes; writes benchmarks/results/engines.json
    python tools/bench_report.py            # puts the table into the manual
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import torchopt
from benchmarks.engines import expected, learned, least_squares, levels, solvers
from benchmarks.engines.figures import distance, timed
from benchmarks.harness.program import add_options, finish
from benchmarks.harness.results import new_result
from torchopt.diff import Differences, Engine, Explicit, Implicit, ZeroOrder
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.explicit.run import ROOM
from torchopt.diff.implicit import Adaptation, custom_root
from torchopt.diff.zero_order import Gaussian, Orthogonal, Rademacher, estimators
from torchopt.diff.zero_order.search import PGPE, SNES, GuidedES, SearchDistribution
from torchopt.linear_solve import (
    CG,
    LSMR,
    MINRES,
    Cholesky,
    Neumann,
    Solver,
    StochasticGradient,
    StochasticNeumann,
)

SIZE, ROWS, PENALTY, RATE = 400, 200, 0.3, 0.25
SMALL_RATE = 0.05  # stable for the second moments of products with 20 rows
PARTS = {
    "levels": levels,
    "learned": learned,
    "solvers": solvers,
    "least_squares": least_squares,
}

Loss = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], Tensor]


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

    def start(self) -> Tensor:
        """Return the point at which the gradient is taken, a new leaf."""
        return self.theta.clone().requires_grad_()

    @staticmethod
    def inner(x: Tensor, batch: tuple[Tensor, Tensor], theta: Tensor) -> Tensor:
        """Return the inner objective."""
        a, b = batch
        return ((a @ x - b) ** 2).sum() / (2 * len(b)) + 0.5 * PENALTY * ((x - theta) ** 2).sum()

    def outer(self, x: Tensor) -> Tensor:
        """Return the outer loss."""
        return ((self.c @ x - self.d) ** 2).sum() / (2 * ROWS)

    def solved_by(self, engine: Engine) -> Loss:
        """Return the outer loss of the inner loop, as an engine differentiates it."""
        reversible = isinstance(engine, Explicit) and engine.keep == "reversible"
        momentum = 0.5 if reversible else 0.0
        loop = engine.over(self.inner, torchopt.sgd(RATE, momentum), steps=self.steps)
        return lambda theta: self.outer(loop(theta, (self.a, self.b), theta).params)

    def solved_by_minibatches(self, solve: Solver, rows: int) -> Loss:
        """Return the outer loss whose products with the Hessian use random rows of A.

        The inner problem itself is solved with all rows.
        """
        loop = Explicit(derivative="first_order").over(
            self.inner, torchopt.sgd(RATE), steps=self.steps
        )

        def slope(x: Tensor, theta: Tensor) -> Tensor:
            some = torch.randint(ROWS, (rows,))
            drawn = (self.a.index_select(0, some), self.b.index_select(0, some))
            found: Tensor = torch.func.grad(self.inner)(x, drawn, theta)
            return found

        @custom_root(slope, argnums=1, solve=solve)
        def solved(start: Tensor, theta: Tensor) -> Tensor:
            found: Tensor = loop(start, (self.a, self.b), theta).params
            return found

        return lambda theta: self.outer(solved(theta.detach(), theta))

    def exact(self) -> Tensor:
        """Return the meta-gradient in closed form."""
        hessian = self.a.mT @ self.a / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
        x = torch.linalg.solve(hessian, self.a.mT @ self.b / ROWS + PENALTY * self.theta)
        pulled = self.c.mT @ (self.c @ x - self.d) / ROWS
        return PENALTY * torch.linalg.solve(hessian, pulled)


def sampling(num_samples: int, estimator: Any, directions: Any) -> ZeroOrder:
    """Return a zero-order engine whose directions are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return ZeroOrder(
        directions,
        estimator,
        num_samples=num_samples,
        sigma=0.01,
        generator=generator,
        vectorized=True,
    )


def engines(steps: int) -> dict[str, Engine]:
    """Return the engines by name."""
    part, inexact = steps // 10, {"rtol": 0.0, "on_fail": "ignore"}
    normal, two = Gaussian(), estimators.antithetic
    two_gradients = Differences(gradients=2)

    def neumann(terms: int) -> Implicit:
        return definite(Neumann(terms, alpha=RATE, on_fail="ignore"))

    def definite(solve: Any, **options: Any) -> Implicit:
        return Implicit(solve=solve, positive_definite=True, **options)

    return {
        "explicit: all steps": Explicit(),
        f"explicit: states and the graph of the last {ROOM / 2**20:g} MiB": Explicit(keep="steps"),
        f"explicit: {part} snapshots": Explicit(keep=part),
        "explicit: reversed, with momentum": Explicit(keep="reversible"),
        "explicit: mixed mode": Explicit(derivative="mixed"),
        "explicit: four differences a product": Explicit(derivative="differences"),
        "explicit: two differences a product": Explicit(derivative=two_gradients),
        "explicit: last step, by two differences": Explicit(derivative=two_gradients, window=1),
        f"explicit: last {part} steps": Explicit(window=part),
        "explicit: first order": Explicit(derivative="first_order"),
        "implicit: conjugate gradients": definite(CG(rtol=1e-8)),
        "implicit: 5 steps of conjugate gradients": definite(CG(maxiter=5, **inexact)),
        "implicit: MINRES": Implicit(solve=MINRES(rtol=1e-8)),
        "implicit: LSMR, which needs no symmetry": Implicit(solve=LSMR(rtol=1e-8)),
        "implicit: 5 terms of the Neumann series": neumann(5),
        "implicit: 20 terms of the Neumann series": neumann(20),
        "implicit: conjugate gradients by differences": definite(
            CG(rtol=1e-8), derivative="differences"
        ),
        "implicit: T1-T2": definite(Neumann(0, alpha=RATE, rtol=1.0)),
        "implicit: SAMA, by two differences": Implicit(
            solve=Adaptation(), derivative=two_gradients
        ),
        "implicit: Cholesky": definite(Cholesky()),
        "implicit: with a certificate of its error": definite(CG(rtol=1e-8), certificate=id),
        "zero-order: 200 forward differences": sampling(200, estimators.forward, normal),
        "zero-order: 200, leave one out": sampling(200, estimators.leave_one_out, normal),
        "zero-order: 100 antithetic pairs": sampling(100, two, normal),
        "zero-order: 100 pairs of SPSA": sampling(100, estimators.spsa, Rademacher()),
        "zero-order: 100 orthogonal pairs": sampling(100, two, Orthogonal()),
        "zero-order: 400 orthogonal pairs": sampling(400, two, Orthogonal()),
        "zero-order: 1000 antithetic pairs": sampling(1000, two, normal),
    }


def minibatches(problem: Problem) -> dict[str, Loss]:
    """Return the losses whose adjoint solve sees minibatches, by name."""
    rows = 20
    descent = StochasticGradient(300, SMALL_RATE, average=100, on_fail="ignore")
    series = StochasticNeumann(100, SMALL_RATE, on_fail="ignore")
    return {
        "implicit: 300 minibatch products, mean of 100": problem.solved_by_minibatches(
            descent, rows
        ),
        "implicit: 100 minibatch terms of the Neumann series": problem.solved_by_minibatches(
            series, rows
        ),
    }


def searches(problem: Problem) -> dict[str, tuple[Gradient, Tensor]]:
    """Return the gradients of the mean of a search distribution and what they estimate, by name."""
    sigma, exact = 0.01, problem.exact()
    loss = problem.solved_by(Explicit(derivative="first_order"))
    (guide,) = torch.autograd.grad(loss(start := problem.start()), start)
    guided = GuidedES(100, subspace=guide[:, None])

    def found_by(search: Any, factor: float = 1.0) -> Gradient:
        def gradient(theta: Tensor) -> Tensor:
            around = SearchDistribution(theta.detach(), torch.tensor(sigma).log().to(theta))
            found = search.estimate(loss, around, seed=0, with_error=False)
            mean: Tensor = factor * found.gradient.mean
            return mean

        return gradient

    return {
        "zero-order: PGPE, 100 pairs": (found_by(PGPE(100)), exact),
        "zero-order: SNES, 200 samples": (found_by(SNES(200), sigma**-2), exact),
        "zero-order: guided ES, 100 pairs, by first order": (
            found_by(guided),
            guided.directions.second_moment([exact])[0],
        ),
    }


def kept_bytes(loss: Loss, theta: Tensor, data: tuple[Tensor, ...]) -> int:
    """Return the memory that is kept for the backward pass, other than `data`."""
    with CountBytes(theta, *data) as count:
        value = loss(theta)
        gc.collect()
        kept: int = count.now
    del value
    return kept


# Estimates from random directions: samples, and how many are orthogonal to one another.
SAMPLED = {
    "zero-order: 200 forward differences": (200, 1),
    "zero-order: 200, leave one out": (200, 1),
    "zero-order: 100 antithetic pairs": (100, 1),
    "zero-order: 100 pairs of SPSA": (100, 1),
    "zero-order: 100 orthogonal pairs": (100, 100),
    "zero-order: 400 orthogonal pairs": (400, 256),
    "zero-order: 1000 antithetic pairs": (1000, 1),
    "zero-order: PGPE, 100 pairs": (100, 1),
    "zero-order: SNES, 200 samples": (200, 1),
}


def check(problem: Problem, name: str, gradient: Gradient, found: Tensor, mean: Tensor) -> None:
    """Raise unless an engine returns what it should; see `expected`.

    Exact engines may miss the exact gradient by 1e-4 of its largest entry, because the loop stops
    after 100 steps, and solvers at a residual of 1e-8.
    """
    forms = expected.closed_forms(problem, PENALTY, RATE)
    means = expected.minibatch_means(problem, PENALTY, RATE, SMALL_RATE)
    exact = problem.exact()
    if name in SAMPLED:
        samples, block = SAMPLED[name]
        expected.check_direction(name, found, exact, samples, block, scaled="SNES" not in name)
    elif "guided" in name:
        expected.check_length(name, found, exact, mean, 100)
    elif name in means:
        expected.check_mean(name, lambda: gradient(problem.start()), means[name])
    else:
        wanted, share = forms.get(name, (exact, 1e-4))
        share *= float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=share, msg=lambda m: f"{name}: {m}")


def measure(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each engine: seconds, bytes kept beyond the data, relative error."""
    exact = problem.exact()
    data = (problem.a, problem.b, problem.c, problem.d)
    losses = {name: problem.solved_by(engine) for name, engine in engines(problem.steps).items()}
    losses |= minibatches(problem)

    def slope(loss: Loss) -> tuple[Gradient, Tensor]:
        return lambda theta: torch.autograd.grad(loss(theta), theta)[0], exact

    rows = []
    ways = {name: slope(loss) for name, loss in losses.items()} | searches(problem)
    for name in sorted(ways, key=lambda name: name.partition(":")[0]):
        gradient, mean = ways[name]
        torch.manual_seed(0)
        found, times = timed(lambda: gradient(problem.start()), repeats)  # noqa: B023 - at once
        check(problem, name, gradient, found, mean)
        loss = losses.get(name)  # a search has no backward pass
        kept = 0 if loss is None else kept_bytes(loss, problem.start(), data)
        figures = {**distance(found, mean), "cosine": distance(found, exact)["cosine"]}
        rows.append({"engine": name, **times, "kept_bytes": kept, **figures})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser, "engines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problem = Problem(steps=100)
    rows = measure(problem, 1 if options.quick else 7)
    for r in rows:
        print(
            f"{r['engine']:42} {1e3 * r['seconds']:8.1f} ms  {r['kept_bytes'] / 1024:9.0f} KiB  "
            f"error {r['error']:.1e}  cosine {r['cosine']:.3f}"
        )
    parts = {name: part.measure(1 if options.quick else 7) for name, part in PARTS.items()}
    for name, figures in parts.items():
        print(f"\n{name}")
        for r in figures:
            print("  ", {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()})
    if options.quick:
        return 0
    versions = {"torch": torch.__version__, "torchopt": torchopt.__version__}
    sizes = {"size": SIZE, "rows": ROWS, "penalty": PENALTY, "steps": problem.steps}
    result = new_result("engines", {}, {})
    result |= {"versions": versions, "problem": sizes, "rows": rows, **parts}
    return finish(result, options)


if __name__ == "__main__":
    sys.exit(main())
