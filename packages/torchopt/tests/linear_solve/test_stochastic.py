# SPDX-License-Identifier: Apache-2.0
"""Solvers with random products: means and covariances in closed form, and their draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff import Implicit
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import (
    CG,
    LinearOperator,
    LinearSolveError,
    Status,
    StochasticGradient,
    StochasticNeumann,
    WarmStart,
    linear_solve,
)

# Three draws of equal probability, not symmetric.
DRAWS = torch.tensor(
    [[[0.9, 0.3], [-0.1, 0.5]], [[0.3, -0.2], [0.4, 1.1]], [[0.6, 0.2], [0.0, 0.8]]]
).double()
MEAN = DRAWS.mean(0)
B = torch.tensor([1.0, -0.7], dtype=torch.float64)
REPEATS = 6000

SOLVERS: dict[str, Any] = {
    "gradient": StochasticGradient(12, alpha=0.7, rtol=9.0),
    "gradient, decaying": StochasticGradient(9, alpha=0.9, decay=0.3, rtol=9.0),
    "neumann": StochasticNeumann(6, alpha=0.8, rtol=9.0),
    "neumann, random end": StochasticNeumann(9, alpha=0.8, going_on=0.8, rtol=9.0),
}


def drawn(scale: Tensor, v: Tensor) -> Tensor:
    which = torch.randint(len(DRAWS), (1,))
    return scale * (DRAWS.index_select(0, which)[0] @ v)


def operator(scale: Any = 1.0) -> LinearOperator:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return LinearOperator.from_function(drawn, scale, B)


def repeated(function: Any) -> Tensor:
    """Return many independent values of a function of a right-hand side."""
    torch.manual_seed(0)
    found: Tensor = torch.func.vmap(function, randomness="different")(B.expand(REPEATS, 2))
    return found


def moments(solver: Any, draws: Tensor = DRAWS) -> tuple[Tensor, Tensor]:
    """Return mean and second moment from the recursions in the docstrings."""
    eye, bb = torch.eye(2).double(), torch.outer(B, B)
    mean, second = torch.zeros(2).double(), torch.zeros(2, 2).double()
    if isinstance(solver, StochasticGradient):
        for k in range(solver.steps):
            a = solver.alpha / (1 + solver.decay * k)
            R = eye - a * draws
            cross = a * torch.outer(R.mean(0) @ mean, B)
            second = (R @ second @ R.mT).mean(0) + cross + cross.mT + a**2 * bb
            mean = R.mean(0) @ mean + a * B
        return mean, second
    p = solver.going_on or 1.0
    R = eye - solver.alpha * draws
    powers = [torch.linalg.matrix_power(R.mean(0), j) for j in range(solver.steps + 1)]
    mean, X, second = sum(powers) @ B, bb, torch.zeros(2, 2).double()
    for k in range(solver.steps + 1):
        C = sum(powers[1 : solver.steps - k + 1], torch.zeros_like(bb)) @ X
        second = second + X + C + C.mT
        X = (R @ X @ R.mT).mean(0) / p
    return solver.alpha * mean, solver.alpha**2 * second


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """Assert that the mean is correct within four standard errors, which must be small."""
    error = samples.std(0) / len(samples) ** 0.5
    assert (error > 0).all()
    assert (error < 0.05 * (expected.abs() + 1)).all()
    assert ((samples.mean(0) - expected).abs() <= 4 * error).all()


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_mean_and_second_moments_obey_the_stated_recursions(name: str, adjoint: bool) -> None:
    solver, A = SOLVERS[name], operator()
    A = A.T if adjoint else A
    x = repeated(lambda b: linear_solve(A, b, solver, on_fail="ignore").value)
    mean, second = moments(solver, DRAWS.mT if adjoint else DRAWS)
    assert_mean(x, mean)
    assert_mean(x.unsqueeze(1) * x.unsqueeze(2), second)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_bias_is_that_of_the_same_steps_with_the_mean(name: str) -> None:
    solver = SOLVERS[name]
    exact = torch.linalg.solve(MEAN, B)
    left = -exact
    if isinstance(solver, StochasticGradient):
        for k in range(solver.steps):
            left = left - solver.alpha / (1 + solver.decay * k) * MEAN @ left
    else:
        step = torch.eye(2).double() - solver.alpha * MEAN
        left = torch.linalg.matrix_power(step, solver.steps + 1) @ left
    torch.testing.assert_close(moments(solver)[0], exact + left)


def test_a_mean_over_iterates_has_their_mean_and_less_variance() -> None:
    last = StochasticGradient(40, alpha=0.5)
    many = StochasticGradient(40, alpha=0.5, average=20)
    x, y = (
        repeated(lambda b, s=s: linear_solve(operator(), b, s, on_fail="ignore").value)
        for s in (last, many)
    )
    means = [moments(StochasticGradient(k, alpha=0.5))[0] for k in range(21, 41)]
    assert_mean(y, torch.stack(means).mean(0))
    assert (y.var(0) < 0.5 * x.var(0)).all()


def test_a_constant_operator_is_solved_deterministically() -> None:
    A = LinearOperator.from_matrix(MEAN)
    exact = torch.linalg.solve(MEAN, B)
    for solver in (StochasticGradient(100), StochasticNeumann(100)):
        for tolerance, dtype in ((1e-12, torch.float64), (2e-2, torch.bfloat16)):
            a = LinearOperator.from_matrix(MEAN.to(dtype)) if dtype != torch.float64 else A
            found = linear_solve(a, B.to(dtype), solver)
            assert found.value.dtype == dtype
            torch.testing.assert_close(found.value.double(), exact, rtol=tolerance, atol=tolerance)
            assert Status(int(found.status)) is Status.CONVERGED


def test_derivatives_of_a_solve_are_unbiased() -> None:
    solver = StochasticGradient(40, alpha=0.7)
    c = torch.tensor([0.4, 1.0], dtype=torch.float64)

    def gradients(b: Tensor) -> tuple[Tensor, Tensor]:
        def value(b: Tensor, scale: Tensor) -> Tensor:
            return c @ linear_solve(operator(scale), b, solver, on_fail="ignore").value

        found: tuple[Tensor, Tensor] = torch.func.grad(value, (0, 1))(
            b, torch.tensor(1.2, dtype=torch.float64)
        )
        return found

    of_b, of_scale = repeated(gradients)
    assert_mean(of_b, torch.linalg.solve(1.2 * MEAN.mT, c))
    assert_mean(of_scale, -c @ torch.linalg.solve(1.2 * MEAN, B) / 1.2)


RATES = torch.tensor([[1.0, 0.2], [0.4, 0.9], [0.1, -0.5]], dtype=torch.float64)


def sampled(w: Tensor, batch: Any, theta: Tensor) -> Tensor:
    """Return the loss of one draw; the mean is w · A w / 2 - w · (rates theta)."""
    which = torch.randint(len(DRAWS), (1,))
    a = DRAWS.index_select(0, which)[0]
    rates = 3 * RATES.index_select(0, which)[0] * torch.stack([theta, -theta]).T[0]
    return 0.25 * w @ ((a + a.mT) @ w) - w @ rates


SYMMETRIC = (MEAN + MEAN.mT) / 2


@pytest.mark.parametrize(
    "solver",
    [StochasticGradient(60, alpha=0.8), StochasticNeumann(60, alpha=0.8, on_fail="ignore")],
    ids=["gradient", "neumann"],
)
def test_the_implicit_engine_takes_minibatch_products(solver: Any) -> None:
    """w(theta) = A⁻¹ E[rates] theta, so the gradient of c · w is (A⁻¹ c) · E[rates]."""
    c = torch.tensor([0.4, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    count = 4000
    inner = Implicit(sampled, torchopt.sgd(0.1), steps=2, solve=solver, tasks=(0, None, 0))
    theta = torch.full((count, 1), 0.3, dtype=torch.float64, requires_grad=True)
    result = inner(torch.zeros(count, 2).double(), None, theta)
    (gradient,) = torch.autograd.grad((result.params @ c).sum(), theta)
    slope = 3 * RATES.mean(0) * torch.tensor([1.0, -1.0])
    assert_mean(gradient, (torch.linalg.solve(SYMMETRIC, c) @ slope).reshape(1))


def draws_of(solver: Any) -> list[float]:
    """Return what the loss draws in one gradient of an implicit solution."""
    seen: list[float] = []

    def loss(w: Tensor, batch: Any, theta: Tensor) -> Tensor:
        noise = torch.rand((), dtype=torch.float64)
        seen.append(float(noise))
        return 0.5 * (1 + 0.1 * noise) * (w * w).sum() - (w * theta).sum()

    torch.manual_seed(0)
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = Implicit(loss, torchopt.sgd(0.1), steps=1, solve=solver)(
        torch.zeros_like(B), None, theta
    )
    seen.clear()
    result.params.sum().backward()
    return seen


def test_each_product_draws_anew_and_others_see_one_draw() -> None:
    anew = draws_of(StochasticGradient(7, alpha=0.5))
    assert len(set(anew)) == len(anew) >= 8
    assert len(set(draws_of(WarmStart(StochasticGradient(7, alpha=0.5))))) >= 8
    assert len(set(draws_of(CG()))) == 1
    assert draws_of(StochasticGradient(7, alpha=0.5)) == anew  # by torch.manual_seed


def test_a_root_of_an_unsymmetric_equation() -> None:
    def F(x: Tensor, theta: Tensor) -> Tensor:
        return drawn(torch.ones(()).double(), x) - theta

    solver = StochasticGradient(40, alpha=0.7, on_fail="ignore")
    solved = custom_root(F, argnums=1, solve=solver)(lambda x, theta: x)
    c = torch.tensor([0.4, 1.0], dtype=torch.float64)
    found = repeated(torch.func.grad(lambda theta: c @ solved(torch.zeros_like(theta), theta)))
    assert_mean(found, torch.linalg.solve(MEAN.mT, c))


@pytest.mark.parametrize("solver", [StochasticGradient(50, 3.0), StochasticNeumann(50, 3.0)])
def test_steps_that_are_too_long_are_reported(solver: Any) -> None:
    with pytest.raises(LinearSolveError, match="DIVERGED"):
        linear_solve(operator(2.0), B, solver)


def test_too_few_steps_are_reported() -> None:
    for solver in (StochasticGradient(3, 0.01), StochasticNeumann(3, 0.01)):
        with pytest.raises(LinearSolveError, match="MAX_ITERATIONS"):
            linear_solve(operator(), B, solver)


@pytest.mark.parametrize("solver", [StochasticGradient(), StochasticNeumann()])
@pytest.mark.parametrize("option", [{"polish": 1}, {"tol": 1e-3}, {"certificate": id}])
def test_solvers_that_need_one_operator_are_refused(solver: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected none with Stochastic"):
        Implicit(sampled, torchopt.sgd(0.1), steps=1, solve=solver, **option)


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (StochasticGradient, {"steps": 0}, "steps: expected a count >= 1"),
        (StochasticGradient, {"steps": 5.5}, "steps: expected a count >= 1, got 5.5"),
        (StochasticNeumann, {"steps": "5"}, "steps: expected a count >= 1, got '5'"),
        (StochasticNeumann, {"rtol": -1.0}, "rtol: expected a number >= 0"),
        (StochasticGradient, {"alpha": 0.0}, "alpha: expected a finite step size"),
        (StochasticGradient, {"decay": -1.0}, "decay: expected a number >= 0"),
        (StochasticGradient, {"steps": 5, "average": 6}, "average: expected a count of iterates"),
        (StochasticNeumann, {"going_on": 0.0}, "going_on: expected a probability"),
        (StochasticNeumann, {"going_on": 1.5}, "going_on: expected a probability"),
    ],
)
def test_options_out_of_range(make: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_power_of_two_times_the_system_takes_the_same_steps(name: str) -> None:
    found = []
    for factor in (1.0, 2.0**-200, 2.0**200):
        torch.manual_seed(3)
        solution = linear_solve(operator(), factor * B, SOLVERS[name])
        found.append((solution.value / factor, solution.stats.residual_norm / factor))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("average", [1, 6])
def test_the_residual_is_that_of_the_mean_over_the_second_half(average: int) -> None:
    """For a matrix that is not random the residuals are (I - a A)^k b."""
    steps, alpha, A = 7, 0.4, MEAN
    fixed = LinearOperator.from_function(lambda A, v: A @ v, A, B)
    solver = StochasticGradient(steps, alpha, average=average, rtol=9.0)
    found = linear_solve(fixed, B, solver).stats.residual_norm
    R = torch.eye(2).double() - alpha * A
    first = min(steps // 2, steps - average)
    rest = [torch.linalg.matrix_power(R, k) @ B for k in range(first, steps)]
    torch.testing.assert_close(found, torch.stack(rest).mean(0).norm())
