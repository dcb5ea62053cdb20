# SPDX-License-Identifier: Apache-2.0
"""What the engines that are not exact return on the problem of `run`, and how far they may miss it.

With H = A'A / n + lambda I, M = I - eta H and p = C'(C x_T - d) / m at the last iterate x_T, the
derivative of T steps of gradient descent that start at theta is

    M^T p + eta lambda (p + M p + ... + M^(T-1) p).

Truncated engines keep a part of this sum. Estimates from random directions have it as their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_direction", "check_length", "check_mean", "closed_forms", "minibatch_means"]


def hessian_of(problem: Any, penalty: float) -> Tensor:
    """Return H."""
    a = problem.a
    return a.mT @ a / len(a) + penalty * torch.eye(a.shape[1], dtype=a.dtype)


def iterate(problem: Any, penalty: float, rate: float) -> Tensor:
    """Return x_T, by the plain loop."""
    h, x = hessian_of(problem, penalty), problem.theta
    target = problem.a.mT @ problem.b / len(problem.a) + penalty * problem.theta
    for _ in range(problem.steps):
        x = x - rate * (h @ x - target)
    return x


def closed_forms(problem: Any, penalty: float, rate: float) -> dict[str, tuple[Tensor, float]]:
    """Return the vector of each truncated engine by name, and how far it may miss it.

    The tolerance is relative to the largest entry: rounding for products, and for differences of
    two gradients the square of their step.
    """
    h = hessian_of(problem, penalty)
    x, part = iterate(problem, penalty, rate), problem.steps // 10
    p = problem.c.mT @ (problem.c @ x - problem.d) / len(problem.c)

    def series(terms: int) -> Tensor:
        total, term = torch.zeros_like(p), p
        for _ in range(terms):
            total, term = total + term, term - rate * (h @ term)
        return rate * penalty * total

    rounding, differences = 1e-9, 1e-6
    return {
        f"explicit: last {part} steps": (series(part), rounding),
        "explicit: last step, by two differences": (series(1), differences),
        "explicit: first order": (p, rounding),
        "implicit: 5 steps of conjugate gradients": (penalty * in_krylov(h, p, 5), rounding),
        "implicit: 5 terms of the Neumann series": (series(6), rounding),
        "implicit: 20 terms of the Neumann series": (series(21), rounding),
        "implicit: T1-T2": (series(1), rounding),
        "implicit: SAMA, by two differences": (series(1), differences),
    }


def minibatch_means(problem: Any, penalty: float, rate: float, alpha: float) -> dict[str, Tensor]:
    """Return the means of the gradients whose adjoint solve sees minibatches, by name.

    Each product has rows of its own, so the mean of a product of matrices is that of the means: the
    mean of the k-th iterate from zero is (I - (I - alpha H)^k) H^-1 p.
    """
    h = hessian_of(problem, penalty)
    x = iterate(problem, penalty, rate)
    p = problem.c.mT @ (problem.c @ x - problem.d) / len(problem.c)
    iterates = [torch.zeros_like(p)]
    for _ in range(300):
        iterates.append(iterates[-1] - alpha * (h @ iterates[-1] - p))
    return {
        "implicit: 300 minibatch products, mean of 100": penalty
        * torch.stack(iterates[201:]).mean(0),
        "implicit: 100 minibatch terms of the Neumann series": penalty * iterates[101],
    }


def in_krylov(h: Tensor, p: Tensor, steps: int) -> Tensor:
    """Return the minimiser of x'Hx / 2 - p'x in the span of p, Hp, ..., as conjugate gradients do.

    The basis is orthonormal; they compute the same point by short recurrences.
    """
    columns = [p / p.norm()]
    for _ in range(steps - 1):
        columns.append(torch.linalg.qr(torch.stack([*columns, h @ columns[-1]], 1))[0][:, -1])
    q = torch.stack(columns, 1)
    return q @ torch.linalg.solve(q.mT @ h @ q, q.mT @ p)


def check_direction(
    name: str, found: Tensor, exact: Tensor, samples: int, block: int = 1, scaled: bool = True
) -> None:
    """Raise unless an estimate from Gaussian directions z is as close as such an estimate is.

    For a linear function the estimate is sum z z'g / N. Its product with g has mean |g|^2 and
    relative variance 2 / N. The mean of its square is |g|^2 (D N + N^2 - sum s_k^2) / N^2 if the
    directions are orthogonal in blocks of s_k. That gives the cosine with g, whose spread is about
    1 / sqrt(D). Four standard deviations are allowed.

    Args:
        name: The engine, for the text of the error.
        found: The estimate.
        exact: g.
        samples: N.
        block: How many directions are orthogonal to one another.
        scaled: Whether the estimate has the length of the gradient; ranks lose it.
    """
    n, d = samples, exact.numel()
    squares = n // block * block**2 + (n % block) ** 2
    cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
    expected = 1 / math.sqrt(d / n + 1 - squares / n**2)
    if abs(cosine - expected) > 4 / math.sqrt(d):
        raise AssertionError(f"{name}: expected a cosine of about {expected:.3f}, got {cosine:.3f}")
    if scaled:
        check_length(name, found, exact, exact, samples)


def check_length(name: str, found: Tensor, exact: Tensor, mean: Tensor, samples: int) -> None:
    """Raise unless the estimate is as long along g as its mean, up to 4 sqrt(2 / N)."""
    ratio = float(found @ exact / (mean @ exact))
    if abs(ratio - 1) > 4 * math.sqrt(2 / samples):
        raise AssertionError(f"{name}: the estimate along the gradient is {ratio:.3f} of its mean")


def check_mean(name: str, draw: Callable[[], Tensor], mean: Tensor, draws: int = 16) -> None:
    """Raise unless the average of random gradients is `mean` within four standard errors.

    What is compared is the product with `mean`, whose standard error is that of the draws.
    """
    products = torch.stack([draw() @ mean for _ in range(draws)]) / (mean @ mean)
    error = float(products.std()) / math.sqrt(draws)
    if abs(float(products.mean()) - 1) > 4 * error:
        raise AssertionError(
            f"{name}: the mean of {draws} draws along the expected gradient is "
            f"{float(products.mean()):.4f} of it, with a standard error of {error:.4f}"
        )
