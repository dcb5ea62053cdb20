# SPDX-License-Identifier: Apache-2.0
"""Nonlinear least squares: MINPACK's problems, scipy's answers, derivatives, statuses."""

from __future__ import annotations

import pytest
import torch
from solvers.least_squares_problems import PROBLEMS
from torch.func import hessian, jacfwd, jacrev, vmap

from torchopt.diff import Explicit
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import CG, LSMR, LU, LinearSolveWarning
from torchopt.solvers import Dogleg, GaussNewton, LevenbergMarquardt, SolveStatus

F64 = torch.float64
METHODS = {
    "gauss_newton": GaussNewton,
    "levenberg_marquardt": LevenbergMarquardt,
    "dogleg": Dogleg,
}
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(30, 3, generator=GENERATOR, dtype=F64)
TRUE = torch.tensor([1.0, -0.5, 0.8], dtype=F64)
Y = torch.exp(0.3 * A @ TRUE) + 0.05 * torch.randn(30, generator=GENERATOR, dtype=F64)
Y[::7] += 5  # outliers
START = torch.zeros(3, dtype=F64)


def misfit(x, y):
    return torch.exp(0.3 * A @ x) - y


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


def numpy_residuals(function, *args):
    return lambda x: function(torch.from_numpy(x), *args).numpy()


# On the way from the standard start the Jacobian loses rank, or the residuals at the minimum are
# so large that undamped steps do not converge.
NOT_FOR_GAUSS_NEWTON = {"freudenstein_roth", "jennrich_sampson", "brown_dennis"}


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_minpack_problems_reach_their_known_minima(method, name):
    residuals, start, minima = PROBLEMS[name]
    if method is GaussNewton and name in NOT_FOR_GAUSS_NEWTON:
        solver, start = method(on_fail="ignore", maxiter=30), torch.tensor(start, dtype=F64)
        result = solver.run(residuals, start)
        assert SolveStatus(int(result.status)) is not SolveStatus.CONVERGED
        return
    # The residuals of this one are so large that convergence is slow; its gradient begins at 1e6.
    tol = 1.0 if name == "brown_dennis" else None
    solver = method(tol=tol, maxiter=1000, on_fail="raise")
    result = solver.run(residuals, torch.tensor(start, dtype=F64))
    found = float((residuals(result.value) ** 2).sum())
    # Six digits are known.
    assert min(abs(found - known) - 1e-5 * known for known in minima) < 1e-10


# The Jacobian is singular at the minimum of this one: its solution has no derivative.
SINGULAR = {"powell_singular"}


@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - SINGULAR))
def test_minima_of_minpack_have_the_derivative_of_the_normal_equations(name):
    """With r(x) - t d: dx/dt = (J'J + sum r_i H_i)^-1 J'd, in every mode."""
    residuals, start, _ = PROBLEMS[name]
    tol = 1.0 if name == "brown_dennis" else 0.0
    solver = LevenbergMarquardt(tol=tol, maxiter=1000, on_fail="ignore", linear_solve=LU())
    x = solver(residuals, torch.tensor(start, dtype=F64))
    J = jacrev(residuals)(x)
    d = torch.randn(len(J), generator=torch.Generator().manual_seed(4), dtype=F64)
    curvature = hessian(lambda x: (residuals(x) ** 2).sum() / 2)(x)
    expected = torch.linalg.solve(curvature, J.mT @ d)
    rounding = 1e-12 * float(expected.abs().max())
    assert rounding > 0

    def fit(t):
        return solver(lambda x, t: residuals(x) - t * d, x, t)

    t = torch.zeros((), dtype=F64)
    for mode in (jacrev, jacfwd):
        torch.testing.assert_close(mode(fit)(t), expected, rtol=1e-5, atol=rounding)
    leaf = t.clone().requires_grad_()
    (found,) = torch.autograd.grad(fit(leaf)[0], leaf)
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("name", ["rosenbrock", "helical_valley", "bard", "wood", "osborne_1"])
def test_minpack_problems_as_blocks(name):
    """Two of each at once, the second from another start."""
    residuals, start, minima = PROBLEMS[name]
    start = torch.tensor(start, dtype=F64)
    solver = LevenbergMarquardt(maxiter=200, on_fail="ignore", step_solver="blocks")
    result = solver.run(vmap(residuals), torch.stack([start, 0.99 * start]))
    for x in result.value:
        found = float((residuals(x) ** 2).sum())
        assert min(abs(found - known) - 1e-5 * known for known in minima) < 1e-10


