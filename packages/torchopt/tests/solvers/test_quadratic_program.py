# SPDX-License-Identifier: Apache-2.0
"""Quadratic programs: closed forms, the conditions of optimality, derivatives, batches."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from torchopt.linear_solve import LinearSolveWarning
from torchopt.solvers import (
    SolverError,
    SolverWarning,
    interior_point,
    project_simplex,
    quadratic_program,
)

GENERATOR = torch.Generator().manual_seed(3)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def problem(n=6, p=2, m=5):
    """Return a feasible problem with some active and some inactive constraints."""
    root = randn(n, n)
    A, G, inside = randn(p, n), randn(m, n), randn(n)
    h = G @ inside + torch.tensor([0.05, 0.1, 3.0, 0.02, 2.0], dtype=torch.float64)[:m]
    return root @ root.T / n + torch.eye(n).double(), 3 * randn(n), A, A @ inside, G, h


PROBLEM = problem()


def test_conditions_of_karush_kuhn_and_tucker():
    Q, c, A, b, G, h = PROBLEM
    x, nu, lam = quadratic_program(*PROBLEM)
    slack = h - G @ x
    assert 0 < int((lam > 1e-6).sum()) < 5  # some are active
    torch.testing.assert_close(Q @ x + c + A.T @ nu + G.T @ lam, torch.zeros_like(x))
    torch.testing.assert_close(A @ x, b)
    assert slack.min() > -1e-12
    assert lam.min() > -1e-12
    assert (lam * slack).abs().max() < 1e-12


def test_equality_constraints_are_one_linear_system():
    Q, c, A, b, _, _ = PROBLEM

    def closed(Q, c, A, b):
        S = (Q + Q.T) / 2
        top, bottom = torch.cat([S, A.T], 1), torch.cat([A, torch.zeros(2, 2).double()], 1)
        return torch.linalg.solve(torch.cat([top, bottom]), torch.cat([-c, b]))

    def ours(Q, c, A, b):
        x, nu, _ = quadratic_program(Q, c, A, b)
        return torch.cat([x, nu])

    torch.testing.assert_close(ours(Q, c, A, b), closed(Q, c, A, b))
    for transform in (jacrev, jacfwd):
        found = transform(ours, (0, 1, 2, 3))(Q, c, A, b)
        torch.testing.assert_close(found, jacrev(closed, (0, 1, 2, 3))(Q, c, A, b))


def test_unconstrained_is_a_solve():
    Q, c = PROBLEM[:2]
    torch.testing.assert_close(quadratic_program(Q, c).x, -torch.linalg.solve(Q, c))


def test_derivatives_of_solution_and_multipliers():
    inputs = tuple(x.clone().requires_grad_() for x in PROBLEM)
    assert gradcheck(lambda *args: tuple(quadratic_program(*args)), inputs, fast_mode=True)
    assert gradcheck(
        lambda c, h: quadratic_program(*inputs[:1], c, *inputs[2:5], h).x, inputs[1::4]
    )
    assert gradgradcheck(lambda *a: quadratic_program(*a).x, inputs, fast_mode=True)


def test_sensitivity_of_the_value_is_the_multiplier():
    """d value / dh = -lam and d value / db = -nu."""
    Q, c, A, b, G, h = PROBLEM

    def value(b, h):
        x = quadratic_program(Q, c, A, b, G, h).x
        return x @ Q @ x / 2 + c @ x

    _, nu, lam = quadratic_program(*PROBLEM)
    torch.testing.assert_close(torch.func.grad(value, (0, 1))(b, h), (-nu, -lam))


def test_projection_onto_the_simplex_is_a_program():
    y = randn(7)
    kind = {"A": torch.ones(1, 7).double(), "b": torch.ones(1).double()}
    kind.update(G=-torch.eye(7).double(), h=torch.zeros(7).double())

    def program(y):
        return quadratic_program(torch.eye(7).double(), -y, **kind).x

    torch.testing.assert_close(program(y), project_simplex(y))
    torch.testing.assert_close(jacrev(program)(y), jacrev(project_simplex)(y))


def test_linear_program_with_a_vertex_solution():
    # min -x0 - 2 x1 with x0 + x1 <= 1, x >= 0: the vertex (0, 1).
    G = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    h = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    Q, c = torch.zeros(2, 2).double(), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    x, _, lam = quadratic_program(Q, c, G=G, h=h)
    torch.testing.assert_close(x, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(lam, torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))


def test_batches_broadcast_and_equal_the_loop():
    Q, c, A, b, G, h = PROBLEM
    many = c + 0.5 * randn(4, 3, 6)
    x, nu, lam = quadratic_program(Q, many, A, b, G, h)
    assert x.shape == (4, 3, 6)
    assert nu.shape == (4, 3, 2)
    assert lam.shape == (4, 3, 5)
    for i in range(4):
        for j in range(3):
            single = quadratic_program(Q, many[i, j], A, b, G, h)
            torch.testing.assert_close((x[i, j], nu[i, j], lam[i, j]), tuple(single))
    slope = vmap(vmap(jacrev(lambda c: quadratic_program(Q, c, A, b, G, h).x)))(many)
    single = jacrev(lambda c: quadratic_program(Q, c, A, b, G, h).x)(many[2, 1])
    torch.testing.assert_close(slope[2, 1], single)
    Q = Q.clone().requires_grad_()
    quadratic_program(Q, many, A, b, G, h).x.sum().backward()
    total = sum(
        jacrev(lambda Q, c=c: quadratic_program(Q, c, A, b, G, h).x.sum())(Q.detach())
        for c in many.flatten(0, 1)
    )
    torch.testing.assert_close(Q.grad, total)


def test_float32():
    x = quadratic_program(*(t.float() for t in PROBLEM), tol=1e-4).x
    exact = quadratic_program(*PROBLEM).x
    torch.testing.assert_close(x.double(), exact, rtol=8 * torch.finfo(x.dtype).eps, atol=0)


def test_infeasible_and_unbounded_problems_are_reported():
    one = torch.ones(1, 1, dtype=torch.float64)
    contradiction = {"G": torch.cat([one, -one]), "h": torch.tensor([-1.0, -1.0]).double()}
    with pytest.raises(SolverError, match="quadratic_program: INFEASIBLE.*G x <= h"):
        quadratic_program(one, one[0], **contradiction, on_fail="raise")
    with pytest.warns(SolverWarning, match="INFEASIBLE.*unbounded"):
        quadratic_program(0 * one, one[0], G=one, h=one[0])


def test_degenerate_solution_is_reported_when_it_is_differentiated():
    # The constraint x <= 1 is active with a multiplier of zero: there is no derivative.
    one = torch.ones(1, 1, dtype=torch.float64)
    h = torch.ones(1, dtype=torch.float64)
    with pytest.warns(LinearSolveWarning, match="SINGULAR"):
        jacrev(lambda h: quadratic_program(one, -one[0], G=one, h=h).x)(h)


def test_bad_shapes_are_refused():
    Q, c, A, b, G, h = PROBLEM
    with pytest.raises(ValueError, match="both of A and b"):
        quadratic_program(Q, c, A)
    with pytest.raises(ValueError, match="Q: expected"):
        quadratic_program(Q[:3], c)
    with pytest.raises(ValueError, match="G, h: expected"):
        quadratic_program(Q, c, A, b, G, h[:2])
    with pytest.raises(ValueError, match="one real dtype"):
        quadratic_program(Q, c.float())


def test_the_interior_point_method_takes_the_steps_of_mehrotra(monkeypatch):
    """12 programs take 165 steps with the corrector and cubic centring. Without the corrector they
    take 253, with linear centring 194, and without centring 180.
    """
    steps = []
    iterate = interior_point.iterate

    def counted(*args):
        state, count = iterate(*args)
        steps.append(int(count))
        return state, count

    total = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, g=generator):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        root, A, G, inside = draw(20, 10), draw(4, 20), draw(40, 20), draw(20)
        Q = root @ root.mT / 20 + 1e-3 * torch.eye(20, dtype=torch.float64)
        h, c = G @ inside + draw(40).abs() / 2, 10 * draw(20)
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(interior_point, "iterate", counted)
            quadratic_program(Q, c, A, A @ inside, G, h, on_fail="raise")
        total += steps[0]
    assert 0 < total <= 172
