# SPDX-License-Identifier: Apache-2.0
"""All engines on one inner problem, against closed forms and against each other."""

from __future__ import annotations

import dataclasses
import gc
import logging
import pkgutil
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchopt
from torchopt.diff import (
    Engine,
    Explicit,
    Implicit,
    Verify,
    ZeroOrder,
    explicit,
    implicit,
    zero_order,
)
from torchopt.diff.implicit import Adaptation
from torchopt.diff.zero_order import Gaussian
from torchopt.errors import GradientMismatchError, NotDifferentiableError
from torchopt.linear_solve import CG, Cholesky

SIZE, ROWS, PENALTY = 4, 7, 0.7
GENERATOR = torch.Generator().manual_seed(3)
A, B, C = (
    torch.randn(n, dtype=torch.float64, generator=GENERATOR)
    for n in ((ROWS, SIZE), (ROWS,), (SIZE,))
)
THETA = torch.randn(SIZE, dtype=torch.float64, generator=GENERATOR)


def loss(x, batch, theta):
    a, b = batch
    return ((a @ x - b) ** 2).sum() / (2 * ROWS) + PENALTY / 2 * ((x - theta) ** 2).sum()


def exact(a=A):
    """Return the derivative of C'x(theta): PENALTY H^-1 C."""
    hessian = a.mT @ a / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
    return PENALTY * torch.linalg.solve(hessian, C)


def sampled(n=2000, **options):
    generator = torch.Generator().manual_seed(0)
    return ZeroOrder(
        Gaussian(), "antithetic", num_samples=n, sigma=0.1, generator=generator, **options
    )


ENGINES = {
    "reverse": (Explicit(), 1e-12),
    "mixed": (Explicit(derivative="mixed"), 1e-12),
    "snapshots": (Explicit(keep=3), 1e-12),
    "implicit": (Implicit(), 1e-10),
    "implicit, cg": (Implicit(solve=CG(rtol=1e-12), positive_definite=True), 1e-10),
}


def gradient(inner, theta=THETA, batch=(A, B), start=None):
    theta = theta.clone().requires_grad_()
    start = torch.zeros(SIZE, dtype=torch.float64) if start is None else start
    result = inner(start, batch, theta)
    return torch.autograd.grad((result.params @ C).sum(), theta)[0], result


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_gives_the_closed_form_of_a_quadratic(name):
    engine, tolerance = ENGINES[name]
    found, result = gradient(engine.over(loss, torchopt.sgd(0.5), steps=200))
    torch.testing.assert_close(found, exact(), rtol=0, atol=tolerance)
    reference = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=200)(
        torch.zeros(SIZE, dtype=torch.float64), (A, B), THETA
    )
    torch.testing.assert_close(result.params, reference.params)
    torch.testing.assert_close(result.losses, reference.losses)
    assert isinstance(engine, Engine)


def test_the_explicit_gradient_converges_to_the_implicit_one():
    errors = [
        (gradient(torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=n))[0] - exact()).norm()
        for n in (5, 20, 80)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_a_zero_order_gradient_is_within_the_error_of_its_samples():
    n = 4000
    found, _ = gradient(sampled(n).over(loss, torchopt.sgd(0.5), steps=60))
    # Antithetic pairs of a linear function with gradient g: covariance (|g|^2 I + g g') / N.
    g = exact()
    covariance = ((g @ g) * torch.eye(SIZE, dtype=torch.float64) + torch.outer(g, g)) / n
    assert ((found - g).abs() < 4 * covariance.diagonal().sqrt()).all()
    assert (found - g).norm() > 0


@pytest.mark.parametrize("engine", [Explicit(), Implicit(), sampled(20)])
def test_tasks_are_the_loop_over_tasks(engine):
    thetas = torch.stack([THETA, -THETA, 2 * THETA])
    many = engine.over(loss, torchopt.sgd(0.5), steps=30, tasks=(None, None, 0))
    _, result = gradient(many, thetas)
    one = engine.over(loss, torchopt.sgd(0.5), steps=30)
    each = torch.stack([gradient(one, t)[1].params for t in thetas])
    torch.testing.assert_close(result.params, each)
    assert result.losses.shape == (3, 30)
    if isinstance(engine, ZeroOrder):
        return  # other directions, by another number of unknowns
    found, _ = gradient(many, thetas)
    expected = torch.stack([gradient(one, t)[0] for t in thetas])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("engine", "slope", "tasks"),
    [
        (Explicit(), 1.0, None),
        (Explicit(), 1.0, (0, 0)),
        (Implicit(), 1.0, None),
        (Implicit(), 1.0, (0, 0)),
        (Implicit(solve=Adaptation()), 0.8, None),
    ],
)
def test_trees_may_have_missing_leaves_and_numbers(engine, slope, tasks):
    def loss(p, batch):
        return ((p["w"] - batch["x"]) ** 2).sum() * batch["half"] * 2

    shape = (3, 2) if tasks else (2,)
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    inner = engine.over(loss, torchopt.sgd(0.4), steps=30, tasks=tasks)
    params = {"w": torch.zeros_like(x, requires_grad=False), "missing": None}
    result = inner(params, {"x": x, "missing": None, "half": 0.5, "name": "batch"})
    assert result.params["missing"] is None
    (got,) = torch.autograd.grad(result.params["w"].sum(), x)
    torch.testing.assert_close(got, torch.full_like(x, slope))


