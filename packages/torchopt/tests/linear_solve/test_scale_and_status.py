# SPDX-License-Identifier: Apache-2.0
"""For every solver, the scale of b makes no difference, and statuses are correct."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff.implicit import custom_root
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

F64 = torch.float64
N = 8
SPD, DIAGONAL, LOWER = ("positive_definite",), ("diagonal",), ("lower_triangular",)
SOLVERS = {
    "cg": (lambda **o: CG(**o), SPD),
    "normal_cg": (lambda **o: NormalCG(**o), ()),
    "lsmr": (lambda **o: LSMR(**o), ()),
    "gmres": (lambda **o: GMRES(**o), ()),
    "gmres_restarted": (lambda **o: GMRES(restart=3, **o), ()),
    "bicgstab": (lambda **o: BiCGSTAB(**o), ()),
    "minres": (lambda **o: MINRES(**o), SPD),
    "neumann": (lambda **o: Neumann(200, alpha=0.3, **o), SPD),
    "warm": (lambda **o: WarmStart(CG(**o)), SPD),
    "lu": (lambda **o: LU(**o), ()),
    "qr": (lambda **o: QR(**o), ()),
    "cholesky": (lambda **o: Cholesky(**o), SPD),
    "triangular": (lambda **o: Triangular(**o), LOWER),
    "diagonal": (lambda **o: Diagonal(**o), DIAGONAL),
    "auto": (lambda **o: Auto(dense_limit=0), ()),
}
ITERATIVE = {
    name: SOLVERS[name]
    for name in (
        "cg",
        "normal_cg",
        "lsmr",
        "gmres",
        "gmres_restarted",
        "bicgstab",
        "minres",
        "warm",
        "auto",
    )
}


@pytest.fixture(params=SOLVERS.values(), ids=SOLVERS.keys())
def case(request):
    return request.param


@pytest.fixture(params=ITERATIVE.values(), ids=ITERATIVE.keys())
def iterative(request):
    return request.param


def matrix(tags, dtype=F64):
    g = torch.Generator().manual_seed(2)
    root = torch.randn(N, N, generator=g, dtype=F64)
    if tags == DIAGONAL:
        A = torch.diag(torch.linspace(1, 3, N, dtype=F64))
    else:
        A = root @ root.T / N + torch.eye(N, dtype=F64)
    return (A.tril() if tags == LOWER else A).to(dtype)


def vector(dtype=F64):
    return torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_right_hand_side_makes_no_difference(case, scale):
    make, tags = case
    A, b = matrix(tags, torch.float32), vector(torch.float32)
    operator = LinearOperator.from_matrix(A, tags)
    solver = make()
    expected = linear_solve(operator, b, solver).value
    solution = linear_solve(operator, b * scale, make())
    torch.testing.assert_close(solution.value / scale, expected, rtol=1e-4, atol=1e-5)
    assert Status(int(solution.status)) is Status.CONVERGED
    stats = solution.stats
    assert 0 < stats.rhs_norm < torch.inf
    assert stats.residual_norm <= 2e-5 * stats.rhs_norm
    # Backward: the cotangent has the scale.
    leaf = b.clone().requires_grad_()
    (linear_solve(operator, leaf, make()).value.sum() * scale).backward()
    exact = torch.linalg.solve(A.mT.double(), torch.ones(N, dtype=F64))
    torch.testing.assert_close((leaf.grad / scale).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1024.0), (torch.bfloat16, 1e-3)])
def test_loss_scaling_in_half_precision(case, dtype, scale):
    make, tags = case
    A = matrix(tags, dtype)
    operator = LinearOperator.from_matrix(A, tags)
    b = vector(dtype).requires_grad_()
    (linear_solve(operator, b, make(), on_fail="raise").value.sum() * scale).backward()
    exact = torch.linalg.solve(A.double().mT, torch.ones(N, dtype=F64))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((b.grad.double() / scale), exact, rtol=20 * eps, atol=20 * eps)


def test_zero_right_hand_side_and_starts_larger_than_the_solution(iterative):
    make, tags = iterative
    operator = LinearOperator.from_matrix(matrix(tags), tags)
    b = vector()
    zero = linear_solve(operator, 0 * b, make(), x0=torch.ones_like(b))
    assert not zero.value.any()
    assert not zero.status.any()
    for scale in (1e-9, 1e-20, 1e-200):
        solution = linear_solve(operator, scale * b, make(), x0=torch.ones_like(b))
        cold = linear_solve(operator, scale * b, make())
        torch.testing.assert_close(solution.value / scale, cold.value / scale)
    at_nan = linear_solve(operator, b, make(), x0=torch.full_like(b, torch.nan))
    torch.testing.assert_close(at_nan.value, linear_solve(operator, b, make()).value)


def test_warm_start_survives_a_masked_loss():
    d = torch.arange(1.0, 9.0, dtype=F64)
    solve = WarmStart(CG(1e-10, on_fail="raise"))
    root = custom_root(lambda x, a: x * d - a, argnums=1, solve=solve, positive_definite=True)
    a = torch.ones(8, dtype=F64, requires_grad=True)
    for weight in (1.0, 0.0, 1e-12, 1.0):
        (found,) = torch.autograd.grad((weight * root(lambda s, a: a / d)(None, a)).sum(), a)
        torch.testing.assert_close(found, weight / d, rtol=1e-8, atol=0.0)


HARD = {
    "singular": torch.ones(N, N, dtype=F64),
    "nearly_singular": torch.ones(N, N, dtype=F64) + 1e-14 * matrix(SPD),
    "indefinite": torch.diag(torch.linspace(-1, 1, N, dtype=F64)),
    "ill_conditioned": torch.diag(torch.logspace(0, 12, N, dtype=F64)),
    "skew": matrix(LOWER) - matrix(LOWER).mT,
    "zero": torch.zeros(N, N, dtype=F64),
    "nan": torch.full((N, N), torch.nan, dtype=F64),
    "infinite": torch.full((N, N), torch.inf, dtype=F64),
    "huge": 1e200 * matrix(SPD),
    "tiny": 1e-200 * matrix(SPD),
}


@pytest.mark.parametrize("name", sorted(HARD))
def test_converged_means_a_small_residual(case, name):
    make, tags = case
    A, b = HARD[name], vector()
    solution = linear_solve(LinearOperator.from_matrix(A, tags), b, make(), on_fail="ignore")
    if tags == LOWER:
        A = A.tril()
    elif tags == DIAGONAL:
        A = torch.diag(A.sum(1))
    residual = (b - A @ solution.value).norm() / b.norm()
    size = A.abs().sum() * solution.value.abs().max() / b.norm()
    if int(solution.status) == int(Status.CONVERGED):
        assert residual <= 3e-5 + 1e-13 * size
    else:
        assert not residual <= 1e-9 or name in ("nearly_singular", "ill_conditioned")


@pytest.mark.parametrize(
    "solver", [CG(1e-12, maxiter=1), Neumann(2, alpha=0.3), LSMR(1e-12, maxiter=1)], ids=repr
)
def test_unfinished_solves_of_backward_warn(solver):
    A = matrix(SPD)
    root = custom_root(lambda x, a: A @ x - a, argnums=1, solve=solver)
    a = vector().requires_grad_()
    x = root(lambda s, a: torch.linalg.solve(A, a))(None, a)
    with pytest.warns(LinearSolveWarning, match="MAX_ITERATIONS") as seen:
        x.sum().backward()
    assert len(str(seen[0].message)) < 400


@pytest.mark.parametrize("kind", ["matrix", "callable", "jacobi"])
@pytest.mark.parametrize("name", ["gmres", "bicgstab", "lsmr", "normal_cg"])
def test_the_preconditioner_is_used_in_the_adjoint_solve(name, kind):
    """A perfect preconditioner needs one step, forward and backward."""
    g = torch.Generator().manual_seed(1)
    A = torch.diag(torch.linspace(1, 2, N, dtype=F64))
    A = A + 2 * torch.triu(torch.randn(N, N, dtype=F64, generator=g), 1)
    if kind == "jacobi":
        A = torch.diag(torch.logspace(0, 6, N, dtype=F64))
    inverse = torch.linalg.inv(A)
    M = inverse @ inverse.mT if name == "normal_cg" else inverse
    given = {"matrix": M, "callable": lambda v: M @ v, "jacobi": Jacobi(1 / M.diagonal())}[kind]
    solver = SOLVERS[name][0](rtol=1e-9, M=given, maxiter=3)
    b = vector().requires_grad_()
    x = linear_solve(A, b, solver).value
    (found,) = torch.autograd.grad(x.sum(), b)
    exact = torch.linalg.solve(A.mT, torch.ones(N, dtype=F64))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    state = solver.init(LinearOperator.from_matrix(A).bound(), b.detach())
    back = solver.compute(solver.transpose(state), torch.ones(N, dtype=F64))
    assert back.iterations <= 3
    torch.testing.assert_close(back.value, exact, rtol=1e-6, atol=1e-6)


RIDGES = {name: SOLVERS[name] for name in SOLVERS if name not in ("auto", "normal_cg")}


@pytest.mark.parametrize("name", sorted(RIDGES))
def test_tensor_ridge_has_a_gradient_in_every_mode(name):
    make, tags = RIDGES[name]
    A, b, r = matrix(tags), vector(), torch.tensor(0.7, dtype=F64)
    operator = LinearOperator.from_matrix(A, tags)
    options = {"rtol": 1e-13} if name in ITERATIVE or name == "neumann" else {}

    def ours(r):
        return linear_solve(operator, b, make(ridge=r, **options)).value

    def closed(r):
        return torch.linalg.solve(A + r * torch.eye(N, dtype=F64), b)

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(r), transform(closed)(r))
    batch = torch.tensor([0.1, 0.5], dtype=F64)
    torch.testing.assert_close(torch.func.vmap(ours)(batch), torch.stack([*map(closed, batch)]))
    leaf = r.clone().requires_grad_()
    through_closure = make(ridge=leaf, **options)
    if tags in ((), SPD):
        x = through_closure(lambda v: A @ v, b)
        torch.testing.assert_close(
            torch.autograd.grad(x.sum(), leaf)[0], torch.func.jacrev(closed)(r).sum()
        )


@pytest.mark.parametrize("solver", [LU(), QR(), GMRES(1e-13), LSMR(1e-13), BiCGSTAB(1e-13)])
@pytest.mark.parametrize("tags", [(), SPD])
def test_complex_ridge_is_conjugated_in_the_adjoint(solver, tags):
    A = matrix(SPD).to(torch.complex128)
    b = (vector() + 1j * vector().flip(0)).requires_grad_()
    for ridge in (0.7j, torch.tensor(0.7j, dtype=torch.complex128, requires_grad=True)):
        shifted = dataclasses.replace(solver, ridge=ridge)
        x = linear_solve(LinearOperator.from_matrix(A, tags), b, shifted).value
        y = torch.linalg.solve(A + ridge * torch.eye(N, dtype=A.dtype), b)
        inputs = (b, ridge) if isinstance(ridge, torch.Tensor) else (b,)
        found, expected = (torch.autograd.grad(z.abs().pow(2).sum(), inputs) for z in (x, y))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("solver", [Triangular(), Auto(), Triangular(ridge=0.5)], ids=repr)
def test_the_other_triangle_has_no_gradient(solver, upper):
    tags = ["upper_triangular" if upper else "lower_triangular"]
    A, b = matrix(SPD), vector()
    shift = 0.5 if getattr(solver, "ridge", None) else 0.0

    def ours(A):
        return linear_solve(LinearOperator.from_matrix(A, tags), b, solver).value

    def closed(A):
        A = A + shift * torch.eye(N, dtype=F64)
        return torch.linalg.solve_triangular(A, b[:, None], upper=upper)[:, 0]

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(A), transform(closed)(A))


def test_empty_systems(case):
    make, tags = case
    nothing = torch.zeros(0, dtype=F64)
    matrices = LinearOperator.from_matrix(torch.zeros(0, 0, dtype=F64), tags)
    function = LinearOperator.from_function(lambda p, v: p * v, torch.tensor(2.0), nothing, tags)
    for operator in (matrices, function):
        b = nothing.clone().requires_grad_()
        solution = linear_solve(operator, b, make())
        assert solution.value.shape == (0,)
        assert not solution.status.any()
        assert torch.autograd.grad(solution.value.sum(), b)[0].shape == (0,)
        assert operator.as_matrix().shape == (0, 0)
    for M in (Nystrom(2), Jacobi(), torch.zeros(0, 0, dtype=F64)):
        assert linear_solve(matrices, nothing, CG(M=M)).value.shape == (0,)


@pytest.mark.parametrize("solver", [LU(), QR(), Cholesky()], ids=repr)
@pytest.mark.parametrize("unit", [1e-20, 1e-10, 1e10])
def test_units_of_unknowns_and_equations_do_not_make_a_direct_solve_singular(solver, unit):
    units = torch.ones(N, dtype=F64)
    units[0] = unit
    A, x = units[:, None] * matrix(SPD) * units, 1 / units
    for operator in (LinearOperator.from_matrix(A), LinearOperator.from_matrix(A).T):
        found = linear_solve(operator, A @ x, solver)
        torch.testing.assert_close(found.value / x, torch.ones_like(x))


@pytest.mark.parametrize("solver", [LU(), QR(), Cholesky()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_direct_solves_report_singular_systems_whatever_the_rounding(solver, dtype):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        root = torch.randn(6, 4, generator=g, dtype=dtype)
        b = torch.randn(6, generator=g, dtype=dtype)
        found = linear_solve(root @ root.T, b, solver, on_fail="ignore")
        assert found.status == Status.SINGULAR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nystrom_in_half_precision(iterative, dtype):
    make, _ = iterative
    if "M" not in {f.name for f in dataclasses.fields(make())}:
        pytest.skip("takes no preconditioner")
    A = matrix(SPD).to(dtype)
    b = torch.linspace(1, 2, N).to(dtype)
    found = linear_solve(LinearOperator.from_matrix(A, SPD), b, make(M=Nystrom(3)))
    exact = torch.linalg.solve(A.double(), b.double())
    assert found.value.dtype is dtype
    error = torch.linalg.vector_norm(found.value - exact) / torch.linalg.vector_norm(exact)
    assert error < 8 * torch.finfo(dtype).eps
    empty = LinearOperator.from_matrix(A[:0, :0], SPD)
    assert linear_solve(empty, b[:0], make(M=Nystrom(3))).value.shape == (0,)


# Solvers that multiply two products with the operator, which float32 cannot hold at 1e-60 and 1e60.
SQUARES = {
    "normal_cg": ("MAX_ITERATIONS", "NON_FINITE"),
    "minres": ("MAX_ITERATIONS", "NON_FINITE"),
    "lsmr": ("MAX_ITERATIONS", "MAX_ITERATIONS"),
    "auto": ("MAX_ITERATIONS", "MAX_ITERATIONS"),
    "bicgstab": ("MAX_ITERATIONS", "MAX_ITERATIONS"),
}


@pytest.mark.parametrize("name", ITERATIVE)
def test_tiny_and_huge_operators_are_solved_or_refused_but_not_called_singular(name):
    make, tags = ITERATIVE[name]
    A, b = matrix(tags, torch.float32), torch.linspace(1, 2, N)
    for k, unit in enumerate((1e-30, 1e30)):
        operator = LinearOperator.from_matrix(unit * A, tags)
        found = linear_solve(operator, b * unit, make(), on_fail="ignore")
        expected = SQUARES.get(name, ("CONVERGED", "CONVERGED"))[k]
        assert Status(int(found.status)).name == expected
        if expected == "CONVERGED":
            rest = torch.linalg.vector_norm(b - A @ found.value) / torch.linalg.vector_norm(b)
            assert rest < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("make", [CG, NormalCG])
def test_a_step_that_is_too_large_for_the_dtype_is_not_finite(make, dtype):
    b = torch.ones(N, dtype=dtype)
    tiny = LinearOperator.from_function(lambda p, v: p * v, torch.tensor(1e-42), b, SPD)
    found = linear_solve(tiny, b, make(), on_fail="ignore")
    assert Status(int(found.status)) is not Status.CONVERGED


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("make", [CG, NormalCG])
def test_numbers_of_the_host_give_the_iterates_of_tensors(make, dtype):
    A, b = matrix(SPD, torch.float64).to(dtype), vector(dtype)
    if dtype.is_complex:
        turn = torch.triu(torch.full((N, N), 0.2j, dtype=dtype), 1)
        A, b = A + turn + turn.mH, b * (1 + 0.5j)
    operator = LinearOperator.from_matrix(A, SPD)
    tol = 1e3 * torch.finfo(dtype).eps
    host = linear_solve(operator, b, make(rtol=tol, maxiter=40))
    masked = linear_solve(operator, b, make(rtol=tol, maxiter=40, check_every=7))
    mapped = torch.func.vmap(lambda b: linear_solve(operator, b, make(rtol=tol)))(b[None])
    noted = linear_solve(operator, b, make(rtol=tol, maxiter=40, estimate_condition=True))
    exact = torch.linalg.solve(A, b)
    for found in (host, masked, noted):
        torch.testing.assert_close(found.value, exact, rtol=1e2 * tol, atol=1e2 * tol)
        assert abs(int(found.stats.iterations) - int(mapped.stats.iterations[0])) <= 1
    assert noted.stats.condition > 1
    torch.testing.assert_close(mapped.value[0], exact, rtol=1e2 * tol, atol=1e2 * tol)


def test_a_solve_in_grad_mode_keeps_its_graph():
    A, b = matrix(SPD), vector().requires_grad_()
    operator = LinearOperator.from_matrix(A, SPD).bound()
    solver = CG(rtol=1e-14)
    found = solver.compute(solver.init(operator, b), b)
    (g,) = torch.autograd.grad(found.value.sum(), b)
    torch.testing.assert_close(g, torch.linalg.solve(A, torch.ones(N, dtype=F64)))


def test_on_fail_of_the_solver_applies_unless_the_call_overrides_it():
    A, b = torch.eye(3, dtype=torch.float64), torch.full((3,), torch.nan, dtype=torch.float64)
    for solver in (CG(on_fail="ignore"), Neumann(on_fail="ignore"), Auto(on_fail="ignore")):
        found = linear_solve(A, b, solver)
        assert Status(int(found.status)) is Status.NON_FINITE
        with pytest.raises(LinearSolveError, match="NON_FINITE"):
            linear_solve(A, b, solver, on_fail="raise")
    for solver in (CG(), CG(on_fail="warn"), Auto()):
        with pytest.raises(LinearSolveError, match="NON_FINITE"):
            linear_solve(A, b, solver)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "solver",
    [CG(), NormalCG(), MINRES(), GMRES(), BiCGSTAB(), LSMR(), Neumann(60), WarmStart(CG())],
)
def test_a_right_hand_side_that_is_not_finite_is_not_solved_by_zero(
    solver: Any, bad: float
) -> None:
    """As with direct solvers; a gradient of NaN would become zero. A batch is solved apart."""
    A = torch.eye(3, dtype=torch.float64) * 0.5
    b = torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)

    def solve(b: Tensor) -> Tensor:
        value: Tensor = linear_solve(A, b, solver, on_fail="ignore").value
        return value

    for found in (torch.func.vmap(solve)(b), torch.stack([solve(row) for row in b])):
        assert bool(found[1].isnan().all())
        torch.testing.assert_close(found[0], 2 * b[0], rtol=1e-4, atol=0.0)
        assert torch.equal(found[2], b[2])


def test_a_cotangent_of_nan_gives_a_gradient_of_nan() -> None:
    root = custom_root(lambda x, a: x**3 - a, argnums=1, solve=CG(on_fail="ignore"))(
        lambda x, a: a ** (1 / 3)
    )
    a = torch.tensor([1.0, 8.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(root(None, a).sum() * math.nan, a)
    assert bool(gradient.isnan().all())
