# SPDX-License-Identifier: Apache-2.0
"""Forward solvers: values and derivatives against closed forms, batches, failures."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.nn.functional import binary_cross_entropy_with_logits

from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import CG, GMRES, LU, NormalCG
from torchopt.solvers import (
    LBFGS,
    Anderson,
    Bisection,
    Broyden,
    Dogleg,
    FixedPointIteration,
    GaussNewton,
    GradientDescent,
    LeastSquares,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    SolverError,
    SolverWarning,
    SolveStatus,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(40, generator=GENERATOR, dtype=torch.float64)
LABELS = (Y > 0).double()
EYE = torch.eye(5, dtype=torch.float64)
LAM = torch.tensor(0.3, dtype=torch.float64)
ZERO = {"w": torch.zeros(5, dtype=torch.float64)}


def ridge(params, lam, data):
    fit = ((data["X"] @ params["w"] - data["Y"]) ** 2).sum() / 80
    return fit + lam / 2 * (params["w"] ** 2).sum()


DATA = {"X": X, "Y": Y, "note": "kept"}


def ridge_weights(lam):
    return torch.linalg.solve(X.T @ X / 40 + lam * EYE, X.T @ Y / 40)


MINIMIZERS = {
    "gradient_descent": GradientDescent(tol=1e-11),
    "gradient_descent_fixed": GradientDescent(tol=1e-11, lr=0.5),
    "lbfgs": LBFGS(tol=1e-11),
    "lbfgs_short": LBFGS(tol=1e-11, history=2),
    "newton_cg": NewtonCG(tol=1e-11),
}


@pytest.fixture(params=MINIMIZERS.values(), ids=MINIMIZERS.keys())
def minimizer(request):
    return request.param


def test_ridge_and_its_derivatives(minimizer):
    def weights(lam):
        return minimizer(ridge, ZERO, lam, DATA)["w"]

    torch.testing.assert_close(weights(LAM), ridge_weights(LAM), rtol=1e-9, atol=1e-9)
    first, second = jacrev(ridge_weights)(LAM), jacrev(jacrev(ridge_weights))(LAM)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(weights)(LAM), first, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacfwd(jacrev(weights))(LAM), second, rtol=1e-8, atol=1e-8)
    lam = LAM.clone().requires_grad_()
    weights(lam).sum().backward()
    torch.testing.assert_close(lam.grad, first.sum(), rtol=1e-8, atol=1e-8)


def test_gradient_with_respect_to_all_tensors_of_the_arguments(minimizer):
    data = {"X": X.clone().requires_grad_(), "Y": Y.clone().requires_grad_()}
    found = torch.autograd.grad(minimizer(ridge, ZERO, LAM, data)["w"].sum(), tuple(data.values()))

    def closed(X, Y):
        return torch.linalg.solve(X.T @ X / 40 + LAM * EYE, X.T @ Y / 40).sum()

    torch.testing.assert_close(found, grad(closed, (0, 1))(X, Y), rtol=1e-8, atol=1e-8)


def test_logistic_regression_is_that_of_dense_newton(minimizer):
    def loss(w, lam):
        return binary_cross_entropy_with_logits(X @ w, LABELS) + lam / 2 * (w * w).sum()

    w = ZERO["w"]
    for _ in range(20):
        w = w - torch.linalg.solve(hessian(loss)(w, LAM), grad(loss)(w, LAM))
    torch.testing.assert_close(minimizer(loss, ZERO["w"], LAM), w, rtol=1e-9, atol=1e-9)
    expected = -torch.linalg.solve(hessian(loss)(w, LAM), w)
    found = jacrev(lambda lam: minimizer(loss, ZERO["w"], lam))(LAM)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_batch_is_each_problem(minimizer):
    batch = torch.tensor([0.2, 0.3, 1.0], dtype=torch.float64)

    def slope(lam):
        return jacrev(lambda lam: minimizer(ridge, ZERO, lam, DATA)["w"])(lam)

    for f in (lambda lam: minimizer(ridge, ZERO, lam, DATA)["w"], slope):
        expected = torch.stack([f(lam) for lam in batch])
        torch.testing.assert_close(vmap(f)(batch), expected, rtol=1e-8, atol=1e-8)
    counts = vmap(lambda lam: minimizer.run(ridge, ZERO, lam, DATA).iterations)(batch)
    single = [int(minimizer.run(ridge, ZERO, lam, DATA).iterations) for lam in batch]
    assert all(abs(a - b) <= 3 for a, b in zip(counts.tolist(), single))
    assert len(set(counts.tolist())) > 1 or isinstance(minimizer, NewtonCG)


@pytest.mark.parametrize("solver", [LBFGS(tol=1e-10), NewtonCG(tol=1e-10)])
def test_rosenbrock_from_the_usual_start(solver):
    def rosenbrock(x, a):
        return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    a = torch.tensor(1.0, dtype=torch.float64)
    result = solver.run(rosenbrock, start, a)
    assert SolveStatus(int(result.status)) is SolveStatus.CONVERGED
    assert result.iterations < 80
    torch.testing.assert_close(result.value, torch.ones(2, dtype=torch.float64))
    found = jacrev(lambda a: solver(rosenbrock, start, a))(a)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_newton_cg_leaves_a_saddle():
    def saddle(x, a):
        return (x[0] ** 2 - a) ** 2 + x[1] ** 2

    start = torch.tensor([0.1, 1.0], dtype=torch.float64)  # negative curvature along x[0]
    a = torch.tensor(4.0, dtype=torch.float64)
    x = NewtonCG(tol=1e-10)(saddle, start, a)
    torch.testing.assert_close(x, torch.tensor([2.0, 0.0], dtype=torch.float64))


# --- fixed points ---------------------------------------------------------------------------------

W = 0.9 * X[:5] / torch.linalg.matrix_norm(X[:5], 2)
U = X[5:10]
INPUT = X[11]
FIXED_POINTS = {
    "plain": FixedPointIteration(tol=1e-12, maxiter=2000),
    "damped": FixedPointIteration(tol=1e-12, maxiter=2000, damping=0.7),
    "anderson": Anderson(tol=1e-12),
    "anderson_damped": Anderson(tol=1e-12, damping=0.5, history=3),
    "broyden": Broyden(tol=1e-12),
    "broyden_short": Broyden(tol=1e-12, history=5),
}


@pytest.fixture(params=FIXED_POINTS.values(), ids=FIXED_POINTS.keys())
def fixed_point(request):
    return request.param


def test_linear_fixed_point_and_its_jacobian(fixed_point):
    def layer(x):
        return fixed_point(lambda z, x: z @ W.T + x @ U.T, torch.zeros_like(x), x)

    torch.testing.assert_close(layer(INPUT), torch.linalg.solve(EYE - W, U @ INPUT))
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(layer)(INPUT), torch.linalg.solve(EYE - W, U))
    batch = torch.stack([INPUT, 100 * INPUT, 0 * INPUT])
    torch.testing.assert_close(vmap(layer)(batch), torch.linalg.solve(EYE - W, U @ batch.T).T)


def test_deep_equilibrium_layer_and_unrolled_gradient(fixed_point):
    def T(z, x, W, U):
        return torch.tanh(z @ W.T + x @ U.T)

    def implicit(x, W, U):
        return fixed_point(T, torch.zeros_like(x), x, W, U)

    def unrolled(x, W, U):
        z = torch.zeros_like(x)
        for _ in range(400):
            z = T(z, x, W, U)
        return z

    inputs = (INPUT, W, U)
    torch.testing.assert_close(implicit(*inputs), unrolled(*inputs), rtol=1e-9, atol=1e-9)
    found = grad(lambda *args: implicit(*args).pow(2).sum(), (0, 1, 2))(*inputs)
    expected = grad(lambda *args: unrolled(*args).pow(2).sum(), (0, 1, 2))(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_acceleration_saves_evaluations():
    def count(solver):
        return solver.run(lambda z, x: z @ W.T + x @ U.T, torch.zeros_like(INPUT), INPUT).iterations

    plain = count(FIXED_POINTS["plain"])
    assert 5 * count(Anderson(tol=1e-12)) < plain
    assert 5 * count(Broyden(tol=1e-12)) < plain


def test_anderson_on_a_linear_map_is_exact_after_n_steps():
    step = lambda z, x: z @ W.T + x @ U.T  # noqa: E731
    result = Anderson(tol=1e-9, history=6, ridge=0.0).run(step, torch.zeros_like(INPUT), INPUT)
    assert result.iterations <= 7


def test_complex_fixed_point():
    a = torch.tensor([1.0 + 1.0j, 0.5 - 2.0j], dtype=torch.complex128, requires_grad=True)
    for solver in (FixedPointIteration(tol=1e-13), Anderson(tol=1e-13), Broyden(tol=1e-13)):
        f = lambda a, s=solver: s(lambda z, a: 0.3 * z * z / (1 + z * z) + a, a.detach(), a)  # noqa: E731
        assert gradcheck(f, (a,))


# --- roots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Newton(tol=1e-13), Bisection(upper=10.0)])
def test_cube_root_to_second_order_in_every_mode(solver):
    def root(a):
        return solver(lambda x, a: x**3 - a, torch.ones_like(a), a)

    a = torch.tensor(8.0, dtype=torch.float64)
    twelfth = torch.tensor(1 / 12, dtype=torch.float64)
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(root)(a), twelfth, rtol=0, atol=1e-12)
    second = torch.tensor(-1 / 144, dtype=torch.float64)
    torch.testing.assert_close(hessian(root)(a), second, rtol=0, atol=1e-12)
    many = torch.tensor([8.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(vmap(root)(many.detach()), many.detach() ** (1 / 3))
    torch.testing.assert_close(root(many).detach(), many.detach() ** (1 / 3))
    assert gradcheck(root, (many,))
    assert gradgradcheck(root, (many,))


def test_newton_on_coupled_leaves():
    def F(x, a):
        return {"u": x["u"] ** 2 + x["v"] - a, "v": x["u"] - x["v"] ** 2}

    one = torch.ones((), dtype=torch.float64)
    x = Newton(tol=1e-13)(F, {"u": one, "v": one}, 2 * one)
    torch.testing.assert_close(x["u"], one)
    found = jacrev(lambda a: Newton(tol=1e-13)(F, {"u": one, "v": one}, a))(2 * one)
    # (2 1; 1 -2) (u', v') = (1, 0)
    torch.testing.assert_close(
        torch.stack([found["u"], found["v"]]), torch.tensor([0.4, 0.2]).double()
    )


@pytest.mark.parametrize("step_solver", [LU(ridge=1.0), GMRES(ridge=1.0, rtol=1e-14)])
def test_the_ridge_of_the_step_solver_is_part_of_the_steps(step_solver):
    x, a = torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
    once = Newton(step_solver=step_solver, maxiter=1, on_fail="ignore")
    found = once.run(lambda x, a: x**3 - a, x, a).value
    torch.testing.assert_close(found, x - (x**3 - a) / (3 * x**2 + 1), rtol=1e-12, atol=1e-12)


def test_the_ridge_of_the_normal_equations_is_part_of_the_steps():
    x, a = torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
    once = Newton(step_solver=NormalCG(ridge=1.0, rtol=1e-14), maxiter=1, on_fail="ignore")
    found = once.run(lambda x, a: x**3 - a, x, a).value
    slope = 3 * x**2
    wanted = x - slope * (x**3 - a) / (slope**2 + 1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_bisection_takes_the_logarithm_of_the_width():
    a = torch.tensor([2.0, 3.0], dtype=torch.float64)
    result = Bisection(tol=2.0**-20, upper=4.0).run(lambda x, a: x**2 - a, a, a)
    assert result.iterations == 22
    assert (result.value - a.sqrt()).abs().max() <= 2.0**-20


# --- failures -------------------------------------------------------------------------------------


def test_too_few_iterations_are_reported():
    for solver in (LBFGS(maxiter=1), GradientDescent(maxiter=1), NewtonCG(maxiter=0)):
        with pytest.warns(SolverWarning, match="MAX_ITERATIONS.*maxiter"):
            solver(ridge, ZERO, LAM, DATA)
    with pytest.raises(SolverError, match="MAX_ITERATIONS"):
        Anderson(maxiter=1, on_fail="raise")(torch.cos, torch.zeros(3))
    ignored = LBFGS(maxiter=1, on_fail="ignore").run(ridge, ZERO, LAM, DATA)
    assert SolveStatus(int(ignored.status)) is SolveStatus.MAX_ITERATIONS
    assert ignored.residual_norm > 0


def grows_both_ways(x):
    """Return a number that grows with every step, along its gradient and against it."""
    return x.sum() - 2 * x.sum().detach()


def test_divergence_nan_and_stalling_are_reported():
    one = torch.ones(2, dtype=torch.float64)
    with pytest.warns(SolverWarning, match="NON_FINITE.*damping"):
        FixedPointIteration(maxiter=1100)(lambda x: 2 * x, one)
    with pytest.warns(SolverWarning, match="NON_FINITE"):
        LBFGS()(lambda x, a: (x * a).sum() * torch.nan, one, one)
    for solver in (LBFGS(), NewtonCG(), GradientDescent()):
        with pytest.warns(SolverWarning, match=f"{type(solver).__name__}.*STALLED"):
            solver(grows_both_ways, one)
    with pytest.raises(SolverError, match="NO_BRACKET.*lower"):
        Bisection(on_fail="raise")(lambda x, a: x + a, one, one)


def test_one_failing_entry_of_a_batch_is_reported():
    solver = Bisection(upper=2.0, on_fail="raise")
    a = torch.tensor([1.0, 9.0], dtype=torch.float64)
    with pytest.raises(SolverError, match="NO_BRACKET"):
        vmap(lambda a: solver(lambda x, a: x**2 - a, a, a))(a)


def test_tensors_hidden_in_the_function_are_refused():
    lam = LAM.clone().requires_grad_()
    with pytest.raises(NotDifferentiableError, match="Pass it as an argument"):
        LBFGS()(lambda p: ridge(p, lam, DATA), ZERO)
    with torch.no_grad():
        LBFGS()(lambda p: ridge(p, lam, DATA), ZERO)


def test_linear_solver_of_the_derivative_is_a_choice():
    solver = LBFGS(tol=1e-11, linear_solve=CG(1e-13))
    found = jacrev(lambda lam: solver(ridge, ZERO, lam, DATA)["w"])(LAM)
    torch.testing.assert_close(found, jacrev(ridge_weights)(LAM), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [*MINIMIZERS.values(), LevenbergMarquardt(), Dogleg(), GaussNewton()]
)
def test_a_solution_shares_no_memory_with_the_start(solver):
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    residuals = isinstance(solver, LeastSquares)

    def solved(x, a):
        return x - a if residuals else ((x - a) ** 2).sum()

    for found in (solver(solved, start, start.clone()), solver.run(solved, start, start).value):
        found.add_(1.0)
        assert start.tolist() == [1.0, 2.0]


def test_a_fixed_point_shares_no_memory_with_the_arguments(fixed_point):
    start, a = torch.zeros(2).double(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = fixed_point(lambda x, a: a, start, a)
    torch.testing.assert_close(found, a)
    found.add_(1.0)
    assert a.tolist() == [1.0, 2.0]
    assert start.tolist() == [0.0, 0.0]


def test_invalid_input_is_refused_with_a_clear_message():
    with pytest.raises(ValueError, match="tol >= 0"):
        LBFGS(tol=-1.0)
    with pytest.raises(ValueError, match="on_fail"):
        Newton(on_fail="unroll")
    with pytest.raises(ValueError, match="history"):
        Anderson(history=0)
    with pytest.raises(TypeError, match="LBFGS: start.*floating"):
        LBFGS()(lambda x: x.sum(), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="value of T must have the structure and shapes"):
        Anderson()(lambda x: x[:1], torch.ones(2))
