# SPDX-License-Identifier: Apache-2.0
"""Solvers whose derivatives come from another engine, against closed forms."""

from __future__ import annotations

import pytest
import torch

from torchopt import solvers
from torchopt.diff import Explicit, Implicit, ZeroOrder
from torchopt.diff.zero_order import Gaussian
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import CG, LU

GENERATOR = torch.Generator().manual_seed(1)
M = torch.randn(3, 3, dtype=torch.float64, generator=GENERATOR)
H = M @ M.mT / 3 + torch.eye(3, dtype=torch.float64)
THETA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
EXACT = torch.linalg.solve(H, C)


def quadratic(x, theta):
    return 0.5 * x @ (H @ x) - x @ theta


ROOT = torch.linalg.cholesky(H)


def residuals(x, theta):
    """Half of the sum of their squares is the quadratic plus a constant."""
    return ROOT.mT @ x - torch.linalg.solve_triangular(ROOT, theta[:, None], upper=False)[:, 0]


def fixed_point(x, theta):
    return x - 0.2 * (H @ x - theta)


def equation(x, theta):
    return H @ x - theta


def sampling(n=2000):
    generator = torch.Generator().manual_seed(0)
    return ZeroOrder(Gaussian(), "antithetic", num_samples=n, sigma=0.1, generator=generator)


CASES = {
    "gradient descent": (solvers.GradientDescent, quadratic, {"lr": 0.2}),
    "line search": (solvers.GradientDescent, quadratic, {}),
    "LBFGS": (solvers.LBFGS, quadratic, {}),
    "NewtonCG": (solvers.NewtonCG, quadratic, {}),
    "FixedPointIteration": (solvers.FixedPointIteration, fixed_point, {}),
    "Anderson": (solvers.Anderson, fixed_point, {}),
    "Broyden": (solvers.Broyden, fixed_point, {}),
    "Newton": (solvers.Newton, equation, {}),
    "GaussNewton": (solvers.GaussNewton, residuals, {}),
    "LevenbergMarquardt": (solvers.LevenbergMarquardt, residuals, {}),
    "Levenberg-Marquardt by products": (
        solvers.LevenbergMarquardt,
        residuals,
        {"step_solver": CG(rtol=1e-10)},
    ),
    "Dogleg": (solvers.Dogleg, residuals, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("adjoint", "tolerance"),
    [
        (None, 1e-8),
        (Implicit(), 1e-8),
        (Implicit(solve=LU(), polish=1), 1e-8),
        (Explicit(), 1e-3),
    ],
)
def test_the_engine_gives_the_closed_form(case, adjoint, tolerance):
    kind, function, options = CASES[case]
    theta = THETA.clone().requires_grad_()
    solver = kind(tol=1e-12, on_fail="ignore", adjoint=adjoint, **options)
    x = solver(function, torch.zeros(3, dtype=torch.float64), theta)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(H, THETA))
    (found,) = torch.autograd.grad(x @ C, theta)
    torch.testing.assert_close(found, EXACT, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["line search", "Anderson", "Newton"])
def test_estimates_are_within_the_error_of_their_samples(case):
    kind, function, options = CASES[case]
    theta = THETA.clone().requires_grad_()
    solver = kind(tol=1e-10, on_fail="ignore", adjoint=sampling(), **options)
    x = solver(function, torch.zeros(3, dtype=torch.float64), theta)
    (found,) = torch.autograd.grad(x @ C, theta)
    deviation = (((EXACT @ EXACT) + EXACT**2) / 2000).sqrt()
    assert ((found - EXACT).abs() < 4 * deviation).all()
    assert (found - EXACT).norm() > 0


def test_iterations_without_a_derivative_are_refused():
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    solver = solvers.Bisection(upper=4.0, adjoint=Explicit())
    with pytest.raises(NotDifferentiableError, match="without a graph"):
        solver(lambda x, theta: x**3 - theta, torch.zeros((), dtype=torch.float64), theta)


