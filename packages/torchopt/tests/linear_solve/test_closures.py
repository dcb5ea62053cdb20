# SPDX-License-Identifier: Apache-2.0
"""Solvers called with a closure, as in the published package."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchopt.errors import NotDifferentiableError
from torchopt.linalg import cg, ns, ns_inv
from torchopt.linalg.utils import cat_shapes, normalize_matvec
from torchopt.linear_solve import (
    LU,
    LinearOperator,
    linear_solve,
    solve_cg,
    solve_inv,
    solve_normal_cg,
)
from torchopt.linear_solve.utils import (
    make_normal_matvec,
    make_ridge_matvec,
    make_rmatvec,
    materialize_matvec,
)

A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
B = torch.tensor([1.0, 2.0], dtype=torch.float64)
SOLVERS = {
    "cg": lambda: solve_cg(rtol=1e-13),
    "normal_cg": lambda: solve_normal_cg(rtol=1e-13),
    "inv": lambda: solve_inv(),
    "neumann": lambda: solve_inv(ns=True, maxiter=40, alpha=0.28),
}


@pytest.fixture(params=SOLVERS.values(), ids=SOLVERS.keys())
def solver(request):
    return request.param()


def test_derivatives_reach_the_tensors_in_the_closure(solver):
    def f(M, b):
        return solver(lambda v: ((M + M.T) / 2) @ v, b)

    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


def test_coupled_leaves(solver):
    def matvec(v):
        return {"w": 2 * v["w"] + v["b"], "b": v["w"].sum() + 3 * v["b"]}

    ones = {"w": torch.ones(1, 1, dtype=torch.float64), "b": torch.ones((), dtype=torch.float64)}
    x = solver(matvec, ones)
    assert x["w"].shape == (1, 1)
    assert x["b"].shape == ()
    torch.testing.assert_close(
        torch.cat([x["w"].reshape(1), x["b"].reshape(1)]),
        torch.tensor([0.4, 0.2], dtype=torch.float64),
    )


def test_gradient_from_outside_a_vmap_over_a_closure_is_refused():
    def total(M):
        return torch.func.vmap(lambda M: solve_cg()(lambda v: M @ v, B))(M).sum()

    with pytest.raises(NotDifferentiableError, match="LinearOperator.from_function"):
        torch.func.grad(total)(A.expand(2, 2, 2))


def test_nested_transforms_through_a_closure_are_refused():
    solve = lambda M: solve_cg()(lambda v: M @ v, B)  # noqa: E731
    for inner in (torch.func.jacfwd, torch.func.jacrev):
        for outer in (torch.func.jacfwd, torch.func.jacrev):
            with pytest.raises(NotDifferentiableError, match="closure"):
                outer(inner(solve))(A)


def test_third_derivative_in_the_closure_is_refused_and_works_in_the_explicit_solve():
    def third(f):
        a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(f(a), a, create_graph=True)
        (second,) = torch.autograd.grad(first, a, create_graph=True)
        torch.testing.assert_close(second.detach(), torch.tensor(0.25, dtype=torch.float64))
        return torch.autograd.grad(second, a)[0]

    one = torch.ones((), dtype=torch.float64)
    for make in SOLVERS.values():
        solver = make()
        with pytest.raises(NotDifferentiableError, match="derivative 3.*from_function"):
            third(lambda a, solver=solver: solver(lambda v: a * v, one))

    def explicit(a):
        operator = LinearOperator.from_function(lambda a, v: a * v, a, one)
        return linear_solve(operator, one, LU()).value

    torch.testing.assert_close(third(explicit), torch.tensor(-6 / 16, dtype=torch.float64))


def test_any_derivative_in_b_of_a_constant_closure():
    def f(b):
        return solve_cg(rtol=1e-14)(lambda v: 4 * v, b) ** 4

    b = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = f(b)
    for _ in range(4):
        (y,) = torch.autograd.grad(y, b, create_graph=True)
    torch.testing.assert_close(y.detach(), torch.tensor(24 / 256, dtype=torch.float64))
    nested = torch.func.grad(torch.func.jacfwd(torch.func.jacrev(torch.func.grad(f))))
    torch.testing.assert_close(nested(b.detach()), torch.tensor(24 / 256, dtype=torch.float64))
    batch = torch.tensor([1.0, 2.0], dtype=torch.float64)
    around = torch.func.grad(lambda b: torch.func.vmap(f)(b).sum())(batch)
    torch.testing.assert_close(around, 4 * batch**3 / 256)


def test_gradient_inside_a_vmap_over_a_closure():
    batch = torch.stack([A, 2 * A])
    found = torch.func.vmap(torch.func.grad(lambda M: LU()(lambda v: M @ v, B).sum()))(batch)
    expected = torch.func.vmap(torch.func.grad(lambda M: torch.linalg.solve(M, B).sum()))(batch)
    torch.testing.assert_close(found, expected)


def test_a_batch_without_entries_is_refused(solver):
    none = torch.zeros(0, 2, 2, dtype=torch.float64)
    calls = (
        lambda: torch.func.vmap(lambda b: solver(lambda v: A @ v, b))(none[..., 0]),
        lambda: torch.func.vmap(lambda M: solver(lambda v: M @ v, B))(none),
        lambda: torch.func.vmap(torch.func.grad(lambda M: solver(lambda v: M @ v, B).sum()))(none),
    )
    for call in calls:
        with pytest.raises(ValueError, match="batch of at least one entry"):
            call()


def test_linalg_cg_on_matrices_trees_and_callables():
    expected = torch.linalg.solve(A, B)
    torch.testing.assert_close(cg(A, B, rtol=1e-12), expected)
    torch.testing.assert_close(
        cg(lambda v: A @ v, B, torch.ones_like(B), M=torch.inverse(A), rtol=1e-12), expected
    )
    x = cg([A, 2 * A], [B, B], rtol=1e-12)
    torch.testing.assert_close(x, [expected, expected / 2])


def test_linalg_cg_is_differentiable_in_the_matrix():
    inputs = (A.clone().requires_grad_(), B.clone().requires_grad_())
    assert gradcheck(lambda A, b: cg((A + A.T) / 2, b, rtol=1e-13), inputs)


def test_linalg_errors():
    with pytest.raises(ValueError, match="Tensors in x0 and b must have matching shapes"):
        cg(A, B, torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="must be a square matrix, but has shape"):
        cg(torch.ones(2, 3), B)
    with pytest.raises(ValueError, match="leaves"):
        cg([A], [B, B])


def test_neumann_series_and_inverse():
    torch.testing.assert_close(ns(A, B, maxiter=200, alpha=0.3), torch.linalg.solve(A, B))
    torch.testing.assert_close(ns_inv(A, 200, alpha=0.3), torch.inverse(A))
    small = torch.eye(2, dtype=torch.float64) - 0.1 * A
    power = sum(
        torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) - small, k) for k in range(3)
    )
    torch.testing.assert_close(ns_inv(small, 3), power)
    torch.testing.assert_close(ns(small, B, 2), power @ B)


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_the_derivatives_of_a_series_are_those_of_its_terms(alpha):
    small = torch.eye(2, dtype=torch.float64) - 0.1 * A

    def by_hand(matrix, b, alpha):
        step = torch.eye(2, dtype=torch.float64) - alpha * matrix
        return alpha * (b + step @ b + step @ (step @ b))

    inputs = tuple(
        torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_() for x in (small, B, alpha)
    )
    for series in (
        lambda matrix, b, alpha: ns(matrix, b, 2, alpha=alpha),
        lambda matrix, b, alpha: ns(lambda v: matrix @ v, b, 2, alpha=alpha),
    ):
        torch.testing.assert_close(series(*inputs), by_hand(*inputs))
        assert gradcheck(series, inputs, check_forward_ad=True)
        assert gradgradcheck(series, inputs)
    tree = ns([small, small], [B, 2 * B], 2, alpha=alpha)
    torch.testing.assert_close(tree, [by_hand(small, x, alpha) for x in (B, 2 * B)])


def test_products():
    M = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(make_rmatvec(lambda v: M @ v, B)(B), M.T @ B)
    torch.testing.assert_close(make_normal_matvec(lambda v: M @ v)(B), M.T @ M @ B)
    torch.testing.assert_close(make_ridge_matvec(lambda v: M @ v, 0.5)(B), M @ B + 0.5 * B)
    dense, flat, ravel, unravel = materialize_matvec(lambda v: M @ v, B)
    torch.testing.assert_close(dense, M)
    torch.testing.assert_close(unravel(flat(ravel(B))), M @ B)
    assert cat_shapes((M, B)) == (2, 2, 2)
    torch.testing.assert_close(normalize_matvec([M, A])([B, B]), [M @ B, A @ B])
