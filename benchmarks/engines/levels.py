# SPDX-License-Identifier: Apache-2.0
"""Three levels, all quadratic, whose derivative has a closed form.

    x(y, z) = argmin x'Ax/2 - x'(By + Cz)
    y(z)    = argmin y'Dy/2 - y'Ez + |F x(y, z) - d|^2 / 2
    L(z)    = |y(z) - c|^2 / 2

With S = F A^-1 B and M = D + S'S, dL/dz = (M^-1 (E - S'F A^-1 C))' (y - c).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchopt
from benchmarks.engines.figures import distance, timed
from torchopt.diff import Engine, Explicit, Implicit
from torchopt.linear_solve import CG, Cholesky

SIZES, STEPS, RATE = (40, 30, 20), 18, 0.9
SOLVED = Implicit(solve=Cholesky(), positive_definite=True)
PAIRS: dict[str, tuple[Engine, Engine]] = {
    "explicit in explicit": (Explicit(), Explicit()),
    "explicit, 5 snapshots, in explicit, 5 snapshots": (Explicit(keep=5), Explicit(keep=5)),
    "explicit, mixed, in explicit": (Explicit(derivative="mixed"), Explicit()),
    "implicit in explicit": (SOLVED, Explicit()),
    "explicit in implicit": (Explicit(), Implicit(solve=CG(rtol=1e-13), positive_definite=True)),
    "implicit in implicit": (SOLVED, SOLVED),
}


class Problem:
    """The matrices."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        def hessian(n: int) -> Tensor:
            a = draw(n, n)
            return torch.eye(n, dtype=torch.float64) + 0.1 * (a + a.mT) / (a + a.mT).norm()

        n1, n2, n3 = SIZES
        self.a, self.d = hessian(n1), hessian(n2)
        self.b, self.c, self.e = draw(n1, n2), draw(n1, n3), draw(n2, n3)
        self.f, self.goal, self.target = 0.002 * draw(n1, n1), draw(n1), draw(n2)
        self.z = draw(n3)

    def exact(self) -> Tensor:
        """Return dL/dz."""
        to_x = self.f @ torch.linalg.inv(self.a)
        slope = to_x @ self.b
        m = self.d + slope.mT @ slope
        y = torch.linalg.solve(m, self.e @ self.z - slope.mT @ (to_x @ self.c @ self.z - self.goal))
        return (self.e - slope.mT @ to_x @ self.c).mT @ torch.linalg.solve(m, y - self.target)

    def gradient(self, inner: Engine, middle: Engine) -> Tensor:
        """Return dL/dz by two engines."""

        def lower(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x @ self.a @ x / 2 - x @ (self.b @ y + self.c @ z)

        low = inner.over(lower, torchopt.sgd(RATE), steps=STEPS)
        start = torch.zeros(SIZES[0], dtype=torch.float64)

        def loss(y: Tensor, batch: None, z: Tensor) -> Tensor:
            left = self.f @ low(start, y, z).params - self.goal
            return y @ self.d @ y / 2 - y @ self.e @ z + (left**2).sum() / 2

        run = middle.over(loss, torchopt.sgd(RATE), steps=STEPS)
        z = self.z.clone().requires_grad_()
        y = run(torch.zeros(SIZES[1], dtype=torch.float64), None, z).params
        (found,) = torch.autograd.grad(((y - self.target) ** 2).sum() / 2, z)
        return found


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each pair."""
    problem = Problem()
    exact, rows = problem.exact(), []
    for name, pair in PAIRS.items():
        found, times = timed(lambda: problem.gradient(*pair), repeats)  # noqa: B023 - at once
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
        rows.append({"engines": name, **times, **distance(found, exact)})
    return rows
