# SPDX-License-Identifier: Apache-2.0
"""Statuses are correct for every solver: CONVERGED means a finite value, a small residual."""

from __future__ import annotations

import pytest
import torch

from torchopt.errors import NotDifferentiableError
from torchopt.solvers import (
    LBFGS,
    Anderson,
    Bisection,
    Broyden,
    FixedPointIteration,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    ProjectedGradient,
    ProximalGradient,
    SolverError,
    SolveStatus,
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
from torchopt.tree import tree_map

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
START = torch.full((3,), 0.5, dtype=F64)


def box(v, *args):
    return tree_map(lambda x: project_box(x, -2.0, 2.0), v)


def shrink(v, step, *args):
    return tree_map(lambda x: prox_l1(x, 1e-9 * step), v)


MINIMIZERS = {
    "lbfgs": LBFGS(on_fail="ignore"),
    "gradient_descent": GradientDescent(on_fail="ignore"),
    "gradient_descent_fixed": GradientDescent(on_fail="ignore", lr=0.2),
    "newton_cg": NewtonCG(on_fail="ignore"),
    "projected": ProjectedGradient(on_fail="ignore", projection=box),
    "projected_fixed": ProjectedGradient(on_fail="ignore", projection=box, lr=0.2),
    "proximal": ProximalGradient(on_fail="ignore", prox=shrink),
}
MAPS = {
    "plain": FixedPointIteration(on_fail="ignore", maxiter=2000),
    "anderson": Anderson(on_fail="ignore"),
    "broyden": Broyden(on_fail="ignore"),
}
ROOTS = {
    "newton": Newton(on_fail="ignore"),
    "bisection": Bisection(on_fail="ignore", lower=-1.0, upper=3.0),
}


def barrier(x, a):
    """(x - 1)² - log x, infinite where x ≤ 0."""
    inside = torch.where(x > 0, x, 1.0)
    return (torch.where(x > 0, (x - a) ** 2 - torch.log(inside), INF)).sum()


# name: (objective, start, argument, whether there is a minimum that the start leads to)
OBJECTIVES = {
    "quadratic": (lambda x, a: ((x - a) ** 2).sum(), START, 1.0, True),
    "nan_argument": (lambda x, a: ((x - a) ** 2).sum(), START, NAN, False),
    "infinite_argument": (lambda x, a: ((x - a) ** 2).sum(), START, INF, False),
    "nan_start": (lambda x, a: ((x - a) ** 2).sum(), START * NAN, 1.0, False),
    "outside_a_barrier": (barrier, -START, 1.0, False),
    "inside_a_barrier": (barrier, START, 1.0, True),
    "constant_infinity": (lambda x, a: (0 * x).sum() + INF, START, 1.0, False),
    "constant_nan": (lambda x, a: (0 * x).sum() + NAN, START, 1.0, False),
    "minus_infinity": (lambda x, a: (0 * x).sum() - INF, START, 1.0, False),
    "nan_value_beside_a_gradient": (lambda x, a: (x.detach() * NAN + x).sum(), START, 1.0, False),
}


@pytest.mark.parametrize("problem", sorted(OBJECTIVES))
@pytest.mark.parametrize("name", sorted(MINIMIZERS))
def test_minimizers_converge_to_finite_values_only(name, problem):
    f, start, number, expected = OBJECTIVES[problem]
    solver, a = MINIMIZERS[name], torch.full((3,), number, dtype=F64)
    result = solver.run(f, start, a)
    converged = int(result.status) == int(SolveStatus.CONVERGED)
    assert converged == expected
    if converged:
        assert f(result.value, a).isfinite()
        assert torch.func.grad(f)(result.value, a).norm() < 1e-6
    else:
        assert SolveStatus(int(result.status)) is SolveStatus.NON_FINITE
    # The same beside a sound problem in a batch.
    batch = torch.func.vmap(lambda s, a: solver.run(f, s, a).status)
    both = batch(torch.stack([start, START]), torch.stack([a, torch.ones_like(a)]))
    assert int(both[0]) == int(result.status)


NAN_MAPS = {
    "nan_argument": lambda x, a: 0.5 * x + NAN * a,
    "nan_close_to_the_solution": lambda x, a: torch.where(x > 0.9, NAN, 0.5 * x + 0.5),
    "infinite": lambda x, a: x * 0 + INF,
}


@pytest.mark.parametrize("problem", sorted(NAN_MAPS))
@pytest.mark.parametrize("name", sorted(MAPS))
def test_fixed_points_that_meet_nan_do_not_converge(name, problem):
    result = MAPS[name].run(NAN_MAPS[problem], START, torch.ones_like(START))
    assert SolveStatus(int(result.status)) is SolveStatus.NON_FINITE


NO_ROOTS = {
    "nan_inside": (lambda x: torch.where((x > 0.2) & (x < 1.5), NAN, x - 1.6), "NON_FINITE"),
    "nan_everywhere": (lambda x: x * NAN, "NON_FINITE"),
    "nan_at_a_bound": (lambda x: torch.where(x < -0.9, NAN, x - 0.7), "NON_FINITE"),
    "pole": (lambda x: 1 / (x - 1), "NO_BRACKET"),
    "jump": (lambda x: torch.where(x > 1.1, 1.0, -1.0).to(x.dtype), "NO_BRACKET"),
    "one_sign": (lambda x: x * x + 1, "NO_BRACKET"),
}


@pytest.mark.parametrize("problem", sorted(NO_ROOTS))
def test_bisection_reports_what_is_not_a_root(problem):
    F, status = NO_ROOTS[problem]
    with pytest.raises(SolverError, match=status):
        Bisection(on_fail="raise", lower=-1.0, upper=3.0).run(F, START)


PROXES = {
    "box": lambda x: project_box(x, -1.0, 1.0),
    "non_negative": project_non_negative,
    "simplex": project_simplex,
    "l1_ball": project_l1_ball,
    "l2_ball": project_l2_ball,
    "l1": prox_l1,
    "l2_squared": prox_l2_squared,
    "elastic_net": prox_elastic_net,
    "group_lasso": prox_group_lasso,
}


@pytest.mark.parametrize("name", sorted(PROXES))
def test_nan_stays_nan_and_affects_only_its_row(name):
    f = PROXES[name]
    x = torch.tensor([[0.3, NAN, -2.0], [0.3, 0.1, -2.0]], dtype=F64)
    y = f(x)
    assert y[0, 1].isnan()
    torch.testing.assert_close(y[1], f(x[1]))
    assert y[1].isfinite().all()
    result = ProximalGradient(on_fail="ignore", prox=lambda v, s, a: f(v)).run(
        lambda x, a: ((x - a) ** 2).sum(), START, START * NAN
    )
    assert SolveStatus(int(result.status)) is SolveStatus.NON_FINITE


def test_bounds_and_radii_of_nan_are_nan():
    for f in (project_simplex, project_l1_ball, project_l2_ball, prox_l1, prox_group_lasso):
        assert f(2 * START, NAN).isnan().all()
    assert project_box(START, NAN).isnan().all()
    assert project_box(START, None, torch.tensor(NAN)).isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_balls_and_groups_in_float32_of_any_size(scale):
    x = torch.tensor([3.0, 4.0]) * scale
    torch.testing.assert_close(project_l2_ball(x, scale) / scale, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(prox_group_lasso(x, scale) / scale, torch.tensor([2.4, 3.2]))


EVERY = {**MINIMIZERS, **MAPS, **ROOTS}


def assert_solved(name, x, a):
    """At |F(x)| <= sqrt(eps), the default, x is off by that over the slope of `problem_of`."""
    slope = 2.0 if name in MINIMIZERS else 0.5 if name in MAPS else 1.0
    eps = torch.finfo(x.dtype).eps
    assert torch.linalg.vector_norm(x.double() - a) <= eps**0.5 / slope + 8 * eps


def problem_of(name):
    """Return a function of (tree, a) whose solution is w = a, for the kind of the solver."""
    if name in MINIMIZERS:
        return lambda p, a: ((p["w"] - a) ** 2).sum()
    if name in MAPS:
        return lambda p, a: {"w": 0.5 * (p["w"] + a), "n": p["n"]}
    return lambda p, a: {"w": p["w"] - a, "n": p["n"]}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_none_in_the_unknowns(name):
    start = {"w": START, "n": None}
    a = torch.tensor([0.4, 0.6, 0.9], dtype=F64, requires_grad=True)
    x = EVERY[name](problem_of(name), start, a)
    assert x["n"] is None
    assert_solved(name, x["w"].detach(), a.detach())
    torch.testing.assert_close(torch.autograd.grad(x["w"].sum(), a)[0], torch.ones_like(a))


@pytest.mark.parametrize("name", sorted(EVERY))
def test_unknowns_in_float32_with_arguments_in_float64(name):
    a = torch.tensor([0.4, 0.6, 0.9], dtype=F64, requires_grad=True)
    x = EVERY[name](problem_of(name), {"w": START.float(), "n": None}, a)["w"]
    assert x.dtype == torch.float32
    assert_solved(name, x.detach(), a.detach())
    torch.testing.assert_close(torch.autograd.grad(x.sum(), a)[0], torch.ones_like(a))


@pytest.mark.parametrize("name", sorted(EVERY))
def test_no_unknowns(name):
    empty = {"w": torch.zeros(0, dtype=F64), "n": None}
    result = EVERY[name].run(problem_of(name), empty, torch.zeros(0, dtype=F64))
    assert result.value["w"].shape == (0,)
    assert int(result.status) == int(SolveStatus.CONVERGED)
    with pytest.raises(TypeError, match=r"start: expected a tree with at least one tensor"):
        EVERY[name].run(problem_of(name), {"n": None}, START)


def test_bounds_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"broadcast to the shape \(3,\)"):
        Bisection(upper=torch.ones(2)).run(lambda x: x, START)


def test_a_step_that_is_a_tensor_does_not_change_the_derivative():
    a = torch.tensor([0.4, 0.6, 0.9], dtype=F64, requires_grad=True)
    lr = torch.tensor(0.2, dtype=F64, requires_grad=True)
    for solver in (
        GradientDescent(lr=lr),
        ProjectedGradient(lr=lr, projection=box),
        ProximalGradient(lr=lr, prox=lambda v, s, a: prox_l1(v, 0.1 * s)),
    ):
        x = solver(lambda x, a: ((x - a) ** 2).sum(), START, a)
        torch.testing.assert_close(torch.autograd.grad(x.sum(), a)[0], torch.ones_like(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["iteration", "anderson", "broyden"])
def test_fixed_points_in_half_precision(name, dtype):
    solvers = {"iteration": FixedPointIteration, "anderson": Anderson, "broyden": Broyden}
    a, eps = torch.tensor([0.5, 0.25], dtype=dtype), torch.finfo(dtype).eps
    result = solvers[name](tol=eps).run(lambda x, a: 0.25 * x + a, torch.zeros_like(a), a)
    assert result.value.dtype is dtype
    assert int(result.status) == int(SolveStatus.CONVERGED)
    # |f(x) - x| = 0.75 |x - a / 0.75| is at most eps, and rounded to about as much.
    error = result.value.double() - a.double() / 0.75
    assert torch.linalg.vector_norm(error) <= 2 * eps / 0.75


@pytest.mark.parametrize("name", sorted(MINIMIZERS))
def test_an_objective_without_a_gradient_is_refused(name):
    """A count has a zero gradient everywhere, so every point would look like a minimum."""
    results = {
        "torch.int64 of shape": lambda x, a: (x > a).sum(),
        r"float64 of shape \(3,\)": lambda x, a: x - a,
        "complex128 of shape": lambda x, a: (x - a).sum() + 0j,
        "got tuple": lambda x, a: ((x - a).sum(), None),
        "got float": lambda x, a: 1.0,
    }
    a = torch.ones(3, dtype=F64)
    for expected, function in results.items():
        for call in (MINIMIZERS[name], MINIMIZERS[name].run):
            with pytest.raises(TypeError, match=expected):
                call(function, START, a)


@pytest.mark.parametrize("name", [*sorted(MINIMIZERS), "least_squares"])
def test_an_objective_that_ignores_the_unknowns_is_refused(name):
    """Its gradient is zero everywhere, so every start would look like a minimum."""
    solver = {**MINIMIZERS, "least_squares": LevenbergMarquardt()}[name]
    functions = {
        "ignored": lambda x, a: (a**2).sum(),
        "detached": lambda x, a: ((x.detach() - a) ** 2).sum(),
    }
    a = torch.ones(3, dtype=F64)
    for function in functions.values():
        for call in (solver, solver.run):
            with pytest.raises(NotDifferentiableError, match="depends on its first argument"):
                call(function, START, a)
        with pytest.raises(NotDifferentiableError, match="depends on its first argument"):
            # The outer level that differentiates the value is not that of the gradient.
            torch.func.grad(lambda a, f=function: solver(f, START, a).sum())(a)
