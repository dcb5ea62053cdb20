# SPDX-License-Identifier: Apache-2.0
"""Autocast applies to the functions of the caller; solves are as accurate as their arguments."""

from __future__ import annotations

import pytest
import torch

from torchopt import linear_solve as solve
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import LinearOperator, linear_solve

GENERATOR = torch.Generator().manual_seed(0)
N = 12
_ = torch.randn(N, N, generator=GENERATOR)
MATRIX = _ @ _.T / N + torch.eye(N)  # products with bfloat16 have errors of 4e-3
B = torch.randn(N, generator=GENERATOR)
EXACT = torch.linalg.solve(MATRIX.double(), B.double())
TAGS = ["positive_definite"]

SOLVERS = {
    "Auto": solve.Auto(),
    "BiCGSTAB": solve.BiCGSTAB(1e-6),
    "CG": solve.CG(1e-6),
    "Cholesky": solve.Cholesky(),
    "GMRES": solve.GMRES(1e-6),
    "LSMR": solve.LSMR(1e-6),
    "LU": solve.LU(),
    "MINRES": solve.MINRES(1e-6),
    "Nystrom": solve.CG(1e-6, M=solve.Nystrom(4)),
    "NormalCG": solve.NormalCG(1e-6),
    "QR": solve.QR(),
}


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


def elementwise(v):
    return (MATRIX * v).sum(1)


def close(found, exact):
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 2e-5, error


@pytest.mark.parametrize("name", SOLVERS)
def test_a_matrix_is_not_rounded(name):
    b = B.clone().requires_grad_()
    with autocast():
        x = linear_solve(LinearOperator.from_matrix(MATRIX, TAGS), b, SOLVERS[name]).value
        (g,) = torch.autograd.grad(x.sum(), b)
    assert x.dtype == torch.float32
    close(x.detach(), EXACT)
    close(g, torch.linalg.solve(MATRIX.double(), torch.ones(N).double()))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_function_that_is_not_rounded_has_an_accurate_solution(name):
    b = B.clone().requires_grad_()
    with autocast():
        x = SOLVERS[name](elementwise, b)
        (g,) = torch.autograd.grad(x.sum(), b)
    close(x.detach(), EXACT)
    close(g, torch.linalg.solve(MATRIX.double(), torch.ones(N).double()))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("inside", [False, True])
def test_an_implicit_gradient_has_the_precision_of_its_equation(name, inside):
    root = custom_root(
        lambda x, a: elementwise(x) - a, 1, solve=SOLVERS[name], symmetric=True, polish=1
    )(lambda start, a: torch.linalg.solve(MATRIX, a))
    a = B.clone().requires_grad_()
    with autocast():
        x = root(None, a)
        if inside:
            (g,) = torch.autograd.grad(x.sum(), a)
    if not inside:
        (g,) = torch.autograd.grad(x.sum(), a)
    close(x.detach(), EXACT)
    close(g, torch.linalg.solve(MATRIX.double(), torch.ones(N).double()))


@pytest.mark.parametrize("inside", [False, True])
def test_products_run_in_the_autocast_of_the_solve(inside):
    """Without it, products of two dtypes would raise, in the forward or in the backward pass."""
    narrow = MATRIX.bfloat16()
    seen = []

    def product(a, v):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (a @ v).float()

    b = B.clone().requires_grad_()
    with autocast():
        operator = LinearOperator.from_function(product, narrow, B, TAGS)
        x = linear_solve(operator, b, solve.CG(1e-2)).value
        forward = len(seen)
        if inside:
            (g,) = torch.autograd.grad(x.sum(), b)
    if not inside:
        (g,) = torch.autograd.grad(x.sum(), b)
    assert 0 < forward < len(seen)
    assert all(seen)
    inverse = torch.linalg.inv(MATRIX.double())
    ones = torch.ones(N).double()
    for found, right in ((x.detach(), B.double()), (g, ones)):
        exact = inverse @ right
        # The residual, and the matrix, the vectors and the products rounded to 8 bits.
        rest = 1e-2 * right.norm() + 3 * 2**-9 * MATRIX.norm() * exact.norm()
        bound = torch.linalg.matrix_norm(inverse, 2) * rest
        assert (found.double() - exact).norm() <= bound < 0.1 * exact.norm()


def test_a_matrix_of_another_dtype_is_converted():
    a = MATRIX.bfloat16().requires_grad_()
    with autocast():
        x = linear_solve(a, B, solve.LU()).value
    close(x.detach(), torch.linalg.solve(a.detach().double(), B.double()))
    (g,) = torch.autograd.grad(x.sum(), a)
    assert g.dtype == torch.bfloat16