@pytest.mark.parametrize("name", ["rosenbrock", "beale", "bard", "wood", "helical_valley"])
def test_minpack_problems_by_products_with_the_jacobian(method, name):
    """The others are too badly scaled for conjugate gradients on J'J."""
    residuals, start, minima = PROBLEMS[name]
    solver = method(maxiter=1000, on_fail="raise", step_solver=CG(rtol=1e-12))
    x = solver.run(residuals, torch.tensor(start, dtype=F64)).value
    found = float((residuals(x) ** 2).sum())
    assert min(abs(found - known) - 1e-5 * known for known in minima) < 1e-10


@pytest.mark.parametrize("name", ["bard", "osborne_1"])
def test_minima_with_residuals_are_those_of_scipy(method, name):
    optimize = pytest.importorskip("scipy.optimize")
    residuals, start, _ = PROBLEMS[name]
    found = method(on_fail="raise", tol=0.0).run(residuals, torch.tensor(start, dtype=F64)).value
    expected = optimize.least_squares(
        numpy_residuals(residuals), start, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15
    ).x
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=0.0)


SETTINGS = {
    "plain": {},
    "bounded": {"lower": [-1.0, -0.2, -1.5], "upper": [0.9, 3.0, 5.0]},
    "huber": {"loss": "huber", "scale": 0.1},
    "soft_l1": {"loss": "soft_l1", "scale": 0.1},
    "cauchy_bounded": {"loss": "cauchy", "scale": 0.3, "lower": -0.4, "upper": 0.85},
    "arctan": {"loss": "arctan", "scale": 2.0},
}


def settings(name):
    options = dict(SETTINGS[name])
    for bound in ("lower", "upper"):
        if isinstance(options.get(bound), list):
            options[bound] = torch.tensor(options[bound], dtype=F64)
    return options


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_robust_and_bounded_fits_are_those_of_scipy(method, name):
    optimize = pytest.importorskip("scipy.optimize")
    options = SETTINGS[name]
    found = method(tol=1e-10, on_fail="raise", **settings(name)).run(misfit, START, Y)
    bounds = (options.get("lower", -float("inf")), options.get("upper", float("inf")))
    expected = optimize.least_squares(
        numpy_residuals(misfit, Y),
        START.numpy(),
        bounds=bounds,
        loss=options.get("loss", "linear"),
        f_scale=options.get("scale", 1.0),
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
    )
    torch.testing.assert_close(found.value, torch.from_numpy(expected.x), rtol=1e-5, atol=1e-7)
    if "lower" in options:  # some bounds are active, but not all
        lower, upper = (torch.as_tensor(bound, dtype=F64).expand(3) for bound in bounds)
        held = (found.value == lower) | (found.value == upper)
        assert 0 < held.sum() < 3


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_derivatives_of_robust_and_bounded_fits_are_differences(name):
    solver = LevenbergMarquardt(tol=1e-12, on_fail="ignore", **settings(name))
    direction = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=F64)

    def fit(t):
        return solver(misfit, START, Y + t * direction)

    t = torch.zeros((), dtype=F64)
    first = (fit(t + 1e-4) - fit(t - 1e-4)) / 2e-4
    assert first.norm() > 1e-3
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(fit)(t), first, rtol=1e-5, atol=1e-7)
    leaf = t.clone().requires_grad_()
    (found,) = torch.autograd.grad(fit(leaf).sum(), leaf)
    torch.testing.assert_close(found, first.sum(), rtol=1e-5, atol=1e-7)
    slope = jacrev(fit)
    second = (slope(t + 1e-4) - slope(t - 1e-4)) / 2e-4
    torch.testing.assert_close(jacfwd(jacrev(fit))(t), second, rtol=1e-4, atol=1e-6)
    batch = torch.tensor([0.0, 0.01, -0.02], dtype=F64)
    each = torch.stack([slope(t) for t in batch])
    torch.testing.assert_close(vmap(slope)(batch), each, rtol=1e-6, atol=1e-8)