@pytest.mark.parametrize("optimizer", [torchopt.sgd(0.5, momentum=0.5), torchopt.adam(0.1)])
@pytest.mark.parametrize("engine", [Explicit(), Implicit(on_fail="ignore")])
def test_each_task_continues_from_its_own_state(engine, optimizer):
    thetas, start = torch.stack([THETA, -THETA, 2 * THETA]), torch.zeros(SIZE, dtype=torch.float64)
    first = engine.over(loss, optimizer, steps=3, tasks=(None, None, 0))
    then = engine.over(loss, optimizer, steps=2, tasks=(0, None, 0))
    found = first(start, (A, B), thetas)
    found = then(found.params, (A, B), thetas, state=found.state)
    for i, theta in enumerate(thetas):
        one = engine.over(loss, optimizer, steps=5)(start, (A, B), theta)
        torch.testing.assert_close(found.params[i], one.params, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", [Explicit(), Implicit()])
def test_transforms_give_the_closed_form(engine):
    inner = engine.over(loss, torchopt.sgd(0.5), steps=200)
    start = torch.zeros(SIZE, dtype=torch.float64)

    def outer(theta):
        return inner(start, (A, B), theta).params @ C

    torch.testing.assert_close(torch.func.grad(outer)(THETA), exact())
    _, tangent = torch.func.jvp(outer, (THETA,), (C,))
    torch.testing.assert_close(tangent, exact() @ C)
    rows = torch.func.vmap(torch.func.grad(outer))(torch.stack([THETA, -THETA]))
    torch.testing.assert_close(rows, torch.stack([exact(), exact()]))

    def quartic(theta):
        return outer(theta) ** 2

    torch.testing.assert_close(
        torch.func.hessian(quartic)(THETA), 2 * torch.outer(exact(), exact())
    )


def test_a_zero_order_loop_perturbs_a_tensor_that_is_given_twice_once():
    theta = THETA.clone().requires_grad_()
    inner = sampled(4000).over(loss, torchopt.sgd(0.5), steps=1)
    found = torch.autograd.grad(inner(theta, (A, B), theta).params @ C, theta)[0]
    expected = torch.func.grad(
        lambda t: torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=1)(t, (A, B), t).params @ C
    )(THETA)
    assert (found - expected).norm() < 4 * ((SIZE + 1) / 4000) ** 0.5 * expected.norm()


def test_hyper_parameters_of_the_call_and_of_the_transformation_are_sampled():
    start = torch.zeros(SIZE, dtype=torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    plain = torchopt.inner_loop(loss, torchopt.sgd, steps=2)
    expected = torch.autograd.grad(plain(start, (A, B), THETA, lr=rate).params @ C, rate)[0]
    called = sampled(2000).over(loss, torchopt.sgd, steps=2)(start, (A, B), THETA, lr=rate)
    held = sampled(2000).over(loss, torchopt.sgd(rate), steps=2)(start, (A, B), THETA)
    for result in (called, held):
        found = torch.autograd.grad(result.params @ C, rate)[0]
        assert (found - expected).abs() < 4 * (2 / 2000) ** 0.5 * expected.abs()


def test_an_implicit_solution_has_no_gradient_in_where_and_how_it_started():
    start = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    result = Implicit(loss, torchopt.sgd(0.5), steps=100)(start, (A, B), THETA)
    assert not result.params.requires_grad
    with pytest.raises(NotDifferentiableError, match=r"without a gradient, got `lr`"):
        Implicit(loss, torchopt.sgd, steps=2)(start, (A, B), THETA, lr=rate)
    with pytest.raises(NotDifferentiableError, match=r"got a tensor of the optimizer"):
        Implicit(loss, torchopt.sgd(rate), steps=2)(start, (A, B), THETA)
    engine = Implicit(loss, torchopt.sgd, steps=2)
    with pytest.raises(NotDifferentiableError, match=r"got `lr`"):
        torch.func.grad(lambda lr: engine(start, (A, B), THETA, lr=lr).params.sum())(rate)
    with pytest.raises(ValueError, match="one batch for all steps"):
        Implicit(loss, torchopt.sgd(0.5), steps=1)(start, None, THETA, batches=[(A, B)])


@pytest.mark.parametrize("engine", [Explicit(), Implicit(), sampled(4)])
def test_a_tensor_closed_over_raises_with_its_name(engine):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inner = engine.over(
        lambda x, batch, theta: scale * loss(x, batch, theta), torchopt.sgd(0.1), steps=2
    )
    with pytest.raises(NotDifferentiableError, match="scale"):
        gradient(inner)


def test_an_engine_over_a_problem_cannot_take_another_problem():
    inner = Implicit(loss, torchopt.sgd(0.1), steps=2)
    with pytest.raises(ValueError, match="without a loss of its own"):
        inner.over(loss, torchopt.sgd(0.1), steps=2)


@pytest.mark.parametrize("package", [explicit, implicit, zero_order])
def test_the_table_of_an_engine_has_all_its_modules(package):
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert names <= set(re.findall(r"`(\w+)`", package.__doc__))


# -- verify


def verified(other, **options):
    return torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=200, verify=Verify(other, **options))


