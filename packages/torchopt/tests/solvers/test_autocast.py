# SPDX-License-Identifier: Apache-2.0
"""Under autocast, solvers are as accurate as the functions that they are given."""

from __future__ import annotations

import pytest
import torch

from torchopt import solvers

GENERATOR = torch.Generator().manual_seed(1)
M = torch.randn(3, 3, generator=GENERATOR)
H = M @ M.mT / 3 + torch.eye(3)
THETA = torch.tensor([0.5, -1.0, 2.0])
C = torch.tensor([1.0, -2.0, 0.5])
WIDE = H.double()


def product(x):
    return (H * x).sum(1)  # autocast does not change it


def quadratic(x, theta):
    return (x * (0.5 * product(x) - theta)).sum()


def fixed_point(x, theta):
    return x - 0.2 * (product(x) - theta)


def equation(x, theta):
    return product(x) - theta


CASES = {
    "GradientDescent": (solvers.GradientDescent(), quadratic),
    "LBFGS": (solvers.LBFGS(), quadratic),
    "NewtonCG": (solvers.NewtonCG(), quadratic),
    "FixedPointIteration": (solvers.FixedPointIteration(), fixed_point),
    "Anderson": (solvers.Anderson(), fixed_point),
    "Broyden": (solvers.Broyden(), fixed_point),
    "Newton": (solvers.Newton(), equation),
    "GaussNewton": (solvers.GaussNewton(), equation),
    "LevenbergMarquardt": (solvers.LevenbergMarquardt(), equation),
    "Dogleg": (solvers.Dogleg(), equation),
    "ProximalGradient": (solvers.ProximalGradient(prox=lambda v, step, theta: v), quadratic),
    "ProjectedGradient": (solvers.ProjectedGradient(projection=lambda v, theta: v), quadratic),
}


@pytest.mark.parametrize("name", CASES)
def test_solutions_and_derivatives_are_accurate(name):
    solver, function = CASES[name]
    theta = THETA.clone().requires_grad_()
    seen = []

    def seeing(x, theta):
        seen.append(torch.is_autocast_enabled("cpu"))
        return function(x, theta)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = solver._with({"tol": 1e-5})(seeing, torch.zeros(3), theta)
        forward = len(seen)
        (g,) = torch.autograd.grad((x * C).sum(), theta)
    assert 0 < forward < len(seen)  # the backward pass calls the function as well
    assert all(seen)
    for found, right in ((x, THETA), (g, C)):
        exact = torch.linalg.solve(WIDE, right.double())
        torch.testing.assert_close(found.detach().double(), exact, rtol=1e-4, atol=1e-4)


def test_a_quadratic_program_has_the_derivatives_of_float32():
    G, h = torch.tensor([[1.3, 0.7, 0.3]]), torch.tensor([0.25])

    def derivatives(*, enabled):
        given = [x.clone().requires_grad_() for x in (H, -THETA, G, h)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            x = solvers.quadratic_program(given[0], given[1], G=given[2], h=given[3]).x
            return torch.autograd.grad((x * C).sum(), given)

    torch.testing.assert_close(
        derivatives(enabled=True), derivatives(enabled=False), rtol=1e-5, atol=1e-5
    )
