# SPDX-License-Identifier: Apache-2.0
"""Projections and proximal operators against what defines them, and their exact Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from torchopt.solvers import (
    project_box,
    project_l1_ball,
    project_l2_ball,
    project_non_negative,
    project_simplex,
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_l2_squared,
)

GENERATOR = torch.Generator().manual_seed(1)
POINTS = 2 * torch.randn(6, 7, generator=GENERATOR, dtype=torch.float64)
RADIUS = torch.tensor(1.3, dtype=torch.float64)

PROJECTIONS = {
    "box": (lambda x, r: project_box(x, -r, r / 2), lambda z, r: ((z >= -r) & (z <= r / 2)).all()),
    "non_negative": (lambda x, r: project_non_negative(x) + 0 * r, lambda z, r: (z >= 0).all()),
    "simplex": (project_simplex, lambda z, r: (z >= 0).all() & ((z.sum() - r).abs() < 1e-12)),
    "l1_ball": (project_l1_ball, lambda z, r: z.abs().sum() <= r + 1e-12),
    "l2_ball": (project_l2_ball, lambda z, r: z.norm() <= r + 1e-12),
}
PROXES = {
    "l1": (prox_l1, lambda u, w: w * u.abs().sum()),
    "l2_squared": (prox_l2_squared, lambda u, w: w / 2 * (u * u).sum()),
    "elastic_net": (
        lambda x, w: prox_elastic_net(x, w, 2 * w),
        lambda u, w: w * u.abs().sum() + w * (u * u).sum(),
    ),
    "group_lasso": (prox_group_lasso, lambda u, w: w * u.norm()),
}
ALL = {**PROJECTIONS, **PROXES}


@pytest.mark.parametrize("name", sorted(PROJECTIONS))
def test_projection_is_feasible_nearest_and_idempotent(name):
    project, feasible = PROJECTIONS[name]
    others = project(3 * torch.randn(200, 7, generator=GENERATOR, dtype=torch.float64), RADIUS)
    for x in POINTS:
        z = project(x, RADIUS)
        assert feasible(z, RADIUS)
        # The variational inequality that defines the nearest point of a convex set.
        assert ((others - z) @ (x - z)).max() <= 1e-12
        torch.testing.assert_close(project(z, RADIUS), z)


@pytest.mark.parametrize("name", sorted(PROXES))
def test_prox_minimizes_its_objective(name):
    prox, penalty = PROXES[name]
    weight = torch.tensor(0.7, dtype=torch.float64)
    for x in (*POINTS, 0.01 * POINTS[0]):
        u = prox(x, weight)

        def objective(v, x=x):
            return 0.5 * ((v - x) ** 2).sum() + penalty(v, weight)

        for scale in (1.0, 1e-2, 1e-4):
            for direction in torch.randn(20, 7, generator=GENERATOR, dtype=torch.float64):
                assert objective(u) <= objective(u + scale * direction) + 1e-14


@pytest.mark.parametrize("name", sorted(ALL))
def test_derivatives_in_the_point_and_in_the_radius(name):
    f = ALL[name][0]
    inputs = (POINTS.clone().requires_grad_(), RADIUS.clone().requires_grad_())
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("name", sorted(ALL))
def test_batch_dimensions_are_vmap(name):
    f = ALL[name][0]
    torch.testing.assert_close(f(POINTS, RADIUS), vmap(f, (0, None))(POINTS, RADIUS))
    jacobians = vmap(jacrev(f), (0, None))(POINTS, RADIUS)
    for x, jacobian in zip(POINTS, jacobians):
        torch.testing.assert_close(jacfwd(f)(x, RADIUS), jacobian)


def test_closed_forms_of_the_jacobians():
    x = torch.tensor([0.5, 1.0, -1.0, 0.2], dtype=torch.float64)
    support = (project_simplex(x) > 0).double()
    expected = torch.diag(support) - torch.outer(support, support) / support.sum()
    torch.testing.assert_close(jacrev(project_simplex)(x), expected)
    norm = x.norm()
    expected = (torch.eye(4) - torch.outer(x, x) / norm**2).double() / norm
    torch.testing.assert_close(jacrev(project_l2_ball)(x), expected)
    for inside in (0 * x, x / 10):
        for f in (project_l1_ball, project_l2_ball):
            torch.testing.assert_close(jacrev(f)(inside), torch.eye(4, dtype=torch.float64))
        assert not jacrev(prox_group_lasso)(inside).any()


def test_radius_for_each_entry():
    radii = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    for f in (project_simplex, project_l1_ball, project_l2_ball, prox_group_lasso):
        expected = torch.stack([f(x, r) for x, r in zip(POINTS, radii)])
        torch.testing.assert_close(f(POINTS, radii), expected)


def test_a_simplex_of_size_zero_is_the_origin():
    x = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for f in (project_simplex, project_l1_ball):
        assert torch.equal(f(x, 0.0), torch.zeros_like(x))
        assert torch.equal(
            torch.func.jacrev(lambda v, f=f: f(v, 0.0))(x[0]),
            torch.zeros(3, 3, dtype=torch.float64),
        )
    size = torch.zeros((), dtype=torch.float64)
    slope = torch.func.jacrev(project_simplex, argnums=1)(x[0], size)
    assert torch.equal(slope, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(ALL))
def test_integers_have_the_nearest_point_of_their_values(name):
    f = ALL[name][0]
    points = torch.tensor([[3, -4, 0], [1, 0, -2], [0, 0, 0]])
    for radius in (0.7, torch.tensor(1.3)):
        expected = f(points.double(), torch.as_tensor(radius).double())
        torch.testing.assert_close(f(points, radius).double(), expected, rtol=1e-6, atol=1e-7)


def test_a_box_of_integers_keeps_integers():
    points = torch.tensor([-3, 1, 5])
    assert project_box(points, 0, torch.tensor(2)).tolist() == [0, 1, 2]
    assert project_box(points, 0, 2).dtype is torch.int64
    assert project_non_negative(points).tolist() == [0, 1, 5]
    half = torch.tensor(0.5, dtype=torch.float64)
    for found in (project_box(points, half), project_box(points, 0, 2.5)):
        assert found.is_floating_point()
    assert project_box(points, half).tolist() == [0.5, 1.0, 5.0]
    assert project_box(points.double(), 0, 2).tolist() == [0.0, 1.0, 2.0]