def test_a_check_reports_cosine_and_relative_error(caplog):
    inner = verified(Implicit(), rate=1.0, limit=1e-6)
    with caplog.at_level(logging.INFO, logger="torchopt.diff"):
        found, _ = gradient(inner)
    torch.testing.assert_close(found, exact())
    (check,) = inner.report.checks
    assert check.call == 0
    assert check.cosine == pytest.approx(1.0, abs=1e-9)
    assert 0 < check.relative_error < 1e-8
    assert "relative error" in caplog.text


@pytest.mark.parametrize(("rate", "count"), [(1.0, 40), (0.25, 10), (0.1, 4), (0.01, 1)])
def test_the_share_of_the_calls_is_checked(rate, count):
    calls = []

    def other(*args, **kwargs):
        calls.append(1)
        return reference(*args, **kwargs)

    reference = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=1)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=1, verify=Verify(other, rate=rate))
    for _ in range(40):
        gradient(inner)
    assert len(calls) == len(inner.report.checks) == count
    assert inner.report.calls == 40
    assert inner.report.worst < 1e-12


def test_a_wrong_gradient_raises_past_the_limit():
    wrong = Explicit(derivative="first_order")
    with pytest.raises(GradientMismatchError, match="at most 0.1"):
        gradient(verified(wrong, rate=1.0))
    inner = verified(wrong, rate=1.0, limit=None)
    found, _ = gradient(inner)
    torch.testing.assert_close(found, exact())
    assert inner.report.worst > 0.1


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_can_be_checked(name):
    engine, _ = ENGINES[name]
    inner = engine.over(
        loss, torchopt.sgd(0.5), steps=200, verify=Verify(Implicit(solve=Cholesky()), 1.0, 1e-6)
    )
    gradient(inner)
    assert len(inner.report.checks) == 1


@pytest.mark.parametrize("engine", [Explicit(), Implicit(), sampled(20)])
def test_a_problem_keeps_the_tasks_and_the_check_of_its_engine(engine):
    check, other = Verify(Implicit(), 1.0, 1e-6), Verify(Explicit(), 0.5, 1e-3)
    made = dataclasses.replace(engine, tasks=(None, None, 0), verify=check)
    kept = made.over(loss, torchopt.sgd(0.5), steps=2)
    assert (kept.tasks, kept.verify) == ((None, None, 0), check)
    given = made.over(loss, torchopt.sgd(0.5), steps=2, tasks=(0, None, 0), verify=other)
    assert (given.tasks, given.verify) == ((0, None, 0), other)


def test_a_zero_order_loop_is_checked_by_the_explicit_one():
    inner = sampled(4000).over(
        loss, torchopt.sgd(0.5), steps=40, verify=Verify(Explicit(), rate=1.0, limit=0.5)
    )
    gradient(inner)
    # The gradient g has the covariance norm(g)^2 I + g g' over 4000.
    assert 0 < inner.report.worst < 2 * ((SIZE + 1) / 4000) ** 0.5


