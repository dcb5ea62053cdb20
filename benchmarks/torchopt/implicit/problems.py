# SPDX-License-Identifier: Apache-2.0
"""The problems of the implicit benchmark and their answers, by dense linear algebra in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

Problem = dict[str, Any]


def logistic(size: int) -> Problem:
    """Return l2-logistic regression with a weight exp(theta) for each of `size` coordinates.

    The minimum w is given, so that only the derivative is timed: the gradient of v·w with respect
    to theta, -exp(theta) w (H⁻¹ v).
    """
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2 * size, size)) / np.sqrt(size)
    y = (rng.random(2 * size) < 0.5).astype(float)
    theta = np.linspace(-3.0, -1.0, size)
    v = rng.standard_normal(size)
    w = np.zeros(size)
    for _ in range(30):
        p = 1 / (1 + np.exp(-X @ w))
        H = X.T @ (X * (p * (1 - p))[:, None]) + np.diag(np.exp(theta))
        w = w - np.linalg.solve(H, X.T @ (p - y) + np.exp(theta) * w)
    gradient = -np.exp(theta) * w * np.linalg.solve(H, v)
    return {"X": X, "y": y, "theta": theta, "v": v, "w": w, "gradient": gradient}


def equilibrium(size: int) -> Problem:
    """Return a deep equilibrium layer z = tanh(W z + x) for a batch of 32, solved from zero.

    The gradient of Σ v z with respect to x, entry by entry: D (I - Wᵀ D)⁻¹ v, D the slope of tanh.
    """
    rng = np.random.default_rng(0)
    W = rng.standard_normal((size, size))
    W *= 0.9 / np.linalg.norm(W, 2)
    x, v = rng.standard_normal((32, size)), rng.standard_normal((32, size))
    z = np.zeros_like(x)
    for _ in range(1000):
        z = np.tanh(z @ W.T + x)
    slope = 1 - z * z
    rows = [d * np.linalg.solve(np.eye(size) - W.T * d, c) for d, c in zip(slope, v)]
    return {"W": W, "x": x, "v": v, "gradient": np.stack(rows)}


def small_ridge(count: int) -> Problem:
    """Return `count` ridge regressions of 5 weights on 20 rows, solved within what is timed.

    The gradient of v·w with respect to the log of the ridge, for each: -lam v·(A⁻¹ w).
    """
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((count, 20, 5)), rng.standard_normal((count, 20))
    theta, v = np.linspace(-2.0, 0.0, count), rng.standard_normal((count, 5))
    lam = np.exp(theta)
    A = np.einsum("nki,nkj->nij", X, X) / 20 + lam[:, None, None] * np.eye(5)
    w = np.linalg.solve(A, np.einsum("nki,nk->ni", X, y)[..., None] / 20)
    inner = np.linalg.solve(A, w)[..., 0]
    return {"X": X, "y": y, "theta": theta, "v": v, "gradient": -lam * (v * inner).sum(1)}


PROBLEMS = {
    "logistic": logistic,
    "equilibrium": equilibrium,
    "anderson": equilibrium,
    "small_ridge": small_ridge,
}


def make(case: dict[str, Any]) -> Problem:
    """Return the problem of a case."""
    return PROBLEMS[case["operation"]](case["size"])


def relative_error(found: Any, problem: Problem) -> float:
    """Return ‖found - gradient‖ / ‖gradient‖."""
    truth = problem["gradient"]
    return float(np.linalg.norm(np.asarray(found) - truth) / np.linalg.norm(truth))
