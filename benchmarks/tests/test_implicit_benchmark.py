# SPDX-License-Identifier: Apache-2.0
"""The implicit benchmark: its answers are right, and its counters count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.torchopt import implicit, implicit_problems  # noqa: E402  # after the skip
from benchmarks.torchopt.implicit_rivals import ours, ours_loop, unrolled  # noqa: E402  # ditto

CASES = [("logistic", 12), ("equilibrium", 6), ("small_ridge", 4)]


@pytest.mark.parametrize(("problem", "size"), CASES)
@pytest.mark.parametrize("rival", [ours, ours_loop, unrolled], ids=lambda m: m.__name__)
def test_answers_on_torch(rival: Any, problem: str, size: int) -> None:
    if problem not in rival.BUILD:
        pytest.skip("this rival has no such problem")
    made = implicit_problems.make({"problem": problem, "size": size})
    assert implicit_problems.relative_error(rival.BUILD[problem](made)(), made) < 1e-6


def test_truth_of_the_ridge_problem_is_a_finite_difference() -> None:
    def value(shift: float) -> Any:
        made = implicit_problems.small_ridge(3)
        lam = np.exp(made["theta"] + shift)
        X, y = made["X"], made["y"]
        A = np.einsum("nki,nkj->nij", X, X) / 20 + lam[:, None, None] * np.eye(5)
        w = np.linalg.solve(A, np.einsum("nki,nk->ni", X, y)[..., None] / 20)[..., 0]
        return (w * made["v"]).sum(1)

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(implicit_problems.small_ridge(3)["gradient"], slope, rtol=1e-7)


@pytest.mark.parametrize("steps", implicit.PRODUCTS)
def test_backward_takes_one_product_more_than_steps(steps: int) -> None:
    counted = ours.products(steps)
    assert counted["products"] == steps + 1
    assert counted["evaluations"] == 2


def test_memory_is_that_of_one_step() -> None:
    few, many = (ours.memory("implicit", steps)["peak_bytes"] for steps in (5, 100))
    assert many == few
    assert ours.memory("unrolled", 100)["peak_bytes"] > 10 * many
