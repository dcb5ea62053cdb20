# SPDX-License-Identifier: Apache-2.0
"""Inner loops whose loss contains an inner loop, against a closed form.

Three levels, all quadratic:

    x(y, z) = run on x'Ax/2 - x'(By + Cz)
    y(z) = run on y'Dy/2 - y'Ez + |F x(y, z) - d|^2 / 2
    L(z) = |y(z) - c|^2 / 2

A run of gradient descent on a quadratic with Hessian M and linear term u is the linear map P x0 + Q
u, with P = R^T, Q = a (1 + R + ... + R^(T-1)) and R = I - aM; the minimum is P = 0, Q = M^-1. A
window, or first order, is the same value with another derivative Q', and P' for x0.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff import Explicit, Implicit, ZeroOrder
from torchopt.diff.zero_order import Gaussian
from torchopt.errors import NotTraceableError
from torchopt.linear_solve import CG, Cholesky

pytestmark = pytest.mark.filterwarnings("ignore:.*expected fewer scalars:UserWarning")
N1, N2, N3 = 3, 4, 2
STEPS, ENOUGH, RATE = 3, 18, 0.9
GENERATOR = torch.Generator().manual_seed(7)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def hessian(n: int) -> Tensor:
    a = draw(n, n)
    return torch.eye(n, dtype=torch.float64) + 0.1 * (a + a.mT) / (a + a.mT).norm()


A, D = hessian(N1), hessian(N2)
B, C, E = draw(N1, N2), draw(N1, N3), draw(N2, N3)
F = 0.05 * draw(N1, N1)
X0, Y0, Z0, GOAL, TARGET = draw(N1), draw(N2), draw(N3), draw(N1), draw(N2)
CHOLESKY = Implicit(solve=Cholesky(), positive_definite=True, tol=1e-9)


def lower(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x @ A @ x / 2 - x @ (B @ y + C @ z)


def steps_of(engine: Any) -> int:
    return ENOUGH if isinstance(engine, Implicit) else STEPS


class Map(NamedTuple):
    """x0, u -> P x0 + Q u, with the derivatives P', Q'."""

    p: Tensor
    q: Tensor
    dp: Tensor
    dq: Tensor


def powers(m: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r = torch.eye(len(m), dtype=torch.float64) - RATE * m
    every = [torch.linalg.matrix_power(r, k) for k in range(steps + 1)]
    return every[-1], RATE * torch.stack(every[:-1]).sum(0)


def linear_map(engine: Any, m: Tensor, dm: Tensor) -> Map:
    """Return the map of a run; dm is the Hessian that its derivative sees."""
    zero = torch.zeros_like(m)
    if isinstance(engine, Implicit):
        return Map(zero, torch.linalg.inv(m), zero, torch.linalg.inv(dm))
    p, q = powers(m, STEPS)
    if engine.derivative == "first_order":
        return Map(p, q, zero if engine.window else torch.eye(len(m), dtype=torch.float64), zero)
    if engine.window:
        return Map(p, q, zero, powers(dm, engine.window)[1])
    return Map(p, q, *powers(dm, STEPS))


def closed_form(inner: Any, middle: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dL/dz and dL/dy0."""
    x = linear_map(inner, A, A)
    slope = F @ x.dq @ B
    m, dm = D + slope.mT @ F @ x.q @ B, D + slope.mT @ slope
    u = E @ Z0 - slope.mT @ (F @ (x.p @ X0 + x.q @ C @ Z0) - GOAL)
    y = linear_map(middle, m, dm)
    value = y.p @ Y0 + y.q @ u
    return (
        value,
        (y.dq @ (E - slope.mT @ F @ x.dq @ C)).mT @ (value - TARGET),
        y.dp.mT @ (value - TARGET),
    )


def three_levels(inner: Any, middle: Any, **options: Any) -> Any:
    low = inner.over(lower, torchopt.sgd(RATE), steps=steps_of(inner))

    def loss(y: Tensor, batch: None, z: Tensor) -> Tensor:
        found = F @ low(X0, y, z).params - GOAL
        return y @ D @ y / 2 - y @ E @ z + (found**2).sum() / 2

    return middle.over(loss, torchopt.sgd(RATE), steps=steps_of(middle), **options)


def outer(y: Tensor) -> Tensor:
    return ((y - TARGET) ** 2).sum() / 2


def found(inner: Any, middle: Any) -> tuple[Tensor, ...]:
    z, y0 = Z0.clone().requires_grad_(), Y0.clone().requires_grad_()
    y = three_levels(inner, middle)(y0, None, z).params
    value = outer(y) + 0 * (z.sum() + y0.sum())  # first order has no graph to z, implicit to y0
    return y.detach(), *torch.autograd.grad(value, (z, y0))