@pytest.mark.parametrize("other", [Explicit(keep=1), Explicit(derivative="mixed")])
def test_a_check_leaves_random_numbers_buffers_and_second_derivatives_alone(other):
    norm = torch.nn.BatchNorm1d(SIZE, affine=False, dtype=torch.float64)
    dropout = torch.nn.Dropout(0.5)

    def noisy(x, batch, theta):
        return ((norm(batch * x) - theta) ** 2).mean() + (dropout(x - theta) ** 2).sum()

    results = []
    for verify in (None, Verify(other, rate=1.0, limit=1e-9)):
        norm.reset_running_stats()
        torch.manual_seed(0)
        inner = torchopt.inner_loop(noisy, torchopt.sgd(0.1), steps=3, verify=verify)
        theta = THETA.clone().requires_grad_()
        result = inner(THETA + 1, A, theta)
        (g,) = torch.autograd.grad((result.params**2).sum(), theta, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), theta)
        results.append((g.detach(), h, norm.running_mean.clone(), torch.rand(3)))
    for plain, found in zip(*results):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    assert len(inner.report.checks) >= 1


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.tanhs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tanhs += func is torch.ops.aten.tanh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("tasks", [None, (None, 0, None)])
@pytest.mark.parametrize("derivative", ["mixed", "first_order", "differences"])
def test_a_check_differentiates_the_run_itself(derivative, tasks, window):
    dropout, steps = torch.nn.Dropout(0.5), 4

    def noisy(x, batch, theta):
        found = dropout(torch.tanh(batch * x) - theta).square().mean()
        return found, {"size": (x * theta).sum(), "count": 3}

    of_check = Explicit(derivative=derivative, window=window)
    verify = Verify(of_check, rate=1.0, limit=None)
    inner = Explicit(noisy, torchopt.adam, steps, window=window, tasks=tasks, verify=verify)
    theta = THETA.clone().requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batch = torch.stack([A, A.sin()]) if tasks else A
    torch.manual_seed(0)
    with Counted() as count:
        result = inner(THETA + 1, batch, theta, lr=lr, eps=1e-2)
        assert count.tanhs == steps
        total = (result.params**3).sum() + result.losses.sum() + (result.aux["size"] ** 2).sum()
        torch.autograd.grad(total, (theta, lr))
    # Once for the cotangents of losses and aux, then for the second derivatives, each step.
    again = {"mixed": 2, "first_order": 1, "differences": 5}[derivative]
    assert count.tanhs <= steps * (1 + again)
    (check,) = inner.report.checks
    if derivative == "first_order":
        assert check.relative_error > 1e-3
    else:
        assert check.relative_error < (1e-12 if derivative == "mixed" else 1e-5)


def test_a_batch_of_gradients_is_reported_as_unchecked():
    theta, start = THETA.clone().requires_grad_(), torch.zeros(SIZE, dtype=torch.float64)
    directions = torch.eye(SIZE, dtype=torch.float64)

    def batch_of(result):
        options = {"retain_graph": True, "is_grads_batched": True}
        return torch.autograd.grad(result.params, theta, directions, **options)[0]

    inner = verified(Explicit(), rate=1.0)
    result = inner(start, (A, B), theta)
    with pytest.warns(UserWarning, match="for a batch, .* it is not checked"):
        found = batch_of(result)
    plain = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=200)(start, (A, B), theta)
    torch.testing.assert_close(found, batch_of(plain))
    assert not inner.report.checks
    torch.autograd.grad(result.params @ C, theta)
    assert len(inner.report.checks) == 1


@pytest.mark.parametrize("backward", [True, False])
def test_a_check_is_released_with_its_result(backward):
    refs = []
    for _ in range(3):
        inner = verified(Explicit(), rate=1.0)
        theta = THETA.clone().requires_grad_()
        result = inner(torch.zeros(SIZE, dtype=torch.float64), (A, B), theta)
        if backward:
            torch.autograd.grad(result.params @ C, theta)
            assert len(inner.report.checks) == 1
        refs.append(weakref.ref(inner))
        del inner, result
    gc.collect()
    assert not any(ref() for ref in refs)


def test_a_call_inside_a_transform_is_reported_as_unchecked():
    inner = verified(Implicit(), rate=1.0)
    start = torch.zeros(SIZE, dtype=torch.float64)
    with pytest.warns(UserWarning, match="not checked"):
        torch.func.grad(lambda t: inner(start, (A, B), t).params @ C)(THETA)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Verify(Implicit(), rate=0.0), ValueError, "rate"),
        (lambda: Verify(Implicit(), limit=-1.0), ValueError, "limit"),
        (lambda: Verify(3), TypeError, "other"),
        (
            lambda: torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, verify=Implicit()),
            TypeError,
            "Verify",
        ),
    ],
)
def test_an_invalid_check_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
