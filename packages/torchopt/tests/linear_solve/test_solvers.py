# SPDX-License-Identifier: Apache-2.0
"""Every solver on a table of systems: values, derivatives, batches, failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torchopt.linear_solve import (
    CG,
    GMRES,
    LSMR,
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
    Nystrom,
    Status,
    Triangular,
    WarmStart,
    linear_solve,
)

N = 5
SPD, SYMMETRIC, DIAGONAL = ("positive_definite",), ("symmetric",), ("diagonal",)
LOWER, UPPER = ("lower_triangular",), ("upper_triangular",)


def matrix(tags, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(n, n, generator=generator, dtype=dtype)
    if tags == SPD:
        return g @ g.mH / n + torch.eye(n, dtype=dtype)
    if tags == SYMMETRIC:
        return g + g.mH
    if tags == DIAGONAL:
        return torch.diag(torch.linspace(-1, 2, n, dtype=torch.float64).to(dtype))
    if tags in (LOWER, UPPER):
        general = g + 3 * torch.eye(n, dtype=dtype)
        return general.tril() if tags == LOWER else general.triu()
    return g + 3 * torch.eye(n, dtype=dtype)


def vector(dtype=torch.float64, n=N):
    return torch.randn(n, generator=torch.Generator().manual_seed(4), dtype=dtype)


SOLVERS = {
    "cg": (CG(1e-13), SPD),
    "cg_jacobi": (CG(1e-13, M=Jacobi()), SPD),
    "cg_fixed_iterations": (CG(1e-13, maxiter=12, check_every=0), SPD),
    "cg_nystrom": (CG(1e-13, M=Nystrom(3)), SPD),
    "normal_cg": (NormalCG(1e-13), ()),
    "lsmr": (LSMR(1e-13), ()),
    "lsmr_jacobi": (LSMR(1e-13, M=Jacobi()), ()),
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
    "lower_triangular": (Triangular(), LOWER),
    "upper_triangular": (Triangular(vectorize=False), UPPER),
    "auto_triangular": (Auto(), UPPER),
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
    """Solve with the part of A that satisfies the tags, so that every A is valid."""
    if "diagonal" in tags:
        A = torch.diag(A.diagonal())
    elif tags in (LOWER, UPPER):
        A = A.tril() if tags == LOWER else A.triu()
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
    assert gradgradcheck(f, inputs, fast_mode=True)


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


def test_complex_systems(case):
    solver, tags = case
    A, b = matrix(tags, torch.complex128), vector(torch.complex128)
    found = linear_solve(LinearOperator.from_matrix(A, tags), b, solver).value
    torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    inputs = (A.requires_grad_(), b.requires_grad_())
    assert gradcheck(lambda A, b: solve(solver, tags, A, b), inputs, fast_mode=True)


def test_many_right_hand_sides_with_one_state(case):
    solver, tags = case
    A = matrix(tags)
    B = torch.stack([vector(), vector() + 1, vector() ** 2])
    state = solver.init(LinearOperator.from_matrix(A, tags).bound(), B[0])
    found = torch.func.vmap(lambda b: solver.compute(state, b).value)(B)
    torch.testing.assert_close(found, torch.linalg.solve(A, B.T).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_transposed_state_solves_the_adjoint_system(name):
    solver, tags = SOLVERS[name]
    A, b = matrix(tags), vector()
    state = solver.init(LinearOperator.from_matrix(A, tags).bound(), b)
    found = solver.compute(solver.transpose(state), b).value
    torch.testing.assert_close(found, torch.linalg.solve(A.mH, b), rtol=1e-9, atol=1e-9)


def test_many_right_hand_sides_of_each_system_of_a_batch(case):
    """Batches of matrices outside and of right-hand sides inside, as in vmap(jacrev(...))."""
    solver, tags = case
    A = torch.stack([matrix(tags), 1.3 * matrix(tags), matrix(tags).mT])
    if tags in (LOWER, UPPER):
        A[2] = A[0]
    B = torch.randn(3, 4, N, dtype=torch.float64)

    def one(A, b):
        return linear_solve(LinearOperator.from_matrix(A, tags), b, solver).value

    found = torch.func.vmap(torch.func.vmap(one, (None, 0)))(A, B)
    torch.testing.assert_close(found, torch.linalg.solve(A, B.mT).mT, rtol=1e-8, atol=1e-8)
    state_twice = torch.func.vmap(
        lambda A, B: (lambda state: torch.func.vmap(lambda b: solver.compute(state, b).value)(B))(
            solver.init(LinearOperator.from_matrix(A, tags).T.bound(), B[0])
        )
    )(A, B)
    torch.testing.assert_close(state_twice, torch.linalg.solve(A.mT, B.mT).mT, rtol=1e-8, atol=1e-8)


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


def test_nystrom_flattens_a_decaying_spectrum():
    n, ridge = 60, 1e-3
    U = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(3, -6, n, dtype=torch.float64)
    operator = LinearOperator.from_matrix((U * eigenvalues) @ U.T, SPD)
    plain, better = (
        linear_solve(
            operator,
            vector(n=n),
            CG(1e-8, maxiter=2000, ridge=ridge, M=M, estimate_condition=True),
        )
        for M in (None, Nystrom(2 * int((eigenvalues > ridge).sum()) // 2 + 5, ridge=ridge))
    )
    assert better.stats.condition < 28 < 1e5 < plain.stats.condition
    assert 3 * better.stats.iterations < plain.stats.iterations
    # Each is off by its residual over the smallest eigenvalue, the ridge.
    off = torch.linalg.vector_norm(better.value - plain.value)
    assert off <= 2 * 1e-8 / ridge * torch.linalg.vector_norm(vector(n=n))


def test_nystrom_of_full_rank_is_the_inverse_up_to_a_factor():
    A = matrix(SPD, n=8)
    solution = linear_solve(A, vector(n=8), CG(1e-10, M=Nystrom(8), estimate_condition=True))
    assert solution.stats.iterations <= 2
    torch.testing.assert_close(solution.value, torch.linalg.solve(A, vector(n=8)))


CONDITION = {
    "cg": (CG(1e-14, estimate_condition=True), SPD),
    "normal_cg": (NormalCG(1e-14, estimate_condition=True), ()),
    "lsmr": (LSMR(1e-14, estimate_condition=True), ()),
    "minres": (MINRES(1e-14, estimate_condition=True), SYMMETRIC),
    "gmres": (GMRES(1e-14, estimate_condition=True), ()),
    "lu": (LU(estimate_condition=True), ()),
    "cholesky": (Cholesky(estimate_condition=True), SPD),
    "triangular": (Triangular(estimate_condition=True), UPPER),
    "diagonal": (Diagonal(estimate_condition=True), DIAGONAL),
    "auto": (Auto(1e-14, dense_limit=0, estimate_condition=True), ()),
}


@pytest.mark.parametrize("name", sorted(CONDITION))
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_condition_number_from_the_coefficients(name, dtype):
    solver, tags = CONDITION[name]
    A, b = matrix(tags, dtype), vector(dtype)
    if tags == DIAGONAL:
        A = A + 0.3 * torch.eye(N, dtype=dtype)
    solution = linear_solve(LinearOperator.from_matrix(A, tags), b, solver)
    torch.testing.assert_close(
        solution.stats.condition, torch.linalg.cond(A), rtol=1e-5, atol=0.0, check_dtype=False
    )
    batch = torch.stack([A, 2 * A + A.diagonal().diag()])
    found = torch.func.vmap(
        lambda A: linear_solve(LinearOperator.from_matrix(A, tags), b, solver).stats.condition
    )(batch)
    torch.testing.assert_close(found, torch.linalg.cond(batch), rtol=1e-5, atol=0.0)


def test_condition_number_is_nan_unless_asked_for():
    for solver in (CG(), BiCGSTAB(estimate_condition=True), LU()):
        assert linear_solve(matrix(SPD), vector(), solver).stats.condition.isnan()


def test_conjugate_gradients_take_one_product_more_than_steps():
    A, b, count = matrix(SPD), vector(), [0]

    def product(A, v):
        count[0] += 1
        return A @ v

    operator = LinearOperator.from_function(product, A, b, SPD)
    for k in (0, 2, 5):
        count[0] = 0
        solution = linear_solve(operator, b, CG(0.0, maxiter=k), on_fail="ignore")
        assert solution.stats.iterations == k
        assert count[0] == k + 1


def test_warm_start_is_carried_from_solve_to_solve():
    A, b = matrix(SPD), vector()
    solver = WarmStart(CG(1e-8))
    operator = LinearOperator.from_matrix(A, SPD)
    first, second = (linear_solve(operator, b, solver).stats.iterations for _ in range(2))
    assert first >= 3
    assert second == 0
    near = linear_solve(operator, b * (1 + 1e-6), solver).stats.iterations
    assert 0 < near < first
    solver.forget()
    assert linear_solve(operator, b, solver).stats.iterations == first


def test_under_vmap_a_warm_start_remembers_nothing():
    A, b = matrix(SPD), vector()
    operator, solver = LinearOperator.from_matrix(A, SPD), WarmStart(CG(1e-8))
    cold = linear_solve(operator, b, CG(1e-8)).stats.iterations
    assert cold >= 3

    def steps(b):
        return linear_solve(operator, b, solver).stats.iterations

    for _ in range(2):
        assert torch.func.vmap(steps)(torch.stack([b, b])).tolist() == [int(cold)] * 2
    assert steps(b) == cold


def test_warm_start_keeps_the_adjoint_separate():
    A, b = matrix(()), vector().requires_grad_()
    solver = WarmStart(GMRES(1e-12))
    for scale in (1.0, 2.0):
        x = linear_solve(LinearOperator.from_matrix(A), scale * b, solver).value
        (found,) = torch.autograd.grad(x.sum(), b)
        torch.testing.assert_close(found, scale * torch.linalg.solve(A.T, torch.ones_like(b)))


@pytest.mark.parametrize("kind", ["gmres", "bicgstab", "normal_cg"])
def test_a_solve_in_between_does_not_affect_the_warm_start_of_the_adjoint(kind):
    """Count iterations: a start from the solution of the other system needs more."""
    A, b = matrix((), n=12), vector(n=12)
    operator = LinearOperator.from_matrix(A)
    inner = {"gmres": GMRES(1e-9), "bicgstab": BiCGSTAB(1e-9), "normal_cg": NormalCG(1e-9)}[kind]
    solver = WarmStart(inner)
    for again in (False, True):
        for system in (operator, operator.T):
            count = int(linear_solve(system, b, solver).stats.iterations)
            assert (count == 0) == again


def test_a_transposed_state_remembers_separately():
    A, b = matrix((), n=12), vector(n=12)
    solver = WarmStart(NormalCG(1e-9))
    state = solver.init(LinearOperator.from_matrix(A).bound(), b)
    other = solver.transpose(state)
    counts = [int(solver.compute(s, b).iterations) for s in (state, other, state, other)]
    assert min(counts[:2]) > 5
    assert counts[2:] == [0, 0]
    found = solver.compute(solver.transpose(other), b)
    assert int(found.iterations) == 0
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b))


def test_a_warm_start_is_a_copy_of_the_last_solution_of_its_dtype():
    A, b = matrix(SPD), vector()
    solver = WarmStart(CG(1e-8))
    operator = LinearOperator.from_matrix(A, SPD)
    first = linear_solve(operator, b, solver)
    assert first.stats.iterations > 0
    first.value.zero_()  # the caller's own
    assert linear_solve(operator, b, solver).stats.iterations == 0
    single = LinearOperator.from_matrix(A.float(), SPD)
    found = linear_solve(single, b.float(), solver)
    assert found.value.dtype is torch.float32
    assert found.stats.iterations > 0
    assert linear_solve(operator, b, solver).stats.iterations == 0


def test_a_solution_that_is_not_finite_is_not_a_warm_start():
    A, b = matrix(SPD), vector()
    solver = WarmStart(GMRES(1e-8))
    overflowing = LinearOperator.from_matrix(1e308 * A, SPD)
    broken = linear_solve(overflowing, 1e300 * torch.ones_like(b), solver, on_fail="ignore")
    assert broken.value.isnan().all()
    found = linear_solve(LinearOperator.from_matrix(A, SPD), b, solver)
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)


def test_least_squares_solution_of_a_singular_system():
    b = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    solution = linear_solve(SINGULAR, b, LSMR(1e-12, maxiter=50), on_fail="ignore")
    assert Status(int(solution.status)) is Status.SINGULAR
    torch.testing.assert_close(solution.value, torch.linalg.pinv(SINGULAR) @ b)


def test_triangular_needs_its_tag_and_ignores_the_other_triangle():
    A, b = matrix(()), vector()
    with pytest.raises(ValueError, match="lower_triangular"):
        linear_solve(A, b, Triangular())
    for tags, expected in ((LOWER, A.tril()), (UPPER, A.triu())):
        x = linear_solve(LinearOperator.from_matrix(A, tags), b, Triangular()).value
        torch.testing.assert_close(x, torch.linalg.solve(expected, b))


def test_automatic_choice():
    small, large = torch.eye(4), torch.eye(80)
    table = {
        (): (LU, LSMR),
        SPD: (Cholesky, CG),
        SYMMETRIC: (LU, MINRES),
        DIAGONAL: (Diagonal, Diagonal),
        LOWER: (Triangular, LSMR),
    }
    for tags, expected in table.items():
        for A, kind in zip((small, large), expected):
            operator = LinearOperator.from_matrix(A, tags)
            assert type(Auto().choose(operator.bound())) is kind
            assert type(Auto().choose(operator.T.bound())) is kind


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


def test_ridge_of_the_normal_equations_is_part_of_the_derivative():
    A, b = matrix(()), vector()
    solver = NormalCG(1e-14, ridge=0.5)

    def expected(A):
        return torch.linalg.solve(A.T @ A + 0.5 * torch.eye(N, dtype=A.dtype), A.T @ b)

    def closure(A):
        return solver(lambda v: A @ v, b)

    torch.testing.assert_close(linear_solve(A, b, solver).value, expected(A))
    jacobian = torch.func.jacrev(expected)(A)
    for found in (
        torch.func.jacrev(lambda A: linear_solve(A, b, solver).value)(A),
        torch.func.jacfwd(lambda A: linear_solve(A, b, solver).value)(A),
        torch.autograd.functional.jacobian(closure, A),
    ):
        torch.testing.assert_close(found, jacobian)


def test_result_does_not_depend_on_how_often_the_host_checks():
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


KRYLOV = {
    "cg": CG(1e-9),
    "minres": MINRES(1e-9),
    "bicgstab": BiCGSTAB(1e-9),
    "normal_cg": NormalCG(1e-9),
    "lsmr": LSMR(1e-9),
}


@pytest.mark.parametrize("name", KRYLOV)
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_krylov_solvers_stop_after_one_iteration_for_each_eigenvalue(name, distinct):
    """Not later, because their recursive residual is the true one."""
    Q, _ = torch.linalg.qr(matrix((), n=12))
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:distinct].repeat(12 // distinct)
    A = LinearOperator.from_matrix(Q @ torch.diag(values) @ Q.T, SPD)
    found = linear_solve(A, vector(n=12), KRYLOV[name], on_fail="raise")
    assert int(found.stats.iterations) == distinct


@pytest.mark.parametrize("name", KRYLOV)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_absolute_tolerance_does_not_depend_on_the_size_of_b(name, size):
    A, b = matrix(SPD, n=12), size * vector(n=12)
    solver = replace(KRYLOV[name], rtol=0.0, atol=1e-4)
    found = linear_solve(LinearOperator.from_matrix(A, SPD), b, solver, on_fail="raise")
    # NormalCG's is that of A'r; a factor of two is left to recurrences.
    error = A @ found.value - b
    assert (A.T @ error if name == "normal_cg" else error).norm() <= 2e-4
    assert (found.stats.iterations == 0) == (size == 1e-6)


@pytest.mark.parametrize("name", KRYLOV)
@pytest.mark.parametrize("options", [{}, {"check_every": 0, "maxiter": 20}])
def test_a_row_of_zeros_in_a_batch_is_solved_by_zeros(name, options):
    """Also if nothing stops the iterations, because a breakdown does not change x."""
    A, b = matrix(SPD), vector()
    operator = LinearOperator.from_matrix(A, SPD)
    solver = replace(KRYLOV[name], **options)
    rows = torch.func.vmap(lambda b: linear_solve(operator, b, solver).value)(
        torch.stack([b, torch.zeros_like(b)])
    )
    torch.testing.assert_close(rows[0], torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    assert torch.equal(rows[1], torch.zeros_like(b))


@pytest.mark.parametrize("count", [0, 2])
def test_a_ridge_is_one_number(count):
    with pytest.raises(ValueError, match="ridge: expected one number, got shape"):
        linear_solve(matrix(SPD), vector(), CG(ridge=torch.ones(count, dtype=torch.float64)))


def test_a_breakdown_stops_the_update_alone_and_in_a_batch():
    """CG's first direction (1, 1) has no curvature on diag(1, -1): its step is 0, not infinite."""
    A = LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    b = torch.ones(2, dtype=torch.float64)

    def solve(b):
        return linear_solve(A, b, CG(1e-9), on_fail="ignore").value

    assert torch.equal(solve(b), torch.zeros_like(b))
    assert torch.equal(torch.func.vmap(solve)(b[None])[0], torch.zeros_like(b))