EXPLICIT = {
    f"{derivative}, {keep}, {window}": Explicit(derivative=derivative, keep=keep, window=window)
    for derivative, keep, window in [
        *itertools.product(("reverse", "mixed"), ("all", "steps", 2), (None,)),
        *itertools.product(("reverse", "mixed", "first_order"), ("steps",), (2,)),
        *itertools.product(("first_order", "forward"), ("all",), (None,)),
    ]
}
IMPLICIT = {
    "implicit, Cholesky": CHOLESKY,
    "implicit, CG": Implicit(solve=CG(rtol=1e-13), positive_definite=True),
}
ENGINES = {**EXPLICIT, **IMPLICIT}
# Each level's engines, combined with engines of the other level that use other code paths.
SOME = ("reverse, all, None", "reverse, steps, 2", "mixed, 2, None", "implicit, Cholesky")
PAIRS = {*itertools.product(ENGINES, SOME), *itertools.product(SOME, ENGINES)}
TRACED = {f"trace, {d}": Explicit(execute="trace", derivative=d) for d in ("reverse", "mixed")}


@pytest.mark.parametrize(("inner", "middle"), sorted(PAIRS))
def test_three_levels_have_the_derivative_of_the_closed_form(inner: str, middle: str) -> None:
    engines = ENGINES[inner], ENGINES[middle]
    for got, expected in zip(found(*engines), closed_form(*engines)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("inner", "middle"),
    [("reverse, all, None", "trace, reverse"), ("mixed, 2, None", "trace, mixed")],
)
def test_a_loop_whose_step_is_traced_may_contain_a_loop(inner: str, middle: str) -> None:
    engines = ENGINES[inner], TRACED[middle]
    for got, expected in zip(found(*engines), closed_form(*engines)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_a_window_and_first_order_are_other_derivatives() -> None:
    names = ("reverse, all, None", "reverse, steps, 2", "first_order, all, None")
    gradients = [closed_form(ENGINES[n], CHOLESKY)[1] for n in names]
    assert all((a - b).norm() > 1e-3 for a, b in itertools.combinations(gradients, 2))


REFUSED = {
    "budget inside of implicit": (Explicit(keep="1MiB"), CHOLESKY, ValueError, 'keep="all"'),
    "traced inside": (TRACED["trace, reverse"], Explicit(), NotTraceableError, '"eager"'),
    "traced inside of mixed": (
        TRACED["trace, reverse"],
        Explicit(derivative="mixed"),
        NotTraceableError,
        '"eager"',
    ),
    "implicit inside of traced": (CHOLESKY, TRACED["trace, reverse"], NotTraceableError, '"eager"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_engines_that_do_not_nest_raise_and_name_an_alternative(case: str) -> None:
    inner, middle, error, way_out = REFUSED[case]
    with pytest.raises(error, match=way_out):
        found(inner, middle)


@pytest.mark.parametrize("middle", ["mixed, steps, None", "implicit, Cholesky"])
@pytest.mark.parametrize("inner", ["reverse, all, None", "mixed, 2, None", "implicit, Cholesky"])
def test_tasks_of_three_levels_are_the_loop_over_them(inner: str, middle: str) -> None:
    engines = ENGINES[inner], ENGINES[middle]
    z = torch.stack([Z0, -2 * Z0]).requires_grad_()
    many = three_levels(*engines, tasks=(None, None, 0))(Y0, None, z).params
    one = three_levels(*engines)
    each = torch.stack([one(Y0, None, row).params for row in z])
    torch.testing.assert_close(many, each, rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad(sum(map(outer, rows)), z)[0] for rows in (many, each))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("keep", ["all", "steps", 2])
@pytest.mark.parametrize("derivative", ["reverse", "mixed", "forward"])
def test_tasks_inside_a_loop(derivative: str, keep: Any) -> None:
    """The mean over tasks of the inner level, learned by the middle one: MAML with a meta-loss."""
    goals = torch.stack([GOAL, -GOAL, 2 * GOAL])
    low = Explicit(derivative=derivative).over(
        lambda x, goal, y, rate: rate * x @ A @ x / 2 - x @ (B @ y + goal),
        torchopt.sgd(RATE),
        steps=STEPS,
        tasks=(None, 0, None, None),
    )
    p, q = powers(A, STEPS)
    one = torch.ones((), dtype=torch.float64)

    def by_loop(y: Tensor, batch: None, z: Tensor) -> Tensor:
        x = low(X0, goals, y, one).params
        return ((x @ F.mT - GOAL) ** 2).sum() / 6 + y @ D @ y / 2 - y @ E @ z

    def by_hand(y: Tensor, batch: None, z: Tensor) -> Tensor:
        x = torch.stack([p @ X0 + q @ (B @ y + goal) for goal in goals])
        return ((x @ F.mT - GOAL) ** 2).sum() / 6 + y @ D @ y / 2 - y @ E @ z

    results = []
    for loss in (by_loop, by_hand):
        z = Z0.clone().requires_grad_()
        y = Explicit(keep=keep).over(loss, torchopt.sgd(RATE), steps=STEPS)(Y0, None, z).params
        results.append(torch.autograd.grad(outer(y), z)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("middle", ["reverse, all, None", "reverse, 2, None", "mixed, all, None"])
@pytest.mark.parametrize("inner", ["reverse, all, None", "mixed, 2, None"])
def test_a_hyper_parameter_of_the_lowest_level_is_learned_by_the_highest(
    inner: str, middle: str
) -> None:
    """Adam at the bottom with a learning rate from the top, momentum between, against torch."""
    low = ENGINES[inner].over(lower, torchopt.adam, steps=2)

    def loss(y: Tensor, batch: None, lr: Tensor) -> Tensor:
        return y @ D @ y / 2 + ((F @ low(X0, y, Z0, lr=lr, eps=0.1).params - GOAL) ** 2).sum()

    def by_hand(y: Tensor, lr: Tensor) -> Tensor:
        x, mu, nu = X0, torch.zeros_like(X0), torch.zeros_like(X0)
        for t in (1, 2):
            g = A @ x - (B @ y + C @ Z0)
            mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
            x = x - lr * (mu / (1 - 0.9**t)) / ((nu / (1 - 0.999**t)).sqrt() + 0.1)
        return y @ D @ y / 2 + ((F @ x - GOAL) ** 2).sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    run = ENGINES[middle].over(loss, torchopt.sgd(0.1, momentum=0.5), steps=2)
    (got,) = torch.autograd.grad(outer(run(Y0, None, lr).params), lr)
    y, trace = Y0, torch.zeros_like(Y0)
    for _ in range(2):
        at = y + torch.zeros_like(y).requires_grad_()
        trace = 0.5 * trace + torch.autograd.grad(by_hand(at, lr), at, create_graph=True)[0]
        y = y - 0.1 * trace
    (expected,) = torch.autograd.grad(outer(y), lr)
    assert abs(expected) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_four_levels() -> None:
    """A loop in a loop in a loop, explicit, implicit and explicit."""
    middle = three_levels(Explicit(keep=2), CHOLESKY)

    def loss(z: Tensor, batch: None, w: Tensor) -> Tensor:
        return outer(middle(Y0, None, z).params) + ((z - w) ** 2).sum()

    w = torch.ones(N3, dtype=torch.float64, requires_grad=True)
    z = Explicit(keep="steps").over(loss, torchopt.sgd(0.1), steps=2)(Z0, None, w).params
    (got,) = torch.autograd.grad(z @ Z0, w)
    # y is linear in z with the matrix J: each step is z - 0.1 (J'(y - c) + 2 (z - w)).
    x = linear_map(Explicit(), A, A)
    slope = F @ x.q @ B
    jacobian = torch.linalg.solve(D + slope.mT @ slope, E - slope.mT @ F @ x.q @ C)
    r = 0.8 * torch.eye(N3, dtype=torch.float64) - 0.1 * jacobian.mT @ jacobian
    torch.testing.assert_close(got, 0.2 * (Z0 + r.mT @ Z0), rtol=1e-10, atol=1e-11)


def test_a_sampled_level_is_within_the_error_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    sampled = ZeroOrder(
        Gaussian(), "antithetic", num_samples=400, sigma=0.1, generator=generator, vectorized=True
    )
    got, expected = found(sampled, Explicit(keep=2)), closed_form(Explicit(), Explicit())
    # A slope of x in its N2 + N3 arguments is off by (7 / 400)^1/2, 13 %, and is added to slopes
    # that are not sampled.
    for a, b in zip(got, expected, strict=True):
        assert 0 < (a - b).norm() < 0.1 * b.norm()


@pytest.mark.parametrize("keep", ["all", "steps", 1])
def test_a_loss_may_use_forward_mode_itself(keep: Any) -> None:
    """d/dx of w x^2 at 1 is 2w: the loss (2w)^2 has the gradient 8w, and a step is w (1 - 8 lr)."""

    def loss(w: Tensor, batch: None) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(one, one)
            return torch.autograd.forward_ad.unpack_dual(w * x**2).tangent ** 2

    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    run = torchopt.inner_loop(loss, torchopt.sgd(0.05), steps=3, keep=keep)
    (got,) = torch.autograd.grad(run(w).params, w)
    torch.testing.assert_close(got, torch.tensor(0.6**3, dtype=torch.float64))
