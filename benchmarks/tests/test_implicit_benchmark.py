# SPDX-License-Identifier: Apache-2.0
"""The implicit benchmark: its answers are right, and its counters count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.harness.case import UnsupportedError  # noqa: E402  # after the skip
from benchmarks.torchopt.implicit import __main__ as implicit  # noqa: E402  # ditto
from benchmarks.torchopt.implicit import problems, report, suite  # noqa: E402  # ditto
from benchmarks.torchopt.implicit.rivals import ours, ours_loop, unrolled  # noqa: E402  # ditto

CASES = [("logistic", 12), ("equilibrium", 6), ("anderson", 6), ("small_ridge", 4)]


@pytest.mark.parametrize(("problem", "size"), CASES)
@pytest.mark.parametrize("rival", [ours, ours_loop, unrolled], ids=lambda m: m.__name__)
def test_answers_on_torch(rival: Any, problem: str, size: int) -> None:
    case = {"operation": problem, "tree": "small", "size": size}
    if not hasattr(rival, problem):
        with pytest.raises(UnsupportedError, match="something else"):
            suite.prepare(rival, case)
        return
    assert suite.prepare(rival, case).facts["error"] < 1e-6


def test_a_wrong_gradient_is_not_timed() -> None:
    wrong = SimpleNamespace(logistic=lambda problem: lambda: 1.001 * problem["gradient"])
    with pytest.raises(ArithmeticError, match="expected an error of at most 1e-06, got 1.0e-03"):
        suite.prepare(wrong, {"operation": "logistic", "tree": "small", "size": 5})


def test_tables_show_medians_and_what_cannot_be_done() -> None:
    case = {"tree": "20 unknowns", "operation": "logistic", "gc": False}
    cells = [
        {**case, "rival": "torchopt", "status": "ok", "median": 4e-3, "min": 3e-3},
        {**case, "rival": "other", "status": "ok", "median": 8e-3, "min": 2e-3},
        {**case, "rival": "none", "status": "unsupported"},
    ]
    names = {name: {"label": name} for name in ("torchopt", "other", "none")}
    text = report.solves_table({"rivals": names, "cells": cells})
    assert "4 ms \u221225 %" in text
    assert "2x" in text
    assert "none" not in text


def test_truth_of_the_ridge_problem_is_a_finite_difference() -> None:
    def value(shift: float) -> Any:
        made = problems.small_ridge(3)
        lam = np.exp(made["theta"] + shift)
        X, y = made["X"], made["y"]
        A = np.einsum("nki,nkj->nij", X, X) / 20 + lam[:, None, None] * np.eye(5)
        w = np.linalg.solve(A, np.einsum("nki,nk->ni", X, y)[..., None] / 20)[..., 0]
        return (w * made["v"]).sum(1)

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(problems.small_ridge(3)["gradient"], slope, rtol=1e-7)


@pytest.mark.parametrize("steps", implicit.PRODUCTS)
def test_backward_takes_one_product_more_than_steps(steps: int) -> None:
    counted = ours.products(steps)
    assert counted["products"] == steps + 1
    assert counted["evaluations"] == 1


def test_memory_is_that_of_one_step() -> None:
    few, many = (ours.memory("implicit", steps)["peak_bytes"] for steps in (5, 100))
    assert many == few
    assert ours.memory("unrolled", 100)["peak_bytes"] > 10 * many