# --- failures -------------------------------------------------------------------------------------

SINGULAR = torch.ones(3, 3, dtype=torch.float64)


# Factorisations and normal equations notice that A is singular, the others that they make no
# progress: MINRES drifts along the null space, and each term of Neumann's series has norm 2.
STATUS_OF_A_SINGULAR_SYSTEM = [
    *((solver, "SINGULAR") for solver in (LU(), QR(), Cholesky(), Auto())),
    *((solver, "SINGULAR") for solver in (LSMR(), NormalCG())),
    *((solver, "MAX_ITERATIONS") for solver in (CG(), GMRES(maxiter=5), GMRES(), BiCGSTAB())),
    *((solver, "DIVERGED") for solver in (MINRES(), Neumann())),
]


@pytest.mark.parametrize(("solver", "status"), STATUS_OF_A_SINGULAR_SYSTEM)
def test_a_singular_system_without_a_solution_raises(solver, status):
    b = torch.tensor([1.0, 0, 0], dtype=torch.float64)  # not in the range, multiples of (1, 1, 1)
    with pytest.raises(LinearSolveError, match=status):
        linear_solve(SINGULAR, b, solver)
    found = linear_solve(SINGULAR, b, solver, on_fail="ignore")
    assert Status(int(found.status)) is Status[status]


