# SPDX-License-Identifier: Apache-2.0
"""Every solver on a table of systems: values, derivatives, batches, failures."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchopt.linear_solve import (
    CG,
    GMRES,
    LU,
    MINRES,
    QR,
    Auto,
    BiCGSTAB,
    Cholesky,
    Diagonal,
    Jacobi,
    LinearOperator,
    LinearSolveError,
    LinearSolveWarning,
    Neumann,
    NormalCG,
    Status,
    linear_solve,
)

N = 5
SPD, SYMMETRIC, DIAGONAL = ("positive_definite",), ("symmetric",), ("diagonal",)


def matrix(tags, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(n, n, generator=generator, dtype=dtype)
    if tags == SPD:
        return g @ g.mH / n + torch.eye(n, dtype=dtype)
    if tags == SYMMETRIC:
        return g + g.mH
    if tags == DIAGONAL:
        return torch.diag(torch.linspace(-1, 2, n, dtype=torch.float64).to(dtype))
    return g + 3 * torch.eye(n, dtype=dtype)


def vector(dtype=torch.float64, n=N):
    return torch.randn(n, generator=torch.Generator().manual_seed(4), dtype=dtype)


SOLVERS = {
    "cg": (CG(1e-13), SPD),
    "cg_jacobi": (CG(1e-13, M=Jacobi()), SPD),
    "cg_fixed_iterations": (CG(1e-13, maxiter=12, check_every=0), SPD),
    "normal_cg": (NormalCG(1e-13), ()),
    "gmres": (GMRES(1e-12), ()),
    "gmres_restarted": (GMRES(1e-12, restart=3, M=Jacobi()), ()),
    "bicgstab": (BiCGSTAB(1e-12), ()),
    "minres": (MINRES(1e-12), SYMMETRIC),
    "minres_preconditioned": (
        MINRES(1e-12, M=Jacobi(torch.linspace(1, 2, N, dtype=torch.float64))),
        SYMMETRIC,
    ),
    "lu": (LU(), ()),
    "lu_one_by_one": (LU(vectorize=False), ()),
    "qr": (QR(), ()),
    "cholesky": (Cholesky(), SPD),
    "diagonal": (Diagonal(), DIAGONAL),
    "neumann": (Neumann(300, alpha=0.2), SPD),
    "auto": (Auto(), ()),
    "auto_iterative": (Auto(1e-13, dense_limit=0), ()),
    "auto_symmetric": (Auto(1e-13, dense_limit=0), SYMMETRIC),
    "auto_spd": (Auto(1e-13, dense_limit=0), SPD),
}


@pytest.fixture(params=SOLVERS.values(), ids=SOLVERS.keys())
def case(request):
    return request.param


def solve(solver, tags, A, b):
    """Solve with the part of A that has the tags, so that every A is allowed."""
    if "diagonal" in tags:
        A = torch.diag(A.diagonal())
    elif tags:
        A = (A + A.mH) / 2
    return linear_solve(LinearOperator.from_matrix(A, tags), b, solver).value


def test_solution_of_the_system(case):
    solver, tags = case
    A, b = matrix(tags), vector()
    solution = linear_solve(LinearOperator.from_matrix(A, tags), b, solver)
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, b), rtol=1e-10, atol=1e-10)
    assert Status(int(solution.status)) is Status.CONVERGED
    assert solution.stats.residual_norm <= 1e-10 * solution.stats.rhs_norm


def test_derivatives_to_second_order(case):
    solver, tags = case

    def f(A, b):
        return solve(solver, tags, A, b)

    inputs = (matrix(tags).requires_grad_(), vector().requires_grad_())
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_nested_transforms_agree_with_torch_solve(outer, inner):
    A, b = matrix(()), vector()

    def ours(A):
        return solve(LU(), (), A, b).pow(2).sum()

    def theirs(A):
        return torch.linalg.solve(A, b).pow(2).sum()

    torch.testing.assert_close(outer(inner(ours))(A), torch.func.hessian(theirs)(A))


def test_batch_under_vmap(case):
    solver, tags = case
    scales = torch.tensor([1.0, 1.2, 0.7], dtype=torch.float64)
    A, b = matrix(tags) * scales[:, None, None], vector() * scales.flip(0)[:, None] + 1
    found = torch.func.vmap(lambda A, b: solve(solver, tags, A, b))(A, b)
    torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


def test_gradient_around_vmap_is_that_of_each_entry(case):
    solver, tags = case
    A, b = matrix(tags).expand(3, N, N), torch.stack([vector(), 2 * vector(), vector() + 1])

    def total(A, b):
        return torch.func.vmap(lambda A, b: solve(solver, tags, A, b))(A, b).pow(2).sum()

    def single(A, b):
        return solve(solver, tags, A, b).pow(2).sum()

    around = torch.func.grad(total, (0, 1))(A, b)
    each = [torch.func.grad(single, (0, 1))(A[i], b[i]) for i in range(3)]
    for k in (0, 1):
        expected = torch.stack([g[k] for g in each])
        torch.testing.assert_close(around[k], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab", "minres", "lu", "qr"])
def test_complex_systems(name):
    solver, tags = SOLVERS[name]
    A, b = matrix(tags, torch.complex128), vector(torch.complex128)
    found = linear_solve(LinearOperator.from_matrix(A, tags), b, solver).value
    torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    if not tags:
        inputs = (A.requires_grad_(), b.requires_grad_())
        assert gradcheck(lambda A, b: solve(solver, (), A, b), inputs)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_transposed_state_solves_the_adjoint_system(name):
    solver, tags = SOLVERS[name]
    A, b = matrix(tags), vector()
    state = solver.init(LinearOperator.from_matrix(A, tags).bound(), b)
    found = solver.compute(solver.transpose(state), b).value
    torch.testing.assert_close(found, torch.linalg.solve(A.mH, b), rtol=1e-9, atol=1e-9)


def test_cg_is_exact_after_n_steps_and_bounded_before():
    A, b = matrix(SPD, n=12), vector(n=12)
    exact = torch.linalg.solve(A, b)
    kappa = torch.linalg.cond(A)
    rate = (kappa.sqrt() - 1) / (kappa.sqrt() + 1)

    def error(x):
        return torch.sqrt((x - exact) @ A @ (x - exact))

    for k in (1, 3, 5, 12):
        x = linear_solve(A, b, CG(0.0, maxiter=k), on_fail="ignore").value
        assert error(x) <= 2 * rate**k * error(torch.zeros_like(b))
    assert error(x) <= 1e-9 * error(torch.zeros_like(b))


def test_neumann_error_is_the_power_of_the_remainder():
    A, b = matrix(SPD), vector()
    K, alpha = 7, 0.3
    x = linear_solve(A, b, Neumann(K, alpha), on_fail="ignore").value
    exact = torch.linalg.solve(A, b)
    remainder = torch.linalg.matrix_power(torch.eye(N, dtype=A.dtype) - alpha * A, K + 1) @ exact
    torch.testing.assert_close(exact - x, remainder)


def test_jacobi_needs_fewer_steps_on_a_badly_scaled_system():
    scale = torch.logspace(0, 3, N, dtype=torch.float64)
    A = scale[:, None] * matrix(SPD) * scale
    plain = linear_solve(A, vector(), CG(1e-8, maxiter=500))
    better = linear_solve(A, vector(), CG(1e-8, maxiter=500, M=Jacobi()))
    assert better.stats.iterations <= N < plain.stats.iterations


def test_warm_start_at_the_solution_takes_no_step():
    A, b = matrix(SPD), vector()
    solution = linear_solve(A, b, CG(1e-8), x0=torch.linalg.solve(A, b))
    assert solution.stats.iterations == 0


def test_ridge_is_part_of_the_system_and_of_its_derivative():
    A, b = matrix(()), vector()
    shifted = A + 0.5 * torch.eye(N, dtype=A.dtype)
    ours = torch.func.jacrev(lambda A: linear_solve(A, b, LU(ridge=0.5)).value)(A)
    expected = torch.func.jacrev(lambda A: torch.linalg.solve(A, b))(shifted)
    torch.testing.assert_close(ours, expected)
    normal = linear_solve(A, b, NormalCG(1e-13, ridge=0.5), on_fail="ignore").value
    expected = torch.linalg.solve(A.T @ A + 0.5 * torch.eye(N, dtype=A.dtype), A.T @ b)
    torch.testing.assert_close(normal, expected)


def test_result_does_not_depend_on_how_often_the_host_asks():
    A, b = matrix(SPD), vector()
    found = [linear_solve(A, b, CG(1e-6, maxiter=20, check_every=every)) for every in (0, 1, 7)]
    for other in found[1:]:
        assert torch.equal(found[0].value, other.value)
        assert found[0].stats.iterations == other.stats.iterations


def test_entries_of_a_batch_stop_by_themselves():
    A = torch.diag_embed(torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4]], dtype=torch.float64))
    b = torch.ones(2, 4, dtype=torch.float64)
    solution = torch.func.vmap(lambda A, b: linear_solve(A, b, CG(1e-12)))(A, b)
    assert solution.stats.iterations.tolist() == [1, 4]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_any_shape_of_the_right_hand_side(shape):
    b = torch.ones(shape, dtype=torch.float64)
    for solver in (CG(), NormalCG(), GMRES(), BiCGSTAB(), MINRES(), LU(), QR(), Cholesky()):
        x = solver(lambda v: 4 * v, b)
        torch.testing.assert_close(x, b / 4)


# --- failures -------------------------------------------------------------------------------------

SINGULAR = torch.ones(3, 3, dtype=torch.float64)


@pytest.mark.parametrize("solver", [LU(), QR(), Cholesky(), CG(), GMRES(maxiter=5), MINRES()])
def test_singular_system_raises(solver):
    b = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    with pytest.raises(LinearSolveError, match="SINGULAR|MAX_ITERATIONS|DIVERGED|NON_FINITE"):
        linear_solve(SINGULAR, b, solver)


def test_too_few_iterations_warn_or_raise_or_are_told_in_the_status():
    A, b = matrix(SPD), vector()
    with pytest.raises(LinearSolveError, match="MAX_ITERATIONS.*maxiter"):
        linear_solve(A, b, CG(1e-12, maxiter=1))
    with pytest.warns(LinearSolveWarning, match="MAX_ITERATIONS"):
        CG(1e-12, maxiter=1)(lambda v: A @ v, b)
    ignored = linear_solve(A, b, CG(1e-12, maxiter=1), on_fail="ignore")
    assert Status(int(ignored.status)) is Status.MAX_ITERATIONS


def test_one_failing_entry_of_a_batch_raises():
    A = torch.stack([torch.eye(3, dtype=torch.float64), SINGULAR])
    b = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(2, 3)
    with pytest.raises(LinearSolveError, match="SINGULAR"):
        torch.func.vmap(lambda A, b: linear_solve(A, b, LU()).value)(A, b)


def test_diverging_neumann_series_warns():
    with pytest.warns(LinearSolveWarning, match="DIVERGED"):
        Neumann()(lambda v: 5 * v, torch.ones(2))


@pytest.mark.parametrize("solver", [CG(), LU(), GMRES(), MINRES(), BiCGSTAB()])
def test_nan_is_reported(solver):
    A = matrix(SPD).clone()
    A[0, 0] = float("nan")
    with pytest.raises(LinearSolveError):
        linear_solve(A, vector(), solver)


def test_bad_input_is_refused_with_a_sentence():
    with pytest.raises(TypeError, match="square matrix, but has shape"):
        linear_solve(torch.ones(2, 3), torch.ones(3), LU())
    with pytest.raises(ValueError, match="expected shape"):
        linear_solve(torch.eye(3), torch.ones(2), LU())
    with pytest.raises(TypeError, match="floating-point or complex"):
        CG()(lambda v: v, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="maxiter"):
        CG(maxiter=-1)
