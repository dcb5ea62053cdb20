# SPDX-License-Identifier: Apache-2.0
"""Error reports of gradients against the true error, from a dense Newton method in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap
from torch.nn.functional import binary_cross_entropy_with_logits

from torchopt.diff.implicit import (
    GradientReport,
    certified_grad,
    custom_fixed_point,
    custom_root,
)
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import (
    CG,
    GMRES,
    LSMR,
    LU,
    Auto,
    BiCGSTAB,
    Neumann,
    Status,
    WarmStart,
)

GENERATOR = torch.Generator().manual_seed(0)


def samples(count, dim=6):
    X = torch.randn(count, dim, generator=GENERATOR, dtype=torch.float64)
    coin = torch.rand(count, generator=GENERATOR, dtype=torch.float64)
    return X, (coin < torch.sigmoid(X[:, 0])).double()


TRAIN, VALIDATION = samples(60), samples(60)
START = torch.zeros(6, dtype=torch.float64)
LAM = torch.full((6,), -2.0, dtype=torch.float64)


def objective(w, lam):
    """Logistic loss with its own l2 weight exp(lam) for each coordinate."""
    X, Y = TRAIN
    return binary_cross_entropy_with_logits(X @ w, Y) + 0.5 * (lam.exp() * w * w).sum()


def outer(w, lam):
    X, Y = VALIDATION
    return binary_cross_entropy_with_logits(X @ w, Y) + 0.01 * lam.sum()


def newton(lam):
    w = START
    for _ in range(12):
        w = w - torch.linalg.solve(hessian(objective)(w, lam), grad(objective)(w, lam))
    return w


def dense_gradient(lam):
    w = newton(lam)
    B = jacrev(grad(objective), 1)(w, lam)
    u = torch.linalg.solve(hessian(objective)(w, lam), grad(outer)(w, lam))
    return grad(outer, 1)(w, lam) - B.T @ u


def descent(steps, **options):
    @custom_root(grad(objective), argnums=1, **{"symmetric": True, **options})
    def solve(w, lam):
        for _ in range(steps):
            w = w - grad(objective)(w, lam)
        return w

    return solve


def test_converged_gradient_is_that_of_dense_newton():
    lam = LAM.clone().requires_grad_()
    outer(descent(60, polish=1, solve=LU())(START, lam), lam).backward()
    torch.testing.assert_close(lam.grad, dense_gradient(LAM), rtol=1e-12, atol=1e-12)


def test_implicit_and_unrolled_gradients_converge_to_each_other():
    truth = dense_gradient(LAM)
    errors = []
    for steps in (20, 40, 80, 160):
        solve = descent(steps)
        unrolled = grad(lambda lam, f=solve.__wrapped__: outer(f(START, lam), lam))(LAM)
        implicit = grad(lambda lam, f=solve: outer(f(START, lam), lam))(LAM)
        errors.append((float((implicit - truth).norm()), float((unrolled - truth).norm())))
    assert errors[0][0] > 1e-6  # neither has converged yet
    assert errors[0][1] > 1e-6
    for before, after in zip(errors[:2], errors[1:3]):
        assert after[0] < 0.1 * before[0]
        assert after[1] < 0.3 * before[1]
    assert max(errors[-1]) < 1e-12


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 40])
def test_estimate_is_within_a_factor_of_two_of_the_error(steps):
    solve = descent(steps)
    loss, (gradient,), report = certified_grad(outer, solve)(START, LAM)
    w, truth = newton(LAM), dense_gradient(LAM)
    x = solve(START, LAM)
    torch.testing.assert_close(loss, outer(x, LAM))
    error = (gradient - truth).norm()
    assert 0.5 < report.gradient_error / error < 2
    assert 0.5 < report.solution_error / (x - w).norm() < 2
    torch.testing.assert_close(report.optimality_residual, grad(objective)(x, LAM).norm())
    torch.testing.assert_close(report.relative_error, report.gradient_error / gradient.norm())
    assert report.linear_residual < 1e-14
    kappa = torch.linalg.cond(hessian(objective)(x, LAM))
    torch.testing.assert_close(report.condition, kappa)
    assert Status(int(report.status)) is Status.CONVERGED
    # The gradient minus its estimated error is accurate to second order.
    assert (gradient - report.error[0] - truth).norm() < error**2 * 40


@pytest.mark.parametrize(("polish", "order"), [(0, 1), (1, 2), (2, 4)])
def test_polish_turns_the_order_of_the_error_from_one_to_two_to_four(polish, order):
    """The error is compared for solver errors e and e / 2."""
    w, truth = newton(LAM), dense_gradient(LAM)
    direction = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def error(e):
        solve = custom_root(grad(objective), argnums=1, solve=LU(), polish=polish)(
            lambda x, lam: w + e * direction / direction.norm()
        )
        return (grad(lambda lam: outer(solve(START, lam), lam))(LAM) - truth).norm()

    assert error(0.01) > 1e-12  # far from rounding; the next order is a part of some 0.02
    assert abs(float(torch.log2(error(0.02) / error(0.01))) - order) < 0.02 * order


def test_polish_squares_the_error_along_gradient_descent():
    truth = dense_gradient(LAM)
    errors = {}
    for polish in (0, 1):
        for steps in (5, 10, 20):
            _, (found,), _ = certified_grad(outer, descent(steps, polish=polish))(START, LAM)
            errors[polish, steps] = math.log(float((found - truth).norm()))
    for first, second in ((5, 10), (10, 20)):
        drop = {k: errors[k, first] - errors[k, second] for k in (0, 1)}
        assert 1.8 < drop[1] / drop[0] < 2.4


def test_truncated_linear_solve_is_in_the_estimate():
    truth = dense_gradient(LAM)
    estimates = []
    for k in (1, 2, 3):
        solve = descent(90, solve=CG(0.0, maxiter=k), positive_definite=True)
        _, (gradient,), report = certified_grad(outer, solve)(START, LAM)
        assert Status(int(report.status)) is Status.MAX_ITERATIONS
        assert report.linear_residual > 1e-6
        assert report.iterations == k
        assert 0.5 < report.gradient_error / (gradient - truth).norm() < 2
        estimates.append(float(report.gradient_error))
    assert estimates[0] > estimates[1] > estimates[2]


def test_report_of_a_backward_pass_and_of_transforms():
    reports: list[GradientReport] = []
    solve = descent(20, report=reports.append)
    lam = LAM.clone().requires_grad_()
    (2 * solve(START, lam)[0]).backward()
    grad(lambda lam: 2 * solve(START, lam)[0])(LAM)
    assert len(reports) == 2
    expected = certified_grad(lambda w, lam: 2 * w[0], descent(20))(START, LAM)[2]
    for report in reports:
        assert not report.gradient_error.requires_grad
        torch.testing.assert_close(report.gradient_error, expected.gradient_error)
        torch.testing.assert_close(report.error[0], expected.error[0])
    with pytest.raises(NotDifferentiableError, match="certified_grad"):
        vmap(grad(lambda lam: solve(START, lam)[0]))(LAM.expand(2, 6))


def test_report_under_vmap_is_that_of_each_entry():
    solve = descent(10, solve=Auto(1e-10, dense_limit=0), positive_definite=True)
    batch = torch.stack([LAM, LAM + 1, LAM - 1])
    losses, (gradients,), reports = vmap(certified_grad(outer, solve), (None, 0))(START, batch)
    for i, lam in enumerate(batch):
        loss, (gradient,), report = certified_grad(outer, solve)(START, lam)
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(gradients[i], gradient)
        for found, expected in zip(reports[:-1], report[:-1]):
            torch.testing.assert_close(found[i], expected)


def test_trees_argnums_keywords_and_aux():
    def equation(x, a, unused, b, *, power):
        return {"y": x["y"] ** power - a["p"] * b}

    @custom_root(equation, argnums=(3, 1), has_aux=True)
    def solve(x, a, unused, b, *, power):
        return {"y": (a["p"] * b) ** (1 / power) + 1e-3}, "aux"

    a = {"p": torch.tensor([8.0, 1.0], dtype=torch.float64), "n": torch.tensor(3)}
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    _, (over_b, over_a), report = certified_grad(
        lambda x, a, unused, b, *, power: x["y"].sum() * power, solve
    )(None, a, "text", b, power=3)
    truth = (a["p"] * b) ** (-2 / 3)
    for found, error, expected in (
        (over_b, report.error[0], a["p"] * truth),
        (over_a["p"], report.error[1]["p"], b * truth),
    ):
        assert (found - expected).abs().max() > 1e-4
        torch.testing.assert_close(found - error, expected, rtol=1e-5, atol=1e-5)
    assert over_a["n"] == 0


def test_ridge_report_is_exact():
    """On a quadratic the estimates are exact."""
    X, Y = TRAIN
    H = X.T @ X / 60

    @custom_root(lambda w, lam: H @ w - X.T @ Y / 60 + lam * w, argnums=1)
    def solve(w, lam):
        return torch.linalg.solve(H + lam * torch.eye(6).to(H), X.T @ Y / 60) + 0.3

    lam = torch.tensor(0.2, dtype=torch.float64)
    _, (gradient,), report = certified_grad(lambda w, lam: w.sum(), solve)(START, lam)
    exact = solve(START, lam) - 0.3
    A = H + lam * torch.eye(6).to(H)
    truth = -torch.linalg.solve(A, exact).sum()
    torch.testing.assert_close(gradient - truth, report.error[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(report.solution_error, torch.full((6,), 0.3).norm().double())


def test_fixed_points_and_solvers_without_a_condition_number():
    solve = custom_fixed_point(lambda x, a: x + 0.1 * (a - x**2), argnums=1, solve=BiCGSTAB(1e-12))(
        lambda x, a: a.sqrt() + 1e-3
    )
    a = torch.tensor([4.0, 9.0], dtype=torch.float64)
    _, (gradient,), report = certified_grad(lambda x, a: x.sum(), solve)(None, a)
    truth = 0.5 / a.sqrt()
    assert 0.9 < report.gradient_error / (gradient - truth).norm() < 1.1
    assert report.condition.isnan()


def test_undecorated_solver_is_refused():
    with pytest.raises(TypeError, match="decorated by custom_root"):
        certified_grad(outer, lambda w, lam: w)


TRUNCATED = {
    "neumann_2": Neumann(2, alpha=1e-3),
    "neumann_10": Neumann(10, alpha=1e-3),
    "cg": CG(1e-12, maxiter=3),
    "gmres": GMRES(1e-1, restart=3, maxiter=1),
    "lsmr": LSMR(1e-12, maxiter=2),
    "ridge": CG(1e-12, ridge=1.0),
    "diverging": Neumann(3),
    "warm": WarmStart(CG(1e-12, maxiter=3)),
    "callable": lambda matvec, b: 0.3 * b,
}


@pytest.mark.parametrize("name", sorted(TRUNCATED))
def test_error_of_a_truncated_linear_solve_is_estimated_to_second_order(name):
    n = 50
    expected = {"ridge": Status.CONVERGED, "callable": Status.CONVERGED}
    expected["diverging"] = Status.DIVERGED
    d, a = torch.logspace(0, 3, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)

    def check(offset, d):
        root = custom_root(
            lambda x, a: d * x + 0.1 * x**3 - a,
            argnums=1,
            solve=TRUNCATED[name],
            positive_definite=True,
        )
        x = torch.zeros_like(d)
        for _ in range(40):
            x = x - (d * x + 0.1 * x**3 - a) / (d + 0.3 * x**2)
        solve = root(lambda s, a: x + offset)
        _, (gradient,), report = certified_grad(lambda x, a: x.sum(), solve)(None, a)
        error = gradient - 1 / (d + 0.3 * x**2)
        # What is left is of second order in the offset, or rounding of a gradient of up to 1e9.
        left = offset**2 + 1e-15 * (1 + float(gradient.abs().max()))
        torch.testing.assert_close(report.error[0], error, rtol=0, atol=left)
        assert abs(report.gradient_error - error.norm()) < n**0.5 * left
        assert error.norm() > 0.5
        assert Status(int(report.status)) is expected.get(name, Status.MAX_ITERATIONS)

    check(0.0, d)
    check(1e-3, d)


def test_error_is_infinite_where_it_cannot_be_known():
    singular = torch.ones(3, 3, dtype=torch.float64)
    root = custom_root(lambda x, a: singular @ x - a, argnums=1, solve=CG(1e-12, maxiter=1))
    solve = root(lambda s, a: torch.zeros_like(a))
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    _, _, report = certified_grad(lambda x, a: (x * a).sum(), solve)(None, a)
    assert report.gradient_error == math.inf