def test_derivatives_through_the_iterations_are_those_of_the_equation(method):
    y = Y.clone().requires_grad_()
    slopes = []
    for adjoint in (None, Explicit()):
        solver = method(tol=1e-12, on_fail="ignore", adjoint=adjoint, **settings("cauchy_bounded"))
        slopes.append(torch.autograd.grad(solver(misfit, START, y).sum(), y)[0])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-10)
    assert slopes[0].norm() > 1e-3


def test_scale_and_bounds_as_functions_of_arguments_are_differentiated(method):
    solver = method(
        loss="huber",
        scale=lambda y, s, top: s,
        upper=lambda y, s, top: {"x": top},
        tol=1e-12,
        on_fail="ignore",
    )

    def fit(s, top):
        return solver(lambda x, y, *_: misfit(x["x"], y), {"x": START}, Y, s, top)["x"]

    s, top = torch.tensor(0.1, dtype=F64), torch.tensor(0.7, dtype=F64)
    found = jacrev(fit, (0, 1))(s, top)
    h = 1e-5
    differences = (
        (fit(s + h, top) - fit(s - h, top)) / (2 * h),
        (fit(s, top + h) - fit(s, top - h)) / (2 * h),
    )
    torch.testing.assert_close(found, differences, rtol=1e-5, atol=1e-7)
    assert fit(s, top)[0] == top
    assert (found[0].abs() > 1e-4).any()
    assert found[1][0] == 1
    assert (found[1][1:].abs() > 1e-4).all()  # the other unknowns move with the one at the bound


def test_the_ridge_of_the_step_solver_is_part_of_the_steps():
    generator = torch.Generator().manual_seed(2)
    M = torch.randn(12, 5, generator=generator, dtype=F64)
    y = torch.randn(12, generator=generator, dtype=F64)
    once = GaussNewton(step_solver=CG(ridge=0.5, rtol=1e-14), maxiter=1, on_fail="ignore")
    found = once.run(lambda x, y: M @ x - y, torch.zeros(5, dtype=F64), y).value
    wanted = torch.linalg.solve(M.T @ M + torch.eye(5, dtype=F64) / 2, M.T @ y)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("step_solver", ["dense", CG(rtol=1e-10), LSMR(rtol=1e-10)])