def test_too_few_iterations_warn_or_raise_or_are_reported_in_the_status():
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


DIVERGING = {"cg": CG(maxiter=1), "bicgstab": BiCGSTAB(maxiter=1), "neumann": Neumann()}
RESIDUAL_NEVER_GROWS = {
    "gmres": GMRES(maxiter=1, restart=1),
    "minres": MINRES(maxiter=1),
    "lsmr": LSMR(maxiter=1),
    "normal_cg": NormalCG(maxiter=1),
}


@pytest.mark.parametrize("name", [*DIVERGING, *RESIDUAL_NEVER_GROWS])
def test_a_residual_that_grew_tenfold_is_divergence_and_a_smaller_one_is_not(name):
    """CG's first step on diag(1, -d) has the length 2 / (1 - d): the residual grows with d."""
    b = torch.ones(2, dtype=torch.float64)
    solver = {**DIVERGING, **RESIDUAL_NEVER_GROWS}[name]
    far, near = (1.0, -0.99), (1.0, -0.2)
    if name == "neumann":
        far, near = (5.0, 5.0), (1.9, 1.9)
    for diagonal, diverges in ((far, name in DIVERGING), (near, False)):
        A = LinearOperator.from_matrix(
            torch.diag(torch.tensor(diagonal, dtype=torch.float64)), SYMMETRIC
        )
        found = linear_solve(A, b, solver, on_fail="ignore")
        grown = float(found.stats.residual_norm / found.stats.rhs_norm)
        assert (grown > 10) == diverges
        expected = Status.DIVERGED if diverges else Status.MAX_ITERATIONS
        assert Status(int(found.status)) is expected, (grown, found.status)


