# SPDX-License-Identifier: Apache-2.0
"""Momentum steps in integers: undone bit for bit, with the gradient of the unrolled loop."""

from __future__ import annotations

import gc
from fractions import Fraction
from typing import Any

import pytest
import torch
from problems import MomentumQuadratic
from torch import Tensor
from unrolled_loops import loss_of, outer, problem, unrolled, worst

import torchopt
from torchopt.diff import Differences
from torchopt.diff.explicit.fixed_point import FixedPoint
from torchopt.diff.explicit.memory import CountBytes
from torchopt.errors import NotDifferentiableError

MOMENTA = [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100), Fraction(1, 4096)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def slopes(position: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the gradient of a loss that is not convex."""
    return [(x.double() * 2.0**-44).sin() + 0.1 for x in position]


@pytest.mark.parametrize("mu", MOMENTA)
def test_ten_thousand_steps_are_undone_bit_for_bit(mu: Fraction) -> None:
    lr, steps = 0.05, 10_000 if mu == Fraction(9, 10) else 1_000
    first = state = FixedPoint.of([draw(5), draw(2, 2)], [draw(5, seed=1), 0 * draw(2, 2)], mu)
    for _ in range(steps):
        state = state.stepped(slopes(state.position), lr)
    assert not torch.equal(state.position[0], first.position[0])
    assert bool(state.fits)
    assert len(state.words) == (steps - 1) // state.capacity
    for _ in range(steps):
        state = state.undone(slopes(state.positions_before([True, True], lr)), lr)
    for name in ("position", "velocity", "buffer"):
        for x, y in zip(getattr(state, name), getattr(first, name)):
            assert torch.equal(x, y), name
    assert state.words == ()
    assert state.levels == (0,)


@pytest.mark.parametrize("mu", MOMENTA)
def test_the_decay_is_that_of_real_numbers(mu: Fraction) -> None:
    velocity = draw(2000)
    state = FixedPoint.of([0 * velocity], [velocity], mu)
    zero = [torch.zeros_like(velocity)]
    for _ in range(20):
        state = state.stepped(zero, 0.0)
    found = state.velocity[0].double() * 2.0**-44
    # An error of up to n units in each step, which decays with the velocity.
    most = mu.numerator / (1 - float(mu)) * 2.0**-44
    assert (found - velocity * float(mu) ** 20).abs().max() <= most


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("derivative", ["reverse", "mixed", "first_order", Differences()])
def test_a_run_has_the_gradient_of_the_unrolled_loop(derivative: Any, window: int | None) -> None:
    params, batch, scale = problem()
    params = {k: x.clone().requires_grad_() for k, x in params.items()}
    batch = tuple(x.clone().requires_grad_() for x in batch)
    scale = scale.clone().requires_grad_()
    lr, mu = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.02, 0.9))
    inputs = [*params.values(), *batch, scale, lr, mu]
    parts = unrolled(
        loss_of,
        torchopt.sgd(lr, momentum=mu),
        params,
        [batch] * 6,
        scale,
        window=window,
        first_order=derivative == "first_order",
    )
    expected = torch.autograd.grad(outer(*parts), inputs, allow_unused=True)
    inner = torchopt.inner_loop(
        loss_of,
        torchopt.sgd,
        steps=6,
        derivative=derivative,
        keep="reversible",
        window=window,
    )
    result = inner(params, batch, scale, lr=lr, momentum=mu)
    torch.testing.assert_close(result.losses, parts[1], rtol=1e-11, atol=1e-11)
    for _ in range(2):  # the saved values allow a second backward pass
        got = torch.autograd.grad(
            outer(result.params, result.losses, result.state),
            inputs,
            allow_unused=True,
            retain_graph=True,
        )
        assert worst(expected, got, inputs) < 1e-9


@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
@pytest.mark.parametrize("state", [False, True])
def test_complex_parameters_keep_their_imaginary_parts(derivative: str, state: bool) -> None:
    def loss(z: Tensor, batch: None, m: Tensor) -> Tensor:
        return ((z.T.conj() @ z).abs() ** 2).sum() * m + (z**3).imag.sum()

    found, ends = [], []
    for keep in ("all", "reversible"):
        z = (torch.complex(draw(3, 2), draw(3, 2, seed=1)) / 3).T.conj().requires_grad_()
        m = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        optimizer = torchopt.sgd(0.05, momentum=0.5)
        before = torchopt.inner_loop(loss, optimizer, steps=1)(z, None, m).state if state else None
        inner = torchopt.inner_loop(loss, optimizer, steps=4, keep=keep, derivative=derivative)
        result = inner(z, None, m, state=before)
        ends.append(result.params.detach())
        value = (result.params * (1 + 2j)).real.sum() + result.losses.sum()
        found.append(torch.autograd.grad(value, (z, m)))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    assert ends[0].imag.abs().min() > 1e-3


def test_a_thousand_steps_have_the_derivative_of_the_closed_form() -> None:
    """With respect to the start, the rate, the momentum and the linear term."""
    values = {"x0": 1.5, "lr": 1e-2, "momentum": 0.9, "h": 0.04, "c": 0.3}
    given = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}
    steps = 1_000
    exact = MomentumQuadratic(**given).iterate(steps)
    expected = torch.autograd.grad(exact, list(given.values()))
    inner = torchopt.inner_loop(
        lambda x, batch, h, c: h * x**2 / 2 - c * x, torchopt.sgd, steps=steps, keep="reversible"
    )
    found = inner(
        given["x0"], None, given["h"], given["c"], lr=given["lr"], momentum=given["momentum"]
    ).params
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
    got = torch.autograd.grad(found, list(given.values()))
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=0)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    w = draw(100, 5).requires_grad_()

    def kept(steps: int) -> int:
        inner = torchopt.inner_loop(
            lambda w, x: ((x @ w).sin() ** 2).mean(),
            torchopt.sgd(0.01, momentum=0.5),
            steps=steps,
            keep="reversible",
        )
        x = draw(3, 100)
        with CountBytes(w, x) as count:
            result = inner(w, x)
            gc.collect()
            now: int = count.now - result.losses.nbytes
        del result
        return now

    few, many = kept(5), kept(30)
    assert abs(many - few) < 500  # scalars
    longer = kept(130)  # two buffers are full
    assert 2 * w.nbytes <= longer - few < 2 * w.nbytes + 2000


def test_tasks_are_the_loop_over_tasks() -> None:
    def loss(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        return ((w * scale - x) ** 2).sum() + (w**4).sum() / 9

    x, w = draw(3, 4), draw(4, seed=2)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"steps": 5, "keep": "reversible"}
    many = torchopt.inner_loop(
        loss, torchopt.sgd(0.05, momentum=0.5), tasks=(None, 0, None), **options
    )
    one = torchopt.inner_loop(loss, torchopt.sgd(0.05, momentum=0.5), **options)
    found = many(w, x, scale).params
    expected = torch.stack([one(w, row, scale).params for row in x])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.sin().sum(), scale)[0] for y in (found, expected)),
        rtol=1e-11,
        atol=0,
    )


def test_a_run_without_gradients_ends_where_one_with_them_does() -> None:
    inner = torchopt.inner_loop(
        lambda w, x: ((w - x) ** 4).sum(),
        torchopt.sgd(0.01, momentum=0.9),
        steps=7,
        keep="reversible",
    )
    x = draw(3).requires_grad_()
    with torch.no_grad():
        plain = inner(draw(3, seed=1), x)
    assert torch.equal(plain.params, inner(draw(3, seed=1), x).params)


def test_a_loss_that_draws_numbers_raises_and_batch_statistics_are_updated_once() -> None:
    x = draw(6, 3)
    w = draw(3, seed=1).requires_grad_()
    dropped = torchopt.inner_loop(
        lambda w, x: (torch.nn.functional.dropout(x @ w, 0.5) ** 2).mean(),
        torchopt.sgd(0.1, momentum=0.9),
        steps=3,
        keep="reversible",
    )
    with pytest.raises(NotDifferentiableError, match="dropout"):
        dropped(w, x).params.sum().backward()
    norm = torch.nn.BatchNorm1d(3, affine=False).double()
    inner = torchopt.inner_loop(
        lambda w, x: (norm(x * w) ** 3).mean(),
        torchopt.sgd(0.1, momentum=0.9),
        steps=3,
        keep="reversible",
    )
    inner(w, x).params.sum().backward()
    assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (torchopt.adam(0.1), "torchopt.sgd"),
        (torchopt.sgd(0.1), "torchopt.sgd"),
        (torchopt.sgd(0.1, momentum=0.9, weight_decay=0.1), "weight decay"),
        (torchopt.sgd(0.1, momentum=0.9, dampening=0.1), "dampening"),
        (torchopt.sgd(0.1, momentum=0.9, nesterov=True), "Nesterov"),
        (torchopt.sgd(lambda k: 0.1, momentum=0.9), "schedule"),
        (torchopt.sgd(0.1, momentum=1.0), "denominator"),
        (torchopt.sgd(0.1, momentum=0.912345678), "denominator"),
    ],
)
def test_steps_that_cannot_be_undone_raise(optimizer: Any, match: str) -> None:
    inner = torchopt.inner_loop(lambda w, x: (w**2).sum(), optimizer, steps=2, keep="reversible")
    with pytest.raises(ValueError, match=match):
        inner(draw(2).requires_grad_())


def test_numbers_beyond_the_range_raise() -> None:
    inner = torchopt.inner_loop(
        lambda w, x: (w**2).sum(), torchopt.sgd(10.0, momentum=0.9), steps=30, keep="reversible"
    )
    with pytest.raises(OverflowError, match=r"2\^16"):
        inner(draw(2).requires_grad_())
    for options in ({"execute": "trace"}, {"derivative": "forward"}):
        with pytest.raises(ValueError, match="reversible"):
            torchopt.inner_loop(loss_of, torchopt.sgd, steps=2, keep="reversible", **options)