def test_trees_and_every_linear_solver_give_the_linear_closed_form(method, step_solver):
    generator = torch.Generator().manual_seed(2)
    M = torch.randn(12, 5, generator=generator, dtype=F64)
    y = torch.randn(12, generator=generator, dtype=F64)

    def residuals(x, y):
        value = M @ torch.cat([x["a"].flatten(), x["b"][None]]) - y
        return {"first": value[:7].reshape(7, 1), "rest": [value[7:]]}

    start = {"a": torch.zeros(2, 2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    solver = method(tol=1e-11, step_solver=step_solver, on_fail="raise")

    def fit(y):
        found = solver(residuals, start, y)
        return torch.cat([found["a"].flatten(), found["b"][None]])

    torch.testing.assert_close(fit(y), torch.linalg.pinv(M) @ y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jacrev(fit)(y), torch.linalg.pinv(M), rtol=1e-8, atol=1e-9)


def test_blocks_are_the_problems_one_by_one(method):
    generator = torch.Generator().manual_seed(3)
    rates = 0.5 + torch.rand(40, 1, generator=generator, dtype=F64)
    sizes = 1 + torch.rand(40, generator=generator, dtype=F64)
    t = torch.linspace(0, 2, 6, dtype=F64)
    y = sizes[:, None] * torch.exp(-rates * t) + 0.01 * torch.randn(40, 6, generator=generator)

    def residuals(x, y):
        value = x["size"][..., None] * torch.exp(-x["rate"] * t) - y
        return value[..., :2], value[..., 2:]

    def starts(*shape):
        return {"rate": torch.ones((*shape, 1), dtype=F64), "size": torch.ones(shape, dtype=F64)}

    whole = method(tol=1e-10, step_solver="blocks", on_fail="raise")
    found = whole(residuals, starts(40), y)
    one = method(tol=1e-11, on_fail="raise")
    each = vmap(lambda y: one(residuals, starts(), y))(y)
    torch.testing.assert_close(found, each, rtol=1e-7, atol=1e-8)
    dense = method(tol=1e-10, step_solver="dense", on_fail="raise").run(residuals, starts(40), y)
    blocks = whole.run(residuals, starts(40), y)
    assert int(dense.iterations) == int(blocks.iterations)

    def last_rate(y):
        return whole(residuals, starts(40), y)["rate"][-1, 0]

    gradient = torch.func.grad(last_rate)(y)
    alone = torch.func.grad(lambda y: one(residuals, starts(), y)["rate"][0])(y[-1])
    torch.testing.assert_close(gradient[-1], alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[:-1], torch.zeros(39, 6, dtype=F64), rtol=0, atol=1e-9)


def test_a_custom_loss_equals_the_named_loss(method):
    named = method(loss="cauchy", tol=1e-10)(misfit, START, Y)
    own = method(loss=lambda z: torch.log(1 + z), tol=1e-10)(misfit, START, Y)
    torch.testing.assert_close(own, named, rtol=1e-8, atol=1e-9)


def test_a_kink_at_a_bound_is_reported(method):
    solver = method(lower=0.0)

    def fit(y):
        return solver(lambda x, y: x - y, torch.zeros(2, dtype=F64), y)

    sound = torch.tensor([1.0, -1.0], dtype=F64)
    torch.testing.assert_close(jacrev(fit)(sound), torch.diag((sound > 0).double()))
    with pytest.warns(LinearSolveWarning, match="SINGULAR"):
        jacrev(fit)(torch.tensor([1.0, 0.0], dtype=F64))


def test_second_derivatives_of_a_closed_form(method):
    def root(a):
        solver = method(tol=1e-13, on_fail="ignore")
        return solver(lambda x, a: x**2 - a, torch.ones((), dtype=F64), a)

    a = torch.tensor(3.0, dtype=F64)
    torch.testing.assert_close(root(a), a.sqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(hessian(root)(a), -0.25 * a**-1.5, rtol=1e-7, atol=0)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_residuals_that_are_not_finite_are_reported(method, number):
    y = Y.clone()
    y[3] = number
    solver = method(on_fail="ignore", loss="huber", scale=0.1)
    result = solver.run(misfit, START, y)
    assert SolveStatus(int(result.status)) is SolveStatus.NON_FINITE
    both = vmap(lambda y: solver.run(misfit, START, y).status)
    statuses = both(torch.stack([y, Y])).tolist()
    assert statuses == [int(SolveStatus.NON_FINITE), int(SolveStatus.CONVERGED)]


def test_a_point_without_a_descent_is_stalled(method):
    def jump(x):  # the value rises in every direction, whatever the gradient
        return torch.where(x.detach() == 0, x + 1, x + 5)

    result = method(on_fail="ignore").run(jump, torch.zeros(2, dtype=F64))
    assert SolveStatus(int(result.status)) is SolveStatus.STALLED
    assert (result.value == 0).all()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_lower_precision_keeps_its_dtype(method, dtype, tol):
    """At |J'r| = tol, with J = 2 x, x is off by tol / (4 x^2) or by rounding."""
    solver = method(tol=tol)
    x = solver(
        lambda x, y: x**2 - y, torch.ones(2, dtype=dtype), torch.tensor([4.0, 9.0]).to(dtype)
    )
    assert x.dtype == dtype
    close = {"rtol": torch.finfo(dtype).eps, "atol": tol / 16}
    torch.testing.assert_close(x.double(), torch.tensor([2.0, 3.0], dtype=F64), **close)


@pytest.mark.parametrize("m", [0, 2])
def test_fewer_residuals_than_unknowns(method, m):
    result = method(on_fail="raise").run(lambda x: x[:m] - 1, torch.zeros(4, dtype=F64))
    expected = torch.tensor([1.0] * m + [0.0] * (4 - m), dtype=F64)
    torch.testing.assert_close(result.value, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "tukey"}, ValueError, "loss: expected one of 'linear'"),
        ({"scale": 0.0}, ValueError, "scale: expected a number > 0"),
        ({"step_solver": "sparse"}, ValueError, "step_solver: expected None, 'dense'"),
    ],
)
def test_bad_settings_are_refused(method, options, error, message):
    with pytest.raises(error, match=message):
        method(**options)


