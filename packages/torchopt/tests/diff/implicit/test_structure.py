# SPDX-License-Identifier: Apache-2.0
"""Complex unknowns, mixed dtypes, nested roots, batched backward passes, vmap over anything."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian as autograd_jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from torchopt.diff.implicit import certified_grad, custom_fixed_point, custom_root
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import LSMR, LU, MINRES, linear_solve, solve_cg, solve_normal_cg
from torchopt.solvers import (
    LBFGS,
    Anderson,
    Bisection,
    Broyden,
    FixedPointIteration,
    GradientDescent,
    Newton,
    NewtonCG,
)

D = torch.float64
C = torch.complex128

# --- complex unknowns -----------------------------------------------------------------------------
#
# min |x - a|^2 + Re(x^2) / 2 + |x|^2: Re x = 2/5 Re a, Im x = 2/3 Im a. Not holomorphic in a.


def objective(x, a):
    return ((x - a).abs() ** 2).sum() + 0.5 * (x * x).real.sum() + (x.abs() ** 2).sum()


def slow(x, a):
    return x - 0.1 * grad(objective)(x, a)


def closed_form(a):
    return torch.complex(a.real * 0.4, a.imag * 2 / 3)


POINT = torch.tensor([1 + 2j, -0.5 + 0.25j], dtype=C)
EXACT = {
    "default": None,
    "MINRES": MINRES(1e-12),
    "LSMR": LSMR(1e-12),
    "LU": LU(),
    "cg": solve_cg(rtol=1e-12),
    "normal_cg": solve_normal_cg(rtol=1e-12),
    "a function": lambda matvec, b: solve_cg(rtol=1e-12)(matvec, b),
}
COMPLEX = {
    **{
        f"custom_root, {name}": lambda a, solve=solve, name=name: custom_root(
            grad(objective), 1, solve=solve, symmetric=name == "MINRES"
        )(lambda s, a: closed_form(a))(None, a)
        for name, solve in EXACT.items()
    },
    "custom_root, element by element": lambda a: custom_root(grad(objective), 1, diagonal=True)(
        lambda s, a: closed_form(a)
    )(None, a),
    "custom_root, polished": lambda a: custom_root(grad(objective), 1, polish=1)(
        lambda s, a: closed_form(a) + 0.1
    )(None, a),
    "custom_fixed_point": lambda a: custom_fixed_point(slow, 1)(lambda s, a: closed_form(a))(
        None, a
    ),
    **{
        cls.__name__: lambda a, cls=cls: cls(tol=1e-11)(objective, torch.zeros_like(a), a)
        for cls in (LBFGS, GradientDescent, NewtonCG)
    },
    **{
        cls.__name__: lambda a, cls=cls: cls(tol=1e-11)(slow, torch.zeros_like(a), a)
        for cls in (FixedPointIteration, Anderson, Broyden)
    },
    "Newton": lambda a: Newton(tol=1e-11)(grad(objective), torch.ones_like(a), a),
}


def outer(x):
    return (x.real**2 * x.imag).sum() + (2 * x.imag - x.real).sin().sum()


@pytest.mark.parametrize("name", sorted(COMPLEX))
def test_complex_unknowns_of_a_function_that_is_not_holomorphic(name):
    solve = COMPLEX[name]
    torch.testing.assert_close(solve(POINT), closed_form(POINT))
    got = grad(lambda a: outer(solve(a)))(POINT)
    torch.testing.assert_close(got, grad(lambda a: outer(closed_form(a)))(POINT))
    direction = torch.tensor([0.3 - 1j, 2j], dtype=C)
    pushed = jvp(solve, (POINT,), (direction,))[1]
    torch.testing.assert_close(pushed, closed_form(direction))
    twice = grad(lambda a: grad(lambda a: outer(solve(a)))(a).real.sum())(POINT)
    truth = grad(lambda a: grad(lambda a: outer(closed_form(a)))(a).real.sum())(POINT)
    torch.testing.assert_close(twice, truth)


def test_a_complex_leaf_beside_a_real_one_gets_its_gradient():
    # z = i s, s = a, through the coupled root (z - i s, s - a).
    solved = custom_root(
        lambda x, a: {"s": x["s"] - a, "z": x["z"] - 1j * x["s"]},
        1,
    )(lambda s, a: {"s": a.clone(), "z": 1j * a})
    a = torch.tensor([1.0, 2.0], dtype=D)
    torch.testing.assert_close(
        grad(lambda a: solved(None, a)["z"].imag.pow(2).sum())(a), torch.tensor([2.0, 4.0], dtype=D)
    )
    torch.testing.assert_close(
        jacfwd(lambda a: solved(None, a)["z"].imag)(a), torch.eye(2, dtype=D)
    )


def test_real_unknowns_of_complex_arguments():
    solved = custom_root(lambda x, a: x - (a.real * a.imag), 1)(lambda s, a: a.real * a.imag)
    a = torch.tensor([1 + 2j], dtype=C, requires_grad=True)
    solved(None, a).sum().backward()
    torch.testing.assert_close(a.grad, torch.tensor([2 + 1j], dtype=C))


def test_complex_residuals_of_real_unknowns_are_refused():
    solved = custom_root(lambda x, a: (x - a) * 1j, 1)(lambda s, a: a.clone())
    with pytest.raises(TypeError, match=r"expected real numbers.*complex128"):
        grad(lambda a: solved(None, a))(torch.tensor(1.0, dtype=D))


def test_the_certificate_of_complex_unknowns():
    solved = custom_root(grad(objective), 1)(lambda s, a: closed_form(a) + 1e-3)
    _, (got,), report = certified_grad(lambda x, a: outer(x), solved)(None, POINT)
    truth = grad(lambda a: outer(closed_form(a)))(POINT)
    error = torch.linalg.vector_norm(got - truth)
    assert 0.5 < (report.gradient_error / error).item() < 2


# --- mixed dtypes ---------------------------------------------------------------------------------

A64 = torch.tensor([8.0], dtype=D)
ONE32 = torch.ones(1)
MIXED = {
    "custom_root": lambda a: custom_root(lambda x, a: x**3 - a, 1)(
        lambda s, a: a.float() ** (1 / 3)
    )(None, a),
    "custom_fixed_point": lambda a: custom_fixed_point(lambda x, a: x - (x**3 - a) / 12, 1)(
        lambda s, a: a.float() ** (1 / 3)
    )(None, a),
    **{
        cls.__name__: lambda a, cls=cls: cls()(lambda x, a: x - (x**3 - a) / 12, 1.5 * ONE32, a)
        for cls in (FixedPointIteration, Anderson, Broyden)
    },
    "Newton": lambda a: Newton()(lambda x, a: x**3 - a, 1.5 * ONE32, a),
    **{
        cls.__name__: lambda a, cls=cls: cls(tol=1e-5)(
            lambda x, a: (x**4 / 4 - a * x).sum(), 1.5 * ONE32, a
        )
        for cls in (LBFGS, NewtonCG)
    },
}


EPS = torch.finfo(torch.float32).eps
# By how much x = 2 may be off, where the slope of the equation is 12, and that of the maps is 1.
OFF = {
    **dict.fromkeys(("custom_root", "custom_fixed_point"), EPS),
    **dict.fromkeys(("FixedPointIteration", "Anderson", "Broyden"), EPS**0.5),
    "Newton": EPS**0.5 / 12,
    **dict.fromkeys(("LBFGS", "NewtonCG"), 1e-5 / 12),
}


@pytest.mark.parametrize("name", sorted(MIXED))
def test_unknowns_in_float32_and_arguments_in_float64(name):
    """The derivatives are 1 / (3 x^2) and -2 / (9 x^5), where x is the solution that was found."""
    solve, off = MIXED[name], OFF[name] / 2 + 4 * EPS
    value, pushed = jvp(solve, (A64,), (torch.ones_like(A64),))
    assert value.dtype == pushed.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor([2.0]), rtol=off, atol=0)
    torch.testing.assert_close(pushed, torch.tensor([1 / 12]), rtol=2.01 * off, atol=0)
    pulled = grad(lambda a: solve(a).sum())(A64)
    assert pulled.dtype == D
    torch.testing.assert_close(pulled, torch.tensor([1 / 12], dtype=D), rtol=2.01 * off, atol=0)
    second = hessian(lambda a: solve(a).sum())(A64)
    torch.testing.assert_close(second, torch.tensor([[-1 / 144]], dtype=D), rtol=5.05 * off, atol=0)


# --- roots inside roots ------------------------------------------------------------------------
#
# y(x)^2 = x and x y(x) = a, so x = a^(2/3).

inner = custom_root(lambda y, x: y * y - x, argnums=1)(lambda s, x: x.sqrt())
NESTED = {
    "custom_root": custom_root(lambda x, a: x * inner(None, x) - a, 1)(lambda s, a: a ** (2 / 3)),
    "symmetric": custom_root(lambda x, a: x * inner(None, x) - a, 1, symmetric=True)(
        lambda s, a: a ** (2 / 3)
    ),
    "fixed point": custom_fixed_point(lambda x, a: x - x * inner(None, x) + a, 1)(
        lambda s, a: a ** (2 / 3)
    ),
    "of solvers": lambda s, a: Newton(tol=1e-13)(
        lambda x, a: x * LBFGS(tol=1e-13)(lambda y, x: y**3 / 3 - x * y, x.detach().sqrt(), x) - a,
        a.detach() ** (2 / 3),
        a,
    ),
}
PAIRS = {
    f"{first.__name__} of {second.__name__}": lambda f, p=first, q=second: p(q(f))
    for first in (grad, jacrev, jacfwd)
    for second in (grad, jacrev, jacfwd)
} | {"hessian": hessian}


@pytest.mark.parametrize("pair", sorted(PAIRS))
@pytest.mark.parametrize("name", sorted(NESTED))
def test_a_root_inside_a_root_to_second_order(name, pair):
    a = torch.tensor(8.0, dtype=D)
    got = PAIRS[pair](lambda a: NESTED[name](None, a))(a)
    expected = torch.tensor(-2 / 9 * 8 ** (-4 / 3), dtype=D)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# --- batched backward passes ----------------------------------------------------------------------

MATRIX = torch.tensor([[2.0, 1.0], [0.5, 4.0]], dtype=D)
POSITIVE = torch.tensor([8.0, 27.0], dtype=D)
BATCHED = {
    "custom_root": lambda a: custom_root(lambda x, a: x**3 - a, 1)(lambda s, a: a ** (1 / 3))(
        None, a
    ),
    "coupled": lambda a: custom_root(lambda x, a: MATRIX @ x - a**2, 1)(
        lambda s, a: torch.linalg.solve(MATRIX, a**2)
    )(None, a),
    "linear_solve": lambda a: linear_solve(MATRIX * a[0], a, LU()).value,
    "LBFGS": lambda a: LBFGS(tol=1e-12)(lambda x, a: (x**4 / 4 - a * x).sum(), 2 + 0 * a, a),
    "FixedPointIteration": lambda a: FixedPointIteration(tol=1e-12)(
        lambda x, a: x - (x**3 - a) / 30, 2 + 0 * a, a
    ),
}


@pytest.mark.parametrize("name", sorted(BATCHED))
def test_a_batched_backward_pass(name):
    function = BATCHED[name]
    for create_graph in (False, True):
        expected = autograd_jacobian(function, POSITIVE, create_graph=create_graph)
        got = autograd_jacobian(function, POSITIVE, create_graph=create_graph, vectorize=True)
        torch.testing.assert_close(got, expected)
    curvature = autograd_hessian(lambda a: function(a).sum(), POSITIVE, vectorize=True)
    torch.testing.assert_close(curvature, autograd_hessian(lambda a: function(a).sum(), POSITIVE))


# --- vmap over arguments that are not floats ------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 2, dtype=D, generator=GENERATOR)
Y = torch.randn(6, dtype=D, generator=GENERATOR)
ROWS = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [0, 0, 1, 5]])
LAM = torch.tensor(0.1, dtype=D)


def fit(w, lam, rows):
    return ((X[rows] @ w - Y[rows]) ** 2).sum() / 8 + lam * (w**2).sum()


def step(w, lam, rows):
    return w - 0.3 * grad(fit)(w, lam, rows)


BOOTSTRAP = {
    **{cls.__name__: lambda cls=cls: (cls(tol=1e-10), fit) for cls in (LBFGS, NewtonCG)},
    "GradientDescent": lambda: (GradientDescent(tol=1e-10), fit),
    "FixedPointIteration": lambda: (FixedPointIteration(tol=1e-10), step),
    "Anderson": lambda: (Anderson(tol=1e-10), step),
    "Newton": lambda: (Newton(tol=1e-10), grad(fit)),
}


@pytest.mark.parametrize("name", sorted(BOOTSTRAP))
def test_vmap_over_integer_arguments(name):
    solver, function = BOOTSTRAP[name]()

    def weights(lam, rows):
        return solver(function, torch.zeros(2, dtype=D), lam, rows)

    batched = vmap(weights, (None, 0))(LAM, ROWS)
    torch.testing.assert_close(batched, torch.stack([weights(LAM, r) for r in ROWS]))
    slopes = vmap(jacrev(weights), (None, 0))(LAM, ROWS)
    torch.testing.assert_close(slopes, torch.stack([jacrev(weights)(LAM, r) for r in ROWS]))
    outside = jacrev(lambda lam: vmap(weights, (None, 0))(lam, ROWS))(LAM)
    torch.testing.assert_close(outside, slopes)


def test_vmap_over_integer_arguments_alone():
    def weights(rows):
        return LBFGS(tol=1e-10)(lambda w, rows: fit(w, 0.1, rows), torch.zeros(2, dtype=D), rows)

    torch.testing.assert_close(vmap(weights)(ROWS), torch.stack([weights(r) for r in ROWS]))


EIGHT = torch.tensor(8.0, dtype=D)
FIELDS = {
    "upper": lambda u, a: Bisection(upper=u)(lambda x, a: x**3 - a, a * 0, a),
    "lower": lambda u, a: Bisection(lower=-u, upper=5.0)(lambda x, a: x**3 - a, a * 0, a),
    "lr": lambda u, a: GradientDescent(lr=u / 500, tol=1e-12)(
        lambda x, a: x**4 / 4 - a * x, a * 0 + 1, a
    ),
}


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_vmap_over_a_field_of_a_solver(field):
    values = torch.tensor([3.0, 10.0], dtype=D)
    function = FIELDS[field]
    torch.testing.assert_close(vmap(function, (0, None))(values, EIGHT), 2 + 0 * values)
    slopes = vmap(grad(function, 1), (0, None))(values, EIGHT)
    torch.testing.assert_close(slopes, 1 / 12 + 0 * values)
    # Where the solver starts and how it steps does not move the solution.
    torch.testing.assert_close(grad(function)(values[0], EIGHT), 0 * EIGHT)


# --- arguments that a function ignores ------------------------------------------------------------

ignoring = custom_root(lambda x, a, b: x**3 - a, argnums=(1, 2))(lambda s, a, b: a ** (1 / 3))


def test_an_ignored_argument_is_refused_where_its_gradient_is_wanted():
    for run in (
        lambda: grad(lambda b: ignoring(None, EIGHT, b))(EIGHT),
        lambda: jvp(lambda b: ignoring(None, EIGHT, b), (EIGHT,), (EIGHT,)),
        lambda: ignoring(None, EIGHT, EIGHT.clone().requires_grad_()).backward(),
    ):
        with pytest.raises(NotDifferentiableError, match="argument 2"):
            run()


def test_an_ignored_argument_is_accepted_where_its_gradient_is_not_wanted():
    expected = torch.tensor(1 / 12, dtype=D)
    torch.testing.assert_close(grad(lambda a: ignoring(None, a, EIGHT))(EIGHT), expected)
    torch.testing.assert_close(
        jvp(lambda a: ignoring(None, a, EIGHT), (EIGHT,), (EIGHT / 8,))[1], expected
    )
    batched = vmap(grad(lambda a: ignoring(None, a, EIGHT)))(EIGHT[None])
    torch.testing.assert_close(batched, expected[None])
    a = EIGHT.clone().requires_grad_()
    ignoring(None, a, EIGHT).backward()
    torch.testing.assert_close(a.grad, expected)


# --- evaluations ----------------------------------------------------------------------------------


def test_one_evaluation_gives_both_jacobians():
    seen = []

    def equation(x, a, b):
        seen.append(1)
        return x**3 + x * b.sum() - a

    def solve(start, a, b):
        x = torch.ones_like(a)
        for _ in range(60):
            x = x - (x**3 + x * b.sum() - a) / (3 * x * x + b.sum())
        return x

    solved = custom_root(equation, (1, 2), solve=solve_cg(rtol=1e-14), symmetric=True)(solve)
    a = torch.tensor([1.0, 2.0, 5.0], dtype=D, requires_grad=True)
    b = torch.tensor([0.5, 0.25], dtype=D, requires_grad=True)
    x = solved(None, a, b)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    seen.clear()
    found = torch.autograd.grad(x, (a, b), w, retain_graph=True)
    assert len(seen) == 1
    seen.clear()
    again = torch.autograd.grad(x, (a, b), w, create_graph=True)
    assert len(seen) > 1
    slope = 1 / (3 * x * x + b.sum())
    exact = w * slope, (-(w * slope * x).sum()).expand(2)
    for got in (found, again):
        torch.testing.assert_close(got, exact)
