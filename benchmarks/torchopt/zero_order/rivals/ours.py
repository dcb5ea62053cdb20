# SPDX-License-Identifier: Apache-2.0
"""Our decorator, and all our estimators and directions on toy functions."""

from __future__ import annotations

from typing import Any

from benchmarks.torchopt.zero_order.rivals.decorated import DISTRIBUTIONS, estimator, library
from torchopt.diff.zero_order import Gaussian, Orthogonal, Rademacher, Sobol, ZeroOrder
from torchopt.diff.zero_order.estimators import multi_point

__all__ = ["DISTRIBUTIONS", "estimator", "library", "toy"]

METHODS = {
    "orthogonal antithetic": (Orthogonal(), "antithetic"),
    "Sobol antithetic": (Sobol(16), "antithetic"),
    "signs antithetic": (Rademacher(), "antithetic"),
    "four points": (Gaussian(), multi_point(2)),
}


def toy(fn: Any, point: Any, method: str, samples: int, sigma: float, seed: int) -> tuple[Any, int]:
    """Return the estimate and its number of evaluations."""
    directions, name = METHODS.get(method, (Gaussian(), method))
    engine = ZeroOrder(directions, name, num_samples=samples, sigma=sigma)
    result = engine.estimate(fn, point, seed=seed, with_error=False)
    return result.gradient, result.evaluations
