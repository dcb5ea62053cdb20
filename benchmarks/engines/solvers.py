# SPDX-License-Identifier: Apache-2.0
"""Linear solvers on the Hessian of a network, at equal accuracy.

A network for the digits is trained to the minimum of its mean loss plus RIDGE / 2 |w|^2. The
system is that of the implicit derivatives at this minimum: the matrix is the Hessian of both terms,
the right-hand side is the gradient on other samples. Reported is the smallest number of iterations
after which the relative error is at most `ACCURACY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engines.figures import timed
from torchopt.linear_solve import (
    CG,
    MINRES,
    LinearOperator,
    Neumann,
    Nystrom,
    Solver,
    kronecker,
    linear_solve,
)

SAMPLES, HIDDEN, RIDGE, ACCURACY, TERMS = 600, 12, 1e-3, 1e-3, 200
Tree = dict[str, Tensor]


@dataclass(frozen=True)
class System:
    """A trained network, its samples, and a right-hand side."""

    net: nn.Module
    x: Tensor
    y: Tensor
    b: Tree

    @staticmethod
    def trained() -> System:
        """Return a system at the minimum."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = (torch.tensor(data.data) / 16 - 0.305) / 0.376
        labels = torch.tensor(data.target)
        x, y = images[:SAMPLES], labels[:SAMPLES]
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).double()
        weights = list(net.parameters())
        optimizer = torch.optim.LBFGS(
            weights, max_iter=400, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            penalty = sum((w**2).sum() for w in weights)
            value: Tensor = nn.functional.cross_entropy(net(x), y) + RIDGE / 2 * penalty
            value.backward()
            return value

        optimizer.step(objective)  # type: ignore[arg-type]  # its stub wants a float
        held_out = nn.functional.cross_entropy(net(images[-SAMPLES:]), labels[-SAMPLES:])
        names = [name for name, _ in net.named_parameters()]
        return System(net, x, y, dict(zip(names, torch.autograd.grad(held_out, weights))))

    def hessian_product(self, weights: Tree, v: Tree) -> Tree:
        """Return the product with the Hessian of the mean loss, without the ridge."""

        def loss(w: Tree) -> Tensor:
            outputs = torch.func.functional_call(self.net, w, (self.x,))
            return nn.functional.cross_entropy(outputs, self.y)

        found: Tree = torch.func.jvp(torch.func.grad(loss), (weights,), (v,))[1]
        return found

    def weights(self) -> Tree:
        """Return the trained weights."""
        return {name: w.detach() for name, w in self.net.named_parameters()}

    def flat(self, tree: Tree) -> Tensor:
        """Return a tree as one vector."""
        return torch.cat([x.flatten() for x in tree.values()])

    def tree(self, vector: Tensor) -> Tree:
        """Return a vector as a tree."""
        parts = vector.split([x.numel() for x in self.b.values()])
        return {k: part.reshape(x.shape) for (k, x), part in zip(self.b.items(), parts)}

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return the matrix, with the ridge, and the right-hand side."""
        weights, vector = self.weights(), self.flat(self.b)

        def loss(w: Tensor) -> Tensor:
            outputs = torch.func.functional_call(self.net, self.tree(w), (self.x,))
            return nn.functional.cross_entropy(outputs, self.y)

        matrix = torch.func.hessian(loss)(self.flat(weights))
        return matrix + RIDGE * torch.eye(len(vector), dtype=vector.dtype), vector

    def iterated(self, matrix: Tensor, vector: Tensor, alpha: float, M: Any) -> Tensor:
        """Return TERMS + 1 terms of the Neumann series, sum_j alpha (I - alpha M A)^j M b."""

        def scaled(x: Tensor) -> Tensor:
            return alpha * (x if M is None else self.flat(M(self.tree(x))))

        term = total = scaled(vector)
        for _ in range(TERMS):
            term = term - scaled(matrix @ term)
            total = total + term
        return total

    def solve(self, solver: Solver) -> Tensor:
        """Return the solution, flat."""
        operator = LinearOperator.from_function(
            self.hessian_product, self.weights(), self.b, ["positive_definite"]
        )
        return self.flat(linear_solve(operator, self.b, solver, on_fail="ignore").value)


def fewest(error_after: Callable[[int], float], most: int = 2048) -> int:
    """Return the least count after which the error is small enough, by bisection."""
    low, high = 0, 1
    while high < most and error_after(high) > ACCURACY:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error_after(middle) > ACCURACY else (low, middle)
    return high


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each solver and preconditioner."""
    system = System.trained()
    loss = nn.functional.cross_entropy
    factored = partial(kronecker, system.net, loss, system.x, system.y, ridge=RIDGE)
    matrix, vector = system.dense()
    exact = torch.linalg.solve(matrix, vector)
    made: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "K-FAC": lambda: factored(corrected=False),
        "EK-FAC": factored,
        "Nystrom, rank 50": lambda: Nystrom(50, ridge=RIDGE),
    }

    def error_of(solver: Solver) -> float:
        return float((system.solve(solver) - exact).norm() / exact.norm())

    rows = []
    for label, make in made.items():
        M, setup = timed(make, repeats)
        ways: list[Any] = [CG(rtol=0.0, ridge=RIDGE, M=M), MINRES(rtol=0.0, ridge=RIDGE, M=M)]
        for solver in ways:
            count = fewest(lambda k: error_of(replace(solver, maxiter=k)))  # noqa: B023 - at once
            solver = replace(solver, maxiter=count)
            error = error_of(solver)
            if error > ACCURACY:
                raise AssertionError(f"{solver}: expected an error of {ACCURACY}, got {error:.2e}")
            rows.append(row(system, solver, label, count, setup, error, repeats))
    for label in ("none", "EK-FAC"):
        M, setup = timed(made[label], repeats)
        alpha = 1 / (1.05 * largest(system, M))
        series = Neumann(TERMS, alpha, ridge=RIDGE, M=M)
        # The terms one after the other, with the matrix itself: the same numbers up to rounding.
        found, wanted = system.solve(series), system.iterated(matrix, vector, alpha, M)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
        rows.append(row(system, series, label, TERMS, setup, error_of(series), repeats))
    return rows


def row(
    system: System,
    solver: Solver,
    label: str,
    count: int,
    setup: dict[str, float],
    error: float,
    repeats: int,
) -> dict[str, Any]:
    """Return the figures of a solver."""
    _, times = timed(lambda: system.solve(solver), repeats)
    found = {"solver": type(solver).__name__, "preconditioner": label, "iterations": count}
    return {**found, "setup": setup["median"], "error": error, **times}


def largest(system: System, M: Any) -> float:
    """Return the largest eigenvalue of the system with a preconditioner, by power iteration."""
    weights = system.weights()
    v, size = system.b, torch.ones(())
    for _ in range(100):
        v = {name: x / size for name, x in v.items()}
        product = system.hessian_product(weights, v)
        v = {name: x + RIDGE * v[name] for name, x in product.items()}
        v = v if M is None else M(v)
        size = system.flat(v).norm()
    return float(size)