@pytest.mark.parametrize(
    ("options", "residuals", "error", "message"),
    [
        ({}, lambda x: 1.0, TypeError, "floating-point residuals, got float"),
        ({}, lambda x: torch.complex(x, x), TypeError, "residuals, got torch.complex128"),
        ({}, lambda x: (), TypeError, "at least one tensor"),
        ({"lower": torch.zeros(4)}, lambda x: x, ValueError, "lower: expected numbers, or tensors"),
        ({"lower": torch.zeros(3) * 1j}, lambda x: x, ValueError, "numbers.*got torch.complex64"),
        ({"upper": {"w": 1.0}}, lambda x: x, ValueError, "upper: expected numbers, or"),
        ({"lower": 1.0, "upper": 0.0}, lambda x: x, ValueError, "expected lower <= upper"),
        ({"step_solver": "blocks"}, lambda x: x.sum(), ValueError, r"\[blocks, ...\]"),
    ],
)
def test_bad_problems_are_refused(method, options, residuals, error, message):
    with pytest.raises(error, match=message):
        method(**options).run(residuals, START)


def test_bounds_of_a_batch_apply_to_each_entry(method):
    tops = torch.tensor([0.5, 0.9, 2.0], dtype=F64)

    def fit(top):
        return method(upper=top, loss="huber", scale=0.1, tol=1e-10)(misfit, START, Y)

    found = vmap(fit)(tops)
    torch.testing.assert_close(found, torch.stack([fit(top) for top in tops]), rtol=1e-7, atol=1e-8)
    assert (found[:2, 0] == tops[:2]).all()
    in_a_tree = vmap(
        lambda top: method(upper={"x": top}, loss="huber", scale=0.1, tol=1e-10)(
            lambda x, y: misfit(x["x"], y), {"x": START}, Y
        )["x"]
    )
    torch.testing.assert_close(in_a_tree(tops), found, rtol=1e-7, atol=1e-8)


def test_complex_unknowns_are_pairs_of_real_numbers(method):
    def residuals(z, a):
        value = z**2 - a
        return value.real, value.imag

    a = torch.tensor(3.0 + 4.0j, dtype=torch.complex128)
    root = method(tol=1e-12, on_fail="ignore")
    start = torch.tensor(1.0 + 0.5j, dtype=torch.complex128)
    torch.testing.assert_close(root(residuals, start, a), a.sqrt(), rtol=1e-9, atol=0)
    leaf = a.clone().requires_grad_()
    (found,) = torch.autograd.grad(root(residuals, start, leaf).real, leaf)
    torch.testing.assert_close(found, (1 / (2 * a.sqrt())).conj(), rtol=1e-7, atol=0)


def test_a_bound_that_requires_a_gradient_is_not_an_argument(method):
    lower = torch.tensor(0.5, dtype=F64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="argument"):
        method(lower=lower)(misfit, START, Y.clone().requires_grad_())


@pytest.mark.parametrize("loss", ["soft_l1", "huber", "cauchy", "arctan"])
def test_a_robust_loss_far_inside_its_scale_is_that_of_squares(method, loss):
    solver = method(loss=loss, scale=1e9, on_fail="raise")
    x = solver(lambda x, y: x - y, torch.zeros((), dtype=F64), Y)
    torch.testing.assert_close(x, Y.mean(), rtol=1e-8, atol=0)
