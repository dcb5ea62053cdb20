# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products from differences of gradients, against exact ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from unrolled_loops import loss_of, outer, problem

import torchopt
from torchopt.diff import Differences, Explicit, Implicit, Verify
from torchopt.diff.differences import Judge, Product
from torchopt.diff.implicit import Adaptation, custom_root
from torchopt.errors import GradientMismatchError, NotDifferentiableError
from torchopt.linear_solve import CG, LSMR, Cholesky, Neumann

SIZE, ROWS, PENALTY, ALPHA = 4, 7, 0.7, 0.1
GENERATOR = torch.Generator().manual_seed(5)
A, B, C = (
    torch.randn(*n, dtype=torch.float64, generator=GENERATOR)
    for n in ((ROWS, SIZE), (ROWS,), (SIZE,))
)
THETA, START = torch.linspace(-1, 1, SIZE).double(), torch.linspace(0.5, 1, SIZE).double()
TWO = Differences(gradients=2)


def proximal(x: Tensor, batch: None, theta: Tensor) -> Tensor:
    return ((A @ x - B) ** 2).sum() / (2 * ROWS) + PENALTY / 2 * ((x - theta) ** 2).sum()


def pulled(inner: Any, theta: Tensor = THETA, start: Tensor = START) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(inner(start, None, theta).params @ C, theta)[0]


def meta_gradient(
    derivative: Any, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Explicit]:
    """Return the gradient of a run of Adam with respect to all of its inputs, as one vector."""
    params, batch, scale = problem()
    params = {k: x.to(dtype).requires_grad_() for k, x in params.items()}
    batch = tuple(x.to(dtype).requires_grad_() for x in batch)
    scale = scale.to(dtype).requires_grad_()
    lr = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    inputs = [*params.values(), *batch, scale, lr]
    inner = torchopt.inner_loop(loss_of, torchopt.adam, steps=4, derivative=derivative, **options)
    result = inner(params, batch, scale, lr=lr, eps=1e-2)
    value = outer(result.params, result.losses, result.state)
    found = torch.autograd.grad(value, inputs, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).double(), inner


@pytest.mark.parametrize(
    "options", [{}, {"keep": 2}, {"keep": "1MiB"}, {"window": 2}, {"keep": 1, "window": 3}]
)
@pytest.mark.parametrize(("derivative", "tolerance"), [("differences", 1e-11), (TWO, 1e-8)])
def test_a_run_has_the_gradient_of_exact_products(
    derivative: Any, tolerance: float, options: dict[str, Any]
) -> None:
    expected, _ = meta_gradient("reverse", **options)
    found, inner = meta_gradient(derivative, **options)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    assert len(inner.report.differences) == 1
    assert inner.report.differences[0] < 1e-3


