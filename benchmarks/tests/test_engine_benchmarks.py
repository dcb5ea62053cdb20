# SPDX-License-Identifier: Apache-2.0
"""The references of the table of engines, and the tables themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.engines import (
    exactness,
    expected,
    explicit,
    learned,
    least_squares,
    levels,
    report,
    run,
    solvers,
)

from torchopt.linear_solve import Neumann


def test_the_closed_form_of_three_levels_is_that_of_differences() -> None:
    problem = levels.Problem()
    exact, z, h = problem.exact(), problem.z, 1e-4

    def outer(z: torch.Tensor) -> torch.Tensor:
        to_x = problem.f @ torch.linalg.inv(problem.a)
        slope = to_x @ problem.b
        right = problem.e @ z - slope.mT @ (to_x @ problem.c @ z - problem.goal)
        y = torch.linalg.solve(problem.d + slope.mT @ slope, right)
        return ((y - problem.target) ** 2).sum() / 2

    for i in (0, 7):
        step = h * torch.eye(len(z), dtype=torch.float64)[i]
        assert float(exact[i]) == pytest.approx(
            float(outer(z + step) - outer(z - step)) / (2 * h), rel=1e-6
        )


def test_a_wrong_derivative_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = levels.PAIRS["implicit in implicit"]
    monkeypatch.setattr(levels, "PAIRS", {"right": right})
    assert levels.measure(1)[0]["error"] < 1e-12
    wrong = (right[0], levels.Implicit(solve=Neumann(0, alpha=1.0, rtol=1.0)))
    monkeypatch.setattr(levels, "PAIRS", {"wrong": wrong})
    with pytest.raises(AssertionError, match="not close"):
        levels.measure(1)


def test_a_wrong_way_through_a_transformer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"right": explicit.WAYS["mixed, blocks again"]}
    monkeypatch.setattr(explicit, "WAYS", ways)
    first, second = explicit.compared(4, 4, 1, 1)
    assert second["error"] < 1e-12
    assert second["peak"] < first["peak"] / 2
    ways["wrong"] = explicit.Explicit(derivative="first_order")
    with pytest.raises(AssertionError, match="wrong: off by"):
        explicit.compared(2, 2, 1, 1)


def test_the_gradient_of_a_learned_optimizer_is_compared_with_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = learned.data()[2]
    exact = learned.checked_reference(weights)
    assert exact.norm() > 1e-3
    explicit = learned.explicit
    monkeypatch.setattr(learned, "explicit", lambda *args: 1.001 * explicit(*args))
    with pytest.raises(AssertionError):
        learned.checked_reference(weights)


def test_products_of_minibatches_lead_close_to_the_exact_gradient() -> None:
    problem = run.Problem(steps=100)
    torch.manual_seed(0)
    loss = problem.solved_by_minibatches(
        run.StochasticGradient(200, 0.05, average=100, on_fail="ignore"), 40
    )
    theta = problem.start()
    (found,) = torch.autograd.grad(loss(theta), theta)
    assert run.distance(found, problem.exact())["error"] < 0.15


def test_every_engine_is_checked() -> None:
    problem = run.Problem(steps=100)
    names = {*run.engines(100), *run.minibatches(problem), *run.searches(problem)}
    forms = expected.closed_forms(problem, run.PENALTY, run.RATE)
    means = expected.minibatch_means(problem, run.PENALTY, run.RATE, run.SMALL_RATE)
    assert {*forms, *means, *run.SAMPLED} <= names
    assert len(names - {*forms, *means, *run.SAMPLED}) == 14  # exact ones, and guided ES


def test_the_whole_sum_of_the_closed_forms_is_the_unrolled_loop() -> None:
    problem = run.Problem(steps=20)
    theta = problem.start()
    (found,) = torch.autograd.grad(problem.solved_by(run.Explicit())(theta), theta)
    h = expected.hessian_of(problem, run.PENALTY)
    x = expected.iterate(problem, run.PENALTY, run.RATE)
    power = torch.linalg.matrix_power(torch.eye(len(h), dtype=h.dtype) - run.RATE * h, 20)
    p = problem.c.mT @ (problem.c @ x - problem.d) / run.ROWS
    rest = run.PENALTY * torch.linalg.solve(h, p - power @ p)
    torch.testing.assert_close(found, power @ p + rest, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "explicit: last 10 steps",
        "explicit: last step, by two differences",
        "explicit: first order",
        "implicit: 5 steps of conjugate gradients",
        "implicit: 5 terms of the Neumann series",
        "implicit: 20 terms of the Neumann series",
        "implicit: T1-T2",
        "implicit: SAMA, by two differences",
        "zero-order: 100 antithetic pairs",
        "zero-order: 400 orthogonal pairs",
    ],
)
def test_a_wrong_approximation_is_noticed(name: str) -> None:
    problem = run.Problem(steps=100)
    loss = problem.solved_by(run.engines(100)[name])

    def gradient(theta: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss(theta), theta)[0]

    found, exact = gradient(problem.start()), problem.exact()
    run.check(problem, name, gradient, found, exact)
    factor = 3.0 if "zero-order" in name else 1.00001
    with pytest.raises(AssertionError, match=name.partition(":")[0]):
        run.check(problem, name, gradient, factor * found, exact)
    with pytest.raises(AssertionError, match=name.partition(":")[0]):
        run.check(problem, name, gradient, found.flip(0), exact)


def test_a_wrong_mean_of_minibatches_is_noticed() -> None:
    torch.manual_seed(0)
    mean = torch.ones(3, dtype=torch.float64)

    def draw(scale: float) -> torch.Tensor:
        return scale * mean + 0.1 * torch.randn(3, dtype=torch.float64)

    expected.check_mean("right", lambda: draw(1.0), mean)
    with pytest.raises(AssertionError, match="wrong: the mean of 16 draws"):
        expected.check_mean("wrong", lambda: draw(1.2), mean)


def test_a_wrong_truncation_of_a_learned_optimizer_is_noticed() -> None:
    weights = learned.data()[2]
    cut = learned.by_hand(weights, last=learned.WINDOW)
    found = learned.explicit(learned.ENGINES[f"explicit: last {learned.WINDOW} steps"], weights)
    torch.testing.assert_close(found, cut, rtol=1e-9, atol=1e-11)
    whole = learned.by_hand(weights)
    torch.testing.assert_close(whole, learned.explicit(learned.Explicit(), weights))
    assert (whole - cut).norm() > 0.1 * whole.norm()
    with pytest.raises(AssertionError, match="ES: the estimate along its mean is 2.000"):
        learned.check_estimate("ES", 2 * whole, whole)


def test_a_wrong_minimum_of_least_squares_is_noticed() -> None:
    row = {"problem": "P", "method": "M", "error": 1e-9, "derivative_error": 1e-9}
    least_squares.check(row)
    for figure in ("error", "derivative_error"):
        for value in (1e-3, float("nan")):
            with pytest.raises(AssertionError, match=f"P, M: {figure}: expected at most"):
                least_squares.check({**row, figure: value})


def test_the_fewest_iterations_are_found_by_bisection() -> None:
    asked = []

    def error(count: int) -> float:
        asked.append(count)
        return 1.0 if count < 37 else 0.0

    assert solvers.fewest(error) == 37
    assert len(asked) < 15


def test_every_least_squares_problem_has_an_answer_of_scipy() -> None:
    pytest.importorskip("scipy.optimize")
    for problem in least_squares.problems().values():
        best = least_squares.by_scipy(problem)[0]()
        assert best.success
        assert best.cost >= 0


def test_tables_show_what_was_measured() -> None:
    times = {"seconds": 0.9e-3, "median": 1e-3}
    engine = {"engine": "E", **times, "error": 2e-5, "cosine": 0.5}
    result: dict[str, Any] = {
        "rows": [{**engine, "kept_bytes": 2048}],
        "levels": [{"engines": "in", **times, "error": 3e-12}],
        "learned": [engine, {"step": "S", **times, "state": 7.0}],
        "solvers": [
            {"solver": "CG", "preconditioner": "EK-FAC", "iterations": 52, "setup": 0.011}
            | {**times, "error": 9e-4}
        ],
        "least_squares": [
            {"problem": "P", "method": "Dogleg", "steps": 7, **times, "error": 1e-9}
            | {"derivative_error": 1e-8},
            {"problem": "P", "method": "scipy", "steps": 8, **times, "error": 0.5},
        ],
    }
    shown = {
        "comparison": ("2 KiB", "2e-05", "0.500"),
        "levels": ("in", "3e-12"),
        "learned": ("E", "0.500"),
        "learned_steps": ("S", "7"),
        "solvers": ("EK-FAC", "52", "11.0 ms", "9e-04"),
        "least_squares": ("Dogleg", "1e-09", "1e-08", "0.50"),
    }
    for name, texts in shown.items():
        table = getattr(report, f"{name}_table")
        text = table(result)
        assert "1 ms \u221210 %" in text
        assert all(part in text for part in texts), text
        if name != "comparison":
            assert table({}).startswith("Not measured yet")


def test_the_table_of_transformers_shows_what_was_measured() -> None:
    size = {"blocks": 12, "steps": 4, "tokens": 1024}
    first = {"engine": "unrolled by hand", "seconds": 0.9e-3, "median": 1e-3, "peak": 6 * 2**20}
    second = {"engine": "X", "seconds": 0.9e-3, "median": 2e-3, "peak": 2**20}
    text = report.transformer_table({"rows": [first | size, second | size]})
    parts = ("12 blocks, 4 steps, 1,024 tokens", "1 ms \u221210 %", "1/6.0", "2.00")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("setting", exactness.SETTINGS[:54:11], ids=str)
@pytest.mark.filterwarnings("ignore:inner_loop")
def test_settings_of_the_explicit_engine_are_exact(setting: exactness.Setting) -> None:
    assert max(exactness.errors(setting).values()) <= exactness.EXACT


def test_a_setting_with_another_derivative_is_noticed() -> None:
    found = exactness.by_engine(exactness.Setting("first_order", "all"), "own", None)
    assert exactness.apart(found, exactness.by_hand("own", None, first_order=False)) > 1e-3