def gmres_cycles(A, b, restart, rtol):
    """Return the cycles of GMRES from its definition: least residuals over a Krylov basis."""
    x, cycles = torch.zeros_like(b), 0
    while torch.linalg.norm(b - A @ x) > rtol * torch.linalg.norm(b):
        r = b - A @ x
        basis = [r / torch.linalg.norm(r)]
        for _ in range(min(restart, len(b)) - 1):
            q, _ = torch.linalg.qr(torch.stack([*basis, A @ basis[-1]], dim=1))
            basis.append(q[:, -1])
        V = torch.stack(basis, dim=1)
        x, cycles = x + V @ torch.linalg.lstsq(A @ V, r).solution, cycles + 1
    return cycles


@pytest.mark.parametrize("restart", [2, 3, 5, 12, 20])
def test_restarted_gmres_takes_as_many_cycles_as_by_definition(restart):
    n = 12
    A = matrix((), n=n) / 3 + torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))
    b = vector(n=n)
    found = linear_solve(A, b, GMRES(1e-8, restart=restart, maxiter=100))
    assert int(found.stats.iterations) == gmres_cycles(A, b, restart, 1e-8)


@pytest.mark.parametrize(
    "solver", [GMRES(1e-10, restart=30), BiCGSTAB(1e-10)], ids=["gmres", "bicgstab"]
)
@pytest.mark.parametrize("kind", ["matrix", "callable"])
def test_the_preconditioner_of_the_adjoint_is_the_transposed_one(solver, kind):
    """With P = A⁻¹ a solve is one step. With P in place of Pᵀ the adjoint takes many."""
    n = 12
    A, b = matrix((), n=n), vector(n=n)
    A = A + 6 * torch.triu(
        torch.randn(n, n, generator=torch.Generator().manual_seed(5)).double(), 1
    )
    P = torch.linalg.inv(A)

    def apply(v):
        return P @ v

    preconditioned = replace(solver, M=P if kind == "matrix" else apply)
    operator = LinearOperator.from_matrix(A)
    assert int(linear_solve(operator, b, preconditioned).stats.iterations) == 1
    found = linear_solve(operator.T, b, preconditioned)
    assert int(found.stats.iterations) == 1
    torch.testing.assert_close(found.value, torch.linalg.solve(A.mT, b))
    state = preconditioned.init(operator.bound(), b)  # what the backward pass transposes
    adjoint = preconditioned.compute(preconditioned.transpose(state), b)
    assert int(adjoint.iterations) == 1
    torch.testing.assert_close(adjoint.value, torch.linalg.solve(A.mT, b))


