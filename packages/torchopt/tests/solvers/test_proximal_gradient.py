# SPDX-License-Identifier: Apache-2.0
"""Constrained and non-smooth fits against their closed forms on the support."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from torchopt.solvers import (
    ProjectedGradient,
    ProximalGradient,
    SolverWarning,
    project_box,
    project_l1_ball,
    project_l2_ball,
    project_non_negative,
    project_simplex,
    prox_elastic_net,
    prox_l1,
    quadratic_program,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(30, generator=GENERATOR, dtype=torch.float64)
START = torch.zeros(6, dtype=torch.float64)
LAM = torch.tensor(0.12, dtype=torch.float64)
EYE = torch.eye(6, dtype=torch.float64)


def fit(w, *args):
    return ((X @ w - Y) ** 2).sum() / 60


@pytest.mark.parametrize("lr", [None, 0.4])
def test_lasso_on_its_support(lr):
    solver = ProximalGradient(
        tol=1e-12, maxiter=5000, lr=lr, prox=lambda v, step, lam: prox_l1(v, step * lam)
    )
    w = solver(fit, START, LAM)
    S = w != 0
    assert 0 < int(S.sum()) < 6
    # X_Sᵀ (X_S w_S - y) / n = -lam sign(w_S)
    A = X[:, S].T @ X[:, S] / 30
    torch.testing.assert_close(w[S], torch.linalg.solve(A, X[:, S].T @ Y / 30 - LAM * w[S].sign()))
    expected = torch.zeros_like(w)
    expected[S] = -torch.linalg.solve(A, w[S].sign())
    for transform in (jacrev, jacfwd):
        found = transform(lambda lam: solver(fit, START, lam))(LAM)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    batch = torch.stack([LAM, LAM / 2, 1.2 * LAM])
    each = torch.stack([solver(fit, START, lam) for lam in batch])
    torch.testing.assert_close(vmap(lambda lam: solver(fit, START, lam))(batch), each)


def test_elastic_net_on_its_support():
    l2 = torch.tensor(0.3, dtype=torch.float64)
    solver = ProximalGradient(
        tol=1e-12,
        maxiter=5000,
        prox=lambda v, step, l1, l2: prox_elastic_net(v, step * l1, step * l2),
    )
    w = solver(fit, START, LAM, l2)
    S = w != 0
    assert 0 < int(S.sum()) < 6
    A = X[:, S].T @ X[:, S] / 30 + l2 * EYE[: int(S.sum()), : int(S.sum())]
    over_l1, over_l2 = torch.zeros_like(w), torch.zeros_like(w)
    over_l1[S] = -torch.linalg.solve(A, w[S].sign())
    over_l2[S] = -torch.linalg.solve(A, w[S])
    found = jacrev(lambda l1, l2: solver(fit, START, l1, l2), (0, 1))(LAM, l2)
    torch.testing.assert_close(found, (over_l1, over_l2), rtol=1e-8, atol=1e-8)


# For each set: the projection, and its constraint as G x <= h, A x = b of a quadratic program.
RADIUS = torch.tensor(0.3, dtype=torch.float64)
ONE = torch.ones(1, 6, dtype=torch.float64)
CONSTRAINTS = {
    "box": (
        lambda v, y, r: project_box(v, -r / 3, r),
        lambda r: {"G": torch.cat([EYE, -EYE]), "h": torch.cat([r.expand(6), r.expand(6) / 3])},
    ),
    "non_negative": (
        lambda v, y, r: project_non_negative(v),
        lambda r: {"G": -EYE, "h": 0 * r.expand(6)},
    ),
    "simplex": (
        lambda v, y, r: project_simplex(v, r),
        lambda r: {"G": -EYE, "h": 0 * r.expand(6), "A": ONE, "b": r.reshape(1)},
    ),
}


@pytest.mark.parametrize("name", sorted(CONSTRAINTS))
def test_constrained_least_squares_is_a_quadratic_program(name):
    """Two independent methods give the same solution and the same derivatives."""
    projection, constraints = CONSTRAINTS[name]
    solver = ProjectedGradient(tol=1e-12, maxiter=5000, projection=projection)

    def loss(w, y, r):
        return ((X @ w - y) ** 2).sum() / 60

    def projected(y, r):
        return solver(loss, START, y, r)

    def program(y, r):
        return quadratic_program(X.T @ X / 30, -X.T @ y / 30, **constraints(r)).x

    torch.testing.assert_close(projected(Y, RADIUS), program(Y, RADIUS), rtol=1e-9, atol=1e-9)
    expected = jacrev(program, (0, 1) if name != "non_negative" else 0)(Y, RADIUS)
    found = jacrev(projected, (0, 1) if name != "non_negative" else 0)(Y, RADIUS)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("project", [project_l1_ball, project_l2_ball])
def test_ball_constraint_gradient_is_a_finite_difference(project):
    solver = ProjectedGradient(tol=1e-13, maxiter=5000, projection=project)
    r = RADIUS.clone()
    norm = torch.linalg.vector_norm(solver(fit, START, r), 1 if project is project_l1_ball else 2)
    torch.testing.assert_close(norm, r)  # the constraint is active
    h = 1e-6
    expected = (solver(fit, START, r + h) - solver(fit, START, r - h)) / (2 * h)
    found = jacrev(lambda r: solver(fit, START, r))(r)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_inactive_constraint_has_no_derivative_in_its_radius():
    solver = ProjectedGradient(tol=1e-12, projection=project_l2_ball)
    r = torch.tensor(100.0, dtype=torch.float64)
    least_squares = torch.linalg.lstsq(X, Y).solution
    torch.testing.assert_close(solver(fit, START, r), least_squares, rtol=1e-9, atol=1e-9)
    # The radius is used, so this zero is the true derivative.
    assert not grad(lambda r: solver(fit, START, r).sum())(r)


def test_failures_are_reported():
    with pytest.warns(SolverWarning, match="ProjectedGradient.*MAX_ITERATIONS"):
        ProjectedGradient(maxiter=2, projection=project_l2_ball)(fit, START, RADIUS)
    with pytest.raises(TypeError, match="prox: expected a function"):
        ProximalGradient()
    with pytest.raises(TypeError, match="projection: expected a function"):
        ProjectedGradient()
    with pytest.raises(ValueError, match="value of T must have the structure"):
        ProximalGradient(prox=lambda v, step, lam: v[:2])(fit, START, LAM)