@pytest.mark.parametrize("case", CASES)
def test_a_solution_whose_derivative_is_not_wanted_needs_no_graph(case):
    kind, function, options = CASES[case]
    solver = kind(tol=1e-10, on_fail="ignore", adjoint=Explicit(), **options)
    start, exact = torch.zeros(3, dtype=torch.float64), torch.linalg.solve(H, THETA)
    torch.testing.assert_close(solver(function, start, THETA), exact)
    with torch.no_grad():
        found = solver(function, start, THETA.clone().requires_grad_())
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("case", CASES)
def test_a_run_inside_a_transform_that_differentiates_it_is_refused(case):
    kind, function, options = CASES[case]
    solver = kind(tol=1e-10, on_fail="ignore", **options)
    start = torch.zeros(3, dtype=torch.float64)

    def nested(x, tree):
        return function(x, tree["theta"])

    def argument(theta):
        return solver.run(nested, start, {"theta": theta}).value @ C

    def hidden(theta):
        return solver.run(lambda x: function(x, theta), start).value @ C

    match = rf"{kind.__name__}.run: expected tensors without a derivative"
    for run in (argument, hidden):
        with pytest.raises(NotDifferentiableError, match=match):
            torch.func.grad(run)(THETA)
        with pytest.raises(NotDifferentiableError, match=match):
            torch.func.vmap(torch.func.grad(run))(THETA[None])
        with pytest.raises(NotDifferentiableError, match=match):
            torch.func.jvp(run, (THETA,), (C,))
    batch = torch.func.vmap(lambda theta: solver.run(function, start, theta).value)(THETA[None])
    torch.testing.assert_close(batch[0], torch.linalg.solve(H, THETA))
    scaled = torch.func.grad(lambda s: s * (solver.run(function, start, THETA).value @ C))
    torch.testing.assert_close(scaled(torch.tensor(2.0).double()), EXACT @ THETA)
    kept = torch.func.grad(lambda theta: theta @ solver.run(function, start, theta.detach()).value)
    torch.testing.assert_close(kept(THETA), torch.linalg.solve(H, THETA))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adjoint": 3}, TypeError, "expected None, Explicit"),
        ({"adjoint": Explicit(keep=3)}, ValueError, "its defaults"),
        ({"adjoint": Implicit(), "linear_solve": CG()}, ValueError, "its own linear solver"),
    ],
)
def test_an_invalid_adjoint_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        solvers.LBFGS(**options)


def soft(v, step, theta):
    return solvers.prox_l1(v, step * theta[2].abs() / 10)


def simplex(v, theta):
    return solvers.project_simplex(v, theta[2])


COMPOSITE = {
    "proximal": (solvers.ProximalGradient, {"prox": soft}),
    "projected": (solvers.ProjectedGradient, {"projection": simplex}),
}


@pytest.mark.parametrize("lr", [None, 0.2])
@pytest.mark.parametrize("case", COMPOSITE)
def test_composite_solvers_take_every_engine(case, lr):
    kind, options = COMPOSITE[case]

    def gradient(adjoint):
        theta = THETA.clone().requires_grad_()
        solver = kind(tol=1e-12, on_fail="ignore", lr=lr, adjoint=adjoint, **options)
        x = solver(quadratic, torch.zeros(3, dtype=torch.float64), theta)
        return x.detach(), torch.autograd.grad(x @ C, theta)[0]

    solution, exact = gradient(None)
    value, through_steps = gradient(Explicit())
    torch.testing.assert_close(value, solution)
    torch.testing.assert_close(through_steps, exact, rtol=1e-6, atol=1e-6)
    value, sampled = gradient(sampling(4000))
    torch.testing.assert_close(value, solution)
    # The solution is piecewise linear; with steps of 0.1 few samples reach another piece.
    deviation = (((exact @ exact) + exact**2) / 4000).sqrt()
    assert ((sampled - exact).abs() < 4 * deviation).all()