def test_diverging_neumann_series_warns():
    with pytest.warns(LinearSolveWarning, match="DIVERGED"):
        Neumann()(lambda v: 5 * v, torch.ones(2))


@pytest.mark.parametrize(
    "solver",
    [
        CG(),
        CG(estimate_condition=True),
        CG(M=Nystrom(2)),
        NormalCG(),
        LSMR(),
        LU(),
        LU(estimate_condition=True),
        QR(),
        Cholesky(),
        GMRES(),
        GMRES(estimate_condition=True),
        MINRES(),
        BiCGSTAB(),
        Auto(),
        Auto(dense_limit=0),
        WarmStart(CG()),
    ],
    ids=repr,
)
def test_nan_is_reported(solver):
    A = matrix(SPD).clone()
    A[0, 0] = float("nan")
    with pytest.raises(LinearSolveError, match="NON_FINITE"):
        linear_solve(A, vector(), solver)


def test_invalid_input_is_refused_with_a_clear_message():
    with pytest.raises(TypeError, match="square matrix, but has shape"):
        linear_solve(torch.ones(2, 3), torch.ones(3), LU())
    with pytest.raises(ValueError, match="expected shape"):
        linear_solve(torch.eye(3), torch.ones(2), LU())
    with pytest.raises(TypeError, match="floating-point or complex"):
        CG()(lambda v: v, torch.ones(2, dtype=torch.int64))
    for dtype in (torch.int64, torch.float64, torch.complex64):
        with pytest.raises(TypeError, match="b: expected torch.float32 as the matrix has, got"):
            linear_solve(torch.eye(3), torch.ones(3, dtype=dtype), CG())
    with pytest.raises(TypeError, match="expected a tree of tensors, got float in it"):
        LinearOperator.from_function(lambda p, v: p["k"] * v, {"k": 2.0}, torch.ones(3))
    with pytest.raises(ValueError, match="maxiter"):
        CG(maxiter=-1)


def test_a_solve_is_left_out_of_compiled_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.op for node in graph.graph.nodes].count("call_function"))
        return graph.forward

    A, b = matrix(SPD), vector()
    torch._dynamo.reset()
    found = torch.compile(lambda A, b: 2 * linear_solve(A, b, LU()).value, backend=backend)(A, b)
    torch.testing.assert_close(found, 2 * torch.linalg.solve(A, b))
    assert graphs == [1]  # the product with two