@pytest.mark.parametrize("derivative", ["differences", TWO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_estimate_is_above_the_error(derivative: Any, dtype: torch.dtype) -> None:
    expected, _ = meta_gradient("reverse")
    found, inner = meta_gradient(derivative, dtype)
    exact32, _ = meta_gradient("reverse", dtype)
    rounding = (exact32 - expected).norm() / expected.norm()
    error = (found - expected).norm() / expected.norm()
    assert error <= 4 * inner.report.differences[0] + rounding
    assert error < (1e-3 if dtype == torch.float32 else 1e-8)


def test_an_optimal_step_has_less_error_than_longer_and_shorter_ones() -> None:
    expected, _ = meta_gradient("reverse")
    errors = {
        step: (meta_gradient(Differences(gradients=2, step=step, limit=None))[0] - expected).norm()
        for step in (1e-2, None, 1e-10)
    }
    assert errors[None] < 0.01 * errors[1e-2]
    assert errors[None] < 0.01 * errors[1e-10]


def test_tasks_are_the_loop_over_tasks_whatever_their_sizes() -> None:
    """Directions of size 1e-6 and 1: each task has its own displacement."""
    inner = torchopt.inner_loop(
        lambda x, batch, t: proximal(x, None, t) + (x**4).sum() / 9,
        torchopt.sgd(0.1),
        steps=3,
        derivative="differences",
        tasks=(None, None, 0),
    )
    exact = torchopt.inner_loop(inner.loss, torchopt.sgd(0.1), steps=3, tasks=(None, None, 0))
    thetas = torch.stack([THETA, -THETA])
    weights = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    found = []
    for loop in (inner, exact):
        t, start = thetas.clone().requires_grad_(), START.clone().requires_grad_()
        value = weights @ (loop(start, None, t).params @ C)
        found.append(torch.autograd.grad(value, (t, start)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


class Once(torch.autograd.Function):
    """x^3 by an operation without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def with_once(x: Tensor, batch: None, theta: Tensor) -> Tensor:
    return proximal(x, None, theta) + Once.apply(x) @ x / 20


def with_cube(x: Tensor, batch: None, theta: Tensor) -> Tensor:
    return proximal(x, None, theta) + (x**3) @ x / 20


def test_an_operation_without_a_second_derivative() -> None:
    expected = pulled(torchopt.inner_loop(with_cube, torchopt.sgd(0.2), steps=5))
    inner = torchopt.inner_loop(with_once, torchopt.sgd(0.2), steps=5, derivative="differences")
    torch.testing.assert_close(pulled(inner), expected, rtol=1e-10, atol=1e-12)
    # torch would leave the second derivative out silently.
    with pytest.raises(NotDifferentiableError, match='Once, once_differentiable.*"differences"'):
        pulled(torchopt.inner_loop(with_once, torchopt.sgd(0.2), steps=5))


def test_fused_attention_keeps_its_kernel() -> None:
    used: list[Any] = []

    def loss(w: Tensor, x: Tensor) -> Tensor:
        q = (x @ w)[None, None]
        used.append(torch.nn.functional.scaled_dot_product_attention(q, q, q))
        return used[-1].pow(2).mean()

    x = torch.randn(9, 8, dtype=torch.float64, generator=GENERATOR)
    w = torch.randn(8, 8, dtype=torch.float64, generator=GENERATOR) / 4
    found = []
    for derivative in ("differences", "reverse"):
        used.clear()
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, derivative=derivative)
        start = w.clone().requires_grad_()
        result = inner(start, x).params
        found.append(torch.autograd.grad(result.sin().sum(), start)[0])
        names = {type(y.grad_fn).__name__ for y in used if y.grad_fn is not None}
        fused = "ScaledDotProductFlashAttentionForCpuBackward0"
        assert (names == {fused}) == (derivative == "differences")
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_dropout_draws_one_mask_in_all_gradients_of_a_step() -> None:
    def loss(x: Tensor, batch: None, theta: Tensor) -> Tensor:
        kept = torch.nn.functional.dropout(x - theta, 0.5)
        return (kept**4).sum() / 9

    found = []
    for derivative in ("reverse", "differences"):
        torch.manual_seed(0)
        found.append(
            pulled(torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, derivative=derivative))
        )
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_kink_is_noticed() -> None:
    def loss(x: Tensor, batch: None, theta: Tensor) -> Tensor:
        return (x - theta).abs().sum() + (x**2).sum()

    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, derivative="differences")
    with pytest.raises(GradientMismatchError, match="kinks"):
        pulled(inner, start=THETA + 1e-4)
    assert inner.report.differences[-1] > 0.1
    accepting = torchopt.inner_loop(
        loss, torchopt.sgd(0.1), steps=1, derivative=Differences(limit=None)
    )
    pulled(accepting, start=THETA + 1e-4)


@pytest.mark.parametrize("gradients", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [-0.5, -1e-3, 0.0, 1e-3, 0.5])
def test_the_estimate_at_a_kink_is_no_less_than_a_quarter_of_the_error(
    place: float, dtype: torch.dtype, gradients: int
) -> None:
    """The gradient relu(w) bends at 0, `place` displacements from the middle."""
    differences = Differences(gradients=gradients)
    w = torch.tensor([place * differences.length(dtype)], dtype=dtype)
    d = torch.ones_like(w)
    made = differences.product(
        lambda at, weight: ((at[0].relu() ** 2 / 2 * weight).sum(), [at[0].relu() * weight]),
        [w],
        [d],
        [w.relu()],
    )
    (value,) = made.value
    error = (value - (w > 0).to(dtype)).norm()
    assert error > 0.05
    assert made.error > error / 4


def test_a_zero_direction_gives_zero() -> None:
    inner = torchopt.inner_loop(proximal, torchopt.sgd(0.1), steps=2, derivative="differences")
    theta = THETA.clone().requires_grad_()
    (found,) = torch.autograd.grad((0 * inner(START, None, theta).params).sum(), theta)
    assert torch.equal(found, torch.zeros_like(found))
    assert list(inner.report.differences) == [0.0]


def test_a_checked_call_reports_its_differences_too() -> None:
    inner = torchopt.inner_loop(
        proximal,
        torchopt.sgd(0.1),
        steps=2,
        derivative="differences",
        verify=Verify(Explicit(), rate=1.0, limit=1e-8),
    )
    pulled(inner)
    assert inner.report.worst < 1e-10
    assert len(inner.report.differences) == 1


# -- implicit


def exact() -> Tensor:
    hessian = A.mT @ A / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
    return PENALTY * torch.linalg.solve(hessian, C)


@pytest.mark.parametrize("derivative", ["differences", TWO])
@pytest.mark.parametrize(
    ("solve", "definite"), [(None, False), (CG(rtol=1e-9), True), (LSMR(rtol=1e-9), False)]
)
def test_implicit_derivatives_by_differences(solve: Any, definite: bool, derivative: Any) -> None:
    engine = Implicit(solve=solve, positive_definite=definite, derivative=derivative)
    inner = engine.over(proximal, torchopt.sgd(0.5), steps=200)
    torch.testing.assert_close(pulled(inner), exact(), rtol=1e-7, atol=1e-9)
    assert 0 < max(inner.report.differences) < 1e-6


@pytest.mark.parametrize("derivative", ["reverse", "differences", TWO])
def test_t1_t2_is_a_hessian_of_one_over_alpha(derivative: Any) -> None:
    """The error against the exact gradient is that of a one-term Neumann series."""
    engine = Implicit(solve=Neumann(0, alpha=ALPHA, rtol=1.0), derivative=derivative)
    found = pulled(engine.over(proximal, torchopt.sgd(0.5), steps=200))
    torch.testing.assert_close(found, ALPHA * PENALTY * C, rtol=1e-9, atol=1e-12)
    hessian = A.mT @ A / ROWS + PENALTY * torch.eye(SIZE, dtype=torch.float64)
    error = (torch.eye(SIZE, dtype=torch.float64) - ALPHA * hessian) @ exact()
    torch.testing.assert_close(exact() - found, error, rtol=1e-9, atol=1e-12)


def cubic(x: Tensor, batch: None, theta: Tensor) -> Tensor:
    """Return a loss whose mixed second derivatives depend on the point."""
    return proximal(x, None, theta) + (x**3) @ theta / 9


def cubic_slope(x: Tensor) -> Tensor:
    return A.mT @ (A @ x - B) / ROWS + PENALTY * (x - THETA) + x**2 * THETA / 3


def adam_by_hand(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return where each step of Adam begins, and the derivative of its update in the gradient."""
    lr, eps, b1, b2 = 0.1, 0.3, 0.9, 0.999
    x, m, v, found = START, torch.zeros(SIZE).double(), torch.zeros(SIZE).double(), []
    for t in range(1, steps + 1):
        g = cubic_slope(x)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        top, root = m / (1 - b1**t), (v / (1 - b2**t)).sqrt()
        slope_top, slope_root = (1 - b1) / (1 - b1**t), (1 - b2) * g / (1 - b2**t) / root
        slope = -lr * (slope_top / (root + eps) - top * slope_root / (root + eps) ** 2)
        found.append((x, slope))
        x = x - lr * top / (root + eps)
    return found


ADAM = torchopt.adam(0.1, betas=(0.9, 0.999), eps=0.3)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_last_step_of_adam_by_differences(steps: int) -> None:
    """B'(du/dg v) of the last step, with B where it begins."""
    found = pulled(torchopt.inner_loop(cubic, ADAM, steps=steps, window=1, derivative=TWO))
    begin, slope = adam_by_hand(steps)[-1]
    expected = (begin**2 / 3 - PENALTY) * slope * C
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("derivative", ["reverse", "differences", TWO])
def test_sama_has_the_next_update_in_the_place_of_the_inverse(derivative: Any, steps: int) -> None:
    """B'(du/dg v) of the next step, with B at the end of the loop."""
    engine = Implicit(solve=Adaptation(), derivative=derivative)
    found = pulled(engine.over(cubic, ADAM, steps=steps))
    end, slope = adam_by_hand(steps + 1)[-1]
    expected = (end**2 / 3 - PENALTY) * slope * C
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    previous = adam_by_hand(steps)[-1][0]
    assert ((end**2 - previous**2).abs() > 1e-3).all()


def test_sama_for_sgd_is_t1_t2_and_takes_hyper_parameters() -> None:
    found = []
    for solve in (Adaptation(), Neumann(0, alpha=ALPHA, rtol=1.0)):
        inner = Implicit(cubic, torchopt.sgd, steps=5, solve=solve)
        theta = THETA.clone().requires_grad_()
        value = inner(START, None, theta, lr=ALPHA).params @ C
        found.append(torch.autograd.grad(value, theta)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_sama_without_one_inner_problem_raises() -> None:
    with pytest.raises(ValueError, match="tasks: expected none"):
        Implicit(cubic, ADAM, steps=2, solve=Adaptation(), tasks=(None, None, 0))
    inner = Implicit(cubic, ADAM, steps=2, solve=Adaptation())
    with pytest.raises(NotDifferentiableError, match="Adaptation: expected one inner problem"):
        torch.func.vmap(lambda t: inner(START, None, t).params)(THETA[None])
    solved = custom_root(lambda x, t: x - t, argnums=1, solve=Adaptation())(lambda x, t: t)
    theta = THETA.clone().requires_grad_()
    with pytest.raises(TypeError, match="solve=` of Implicit over an inner problem"):
        solved(START, theta).sum().backward()


# -- what is refused


def test_second_derivatives_and_transforms_raise() -> None:
    inner = torchopt.inner_loop(proximal, torchopt.sgd(0.1), steps=2, derivative="differences")
    theta = THETA.clone().requires_grad_()
    value = (inner(START, None, theta).params ** 2).sum()
    with pytest.raises(NotDifferentiableError, match="no derivative of their own"):
        torch.autograd.grad(value, theta, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="torch.func"):
        torch.func.grad(lambda t: inner(START, None, t).params.sum())(THETA)
    with pytest.raises(ValueError, match='"eager"'):
        torchopt.inner_loop(
            proximal, torchopt.sgd(0.1), steps=2, derivative="differences", execute="trace"
        )


def test_unsupported_options_of_implicit_differences_raise() -> None:
    inner = Implicit(proximal, torchopt.sgd(0.5), steps=50, derivative="differences")
    theta = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(inner(START, None, theta).params @ C, theta, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="one derivative"):
        torch.autograd.grad(first.sum(), theta)
    with pytest.raises(NotDifferentiableError, match="one derivative"):
        torch.func.jvp(lambda t: inner(START, None, t).params, (THETA,), (C,))
    dense = Implicit(
        proximal, torchopt.sgd(0.5), steps=50, derivative="differences", solve=Cholesky()
    )
    with pytest.raises(NotDifferentiableError, match="matrix-free"):
        pulled(dense)


def test_a_tensor_that_the_loss_closes_over_is_refused() -> None:
    hidden = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = lambda x, batch, theta: proximal(x, None, theta) * hidden  # noqa: E731
    for engine in (Explicit(derivative="differences"), Implicit(derivative="differences")):
        with pytest.raises(NotDifferentiableError, match="hidden"):
            engine.over(loss, torchopt.sgd(0.1), steps=2)(START, None, THETA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradients": 3}, "2 or 4"),
        ({"step": 0.0}, "> 0"),
        ({"step": float("nan")}, "> 0"),
        ({"limit": -1.0}, ">= 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Differences(**options)
    with pytest.raises(ValueError, match="Differences"):
        Implicit(derivative="diferences")


def test_half_precision_has_no_digits_for_differences() -> None:
    inner = torchopt.inner_loop(
        lambda w, batch: (w**2).sum(), torchopt.sgd(0.1), steps=1, derivative="differences"
    )
    w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="float32"):
        inner(w).params.sum().backward()


@pytest.mark.parametrize("gradients", [2, 4])
def test_the_length_is_that_for_the_parameter_with_the_fewest_digits(gradients: int) -> None:
    """For w^4 / 4 with w = 1 and a step of 0.1, dw'/dw = 1 - 0.3, whatever comes first."""
    derivative = Differences(gradients=gradients)

    def loss(w: Any, batch: Any) -> Tensor:
        return (w[0] ** 4 / 4).sum().double() + (w[1] ** 4 / 4).sum().double()

    def slopes(*dtypes: torch.dtype) -> list[float]:
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, derivative=derivative)
        w = [torch.ones(3, dtype=x, requires_grad=True) for x in dtypes]
        found = torch.autograd.grad([x.sum() for x in inner(w).params], w)
        return [float(g[0]) for g in found]

    both = (torch.float64, torch.float32)
    assert slopes(*both) == pytest.approx([0.7, 0.7], rel=2e-4)
    assert slopes(*both[::-1]) == pytest.approx([0.7, 0.7], rel=2e-4)
    with pytest.raises(NotDifferentiableError, match="float32"):
        slopes(torch.float32, torch.bfloat16)


@pytest.mark.parametrize("gradients", [2, 4])
def test_a_product_is_that_with_the_hessian_and_its_error_is_judged(gradients):
    """The gradient of sum(w^4) / 4 is w^3: along d it changes by 3 w^2 d."""
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    d = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    differences = Differences(gradients=gradients, limit=1e-6)
    made = differences.product(
        lambda at, weight: ((at[0] ** 4 / 4 * weight).sum(), [at[0] ** 3 * weight]),
        [w],
        [d],
        [w**3],
    )
    assert type(made) is Product
    assert made.apart < 1
    torch.testing.assert_close(made.value[0], 3 * w**2 * d, rtol=1e-8, atol=0)
    judge = Judge(differences, report := SimpleNamespace(differences=[]))
    judge.settle()
    assert report.differences == []
    zero = torch.zeros((), dtype=torch.float64)
    judge.note(Product([], zero + 2e-8, zero), [d / d.norm()])
    judge.settle()
    assert report.differences == pytest.approx([2e-8])
    judge.note(Product([], zero + 2e-6, zero), [d / d.norm()])
    with pytest.raises(GradientMismatchError, match="estimated error of 2e-06"):
        judge.settle()


def test_implicit_differences_see_the_random_numbers_of_one_evaluation() -> None:
    generator = torch.Generator().manual_seed(5)

    def loss(w: Tensor, x: Tensor, penalty: Tensor) -> Tensor:
        kept = torch.rand(6, generator=generator, dtype=torch.float64) < 0.7
        noise = torch.nn.functional.dropout(torch.ones(6, dtype=torch.float64), 0.3)
        error = torch.tanh(x @ w) * kept * noise - 0.3
        return (error**2).mean() + penalty * (w**2).sum()

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalty = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    found = []
    for derivative in ("reverse", "differences"):
        torch.manual_seed(1)
        generator.manual_seed(5)
        inner = Implicit(
            loss, torchopt.sgd(0.3), steps=4, derivative=derivative, solve=CG(rtol=1e-9)
        )
        result = inner(torch.zeros(3, dtype=torch.float64), x, penalty)
        found.append(torch.autograd.grad(result.params.sum(), penalty)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=0)


class Rounded(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _item(x: Tensor) -> Tensor:
    return x * x.detach().sum().item()


def _without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        kept = x * 2
    return x * kept


@pytest.mark.parametrize(
    "hide",
    [
        lambda x: x * x.detach(),
        lambda x: x * x.data,
        _without_grad,
        _item,
        Rounded.apply,
        lambda x: x + (x.sign() - x).detach(),
    ],
    ids=["detach", "data", "no_grad", "item", "Function", "straight-through"],
)
@pytest.mark.parametrize("derivative", ["differences", TWO, Differences(limit=None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detached_values_are_not_constants_for_differences(
    hide: Any, derivative: Any, dtype: torch.dtype
) -> None:
    start, theta = START.to(dtype), THETA.to(dtype).requires_grad_()

    def loss(x: Tensor, batch: None, theta: Tensor) -> Tensor:
        return (hide(x) * theta).sum() + (x**2).sum() * theta.sum()

    for engine in (
        torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, derivative=derivative),
        Implicit(loss, torchopt.sgd(0.1), steps=2, derivative=derivative, solve=CG()),
    ):
        made = engine(start, None, theta).params @ C.to(dtype)
        with pytest.raises((NotDifferentiableError, GradientMismatchError)):
            made.backward()
        assert theta.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [None, (0, 0, None)])
def test_gradients_of_rough_and_of_flat_losses_are_their_derivatives(
    tasks: Any, dtype: torch.dtype
) -> None:
    """Cancelling terms, large losses, minima, kinks and steep curves must not raise."""
    losses = [
        lambda x, y, m: ((x * y) ** 2).sum() * m.sum(),
        lambda x, y, m: (x - y).relu().sum() * m.sum() + (x**2).sum(),
        lambda x, y, m: ((x - y) ** 2).sum() * 1e-6 * m.sum() + 1e4,
        lambda x, y, m: (x * 5).exp().sum() * m.sum() + (x**6).sum(),
        lambda x, y, m: torch.nn.functional.cross_entropy(torch.outer(x, m), (y > 0).long()),
        lambda x, y, m: ((x - x) * m.sum()).sum() + (x * 0 + y).sum() * m.sum(),
        lambda x, y, m: x.abs().amax() * m.sum() + x.sort().values[1] * m[0],
    ]
    generator = torch.Generator().manual_seed(3)
    for loss in losses:
        for gradients in (2, 4):
            for scale in (1e-6, 1.0, 1e3):
                shape = (SIZE,) if tasks is None else (5, SIZE)
                x, y = (torch.randn(shape, generator=generator).to(dtype) * scale for _ in "xy")
                m = THETA.to(dtype).requires_grad_()
                inner = torchopt.inner_loop(
                    loss,
                    torchopt.sgd(1e-6 / scale),
                    steps=2,
                    tasks=tasks,
                    derivative=Differences(gradients=gradients, limit=None),
                )
                inner(x, y, m).params.pow(2).sum().backward()


@pytest.mark.parametrize("activation", [torch.abs, torch.nn.functional.leaky_relu])
def test_kinks_that_cancel_in_a_slope_do_not_raise(activation: Any) -> None:
    """Units change sign on both sides of a point: the gradient shows it, its slope need not."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, y, a, b = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((400, 10), (400, 1), (10, 50), (50, 1))
        )
        params = {"a": (a / 3).requires_grad_(), "b": (b / 7).requires_grad_()}
        decay = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)

        def loss(p: Any, batch: Any, decay: Tensor) -> Tensor:
            error = activation(batch[0] @ p["a"]) @ p["b"] - batch[1]
            return (error**2).mean() + decay * sum((q**2).sum() for q in p.values())

        inner = torchopt.inner_loop(
            loss,
            torchopt.sgd(0.05, momentum=0.9),
            steps=10,
            derivative=Differences(limit=None),
        )
        loss(inner(params, (x, y), decay).params, (x, y), decay.detach() * 0).backward()


@pytest.mark.parametrize("derivative", ["differences", TWO])
def test_integers_among_the_parameters_stay_where_they_are(derivative: Any) -> None:
    def loss(p: Any, batch: None, theta: Tensor) -> Tensor:
        return ((p["x"] - theta) ** 4).sum() * p["count"] + (p["y"] ** 2 * theta).sum()

    found = []
    for way in ("reverse", derivative):
        theta = THETA.clone().requires_grad_()
        params = {"count": torch.tensor(3), "x": START, "y": START + 1}
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=2, derivative=way)
        after = inner(params, None, theta).params
        assert torch.equal(after["count"], params["count"])
        found.append(torch.autograd.grad((after["x"] + after["y"]) @ C, theta)[0])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
