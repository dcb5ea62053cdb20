# SPDX-License-Identifier: Apache-2.0
"""Iterates and their derivatives against closed forms."""

from __future__ import annotations

import pytest
import torch
from problems import MomentumQuadratic, constant_gradient_adam

import torchopt

DOUBLE = torch.float64


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_momentum_on_a_quadratic_is_a_matrix_power(steps: int) -> None:
    inputs = [scalar(x) for x in (1.3, 0.07, 0.8, 2.1, -0.4)]
    problem = MomentumQuadratic(*inputs)
    expected = problem.iterate(steps)

    optimizer = torchopt.sgd(problem.lr, momentum=problem.momentum)
    params = (problem.x0,)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = (problem.h * params[0] - problem.c,)
        updates, state = optimizer.update(grads, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)

    torch.testing.assert_close(params[0], expected, rtol=1e-12, atol=1e-13)
    got = torch.autograd.grad(params[0], inputs)
    wanted = torch.autograd.grad(expected, inputs)
    # The derivatives are sums of `steps` terms of alternating sign.
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("eps", [1e-8, 1e-2, 0.5])
@pytest.mark.parametrize("use_accelerated_op", [False, True])
def test_adam_with_a_constant_gradient(steps: int, eps: float, use_accelerated_op: bool) -> None:
    theta, g, lr = scalar(0.3), scalar(-0.7), scalar(0.05)
    expected = constant_gradient_adam(theta, g, lr, eps, steps)

    optimizer = torchopt.adam(lr, eps=eps, use_accelerated_op=use_accelerated_op)
    params = theta
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(g, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)

    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-13)
    got = torch.autograd.grad(params, [theta, g, lr])
    wanted = torch.autograd.grad(expected, [theta, g, lr])
    # 1 - b2^k loses up to three digits of the sixteen; the derivative with respect to g is a
    # difference of two terms of size lr / |g| that is smaller than them by eps / |g|.
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-11, atol=steps * 1e-14 / 0.7)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-12, atol=0)


def test_adam_with_a_constant_gradient_is_differentiable_in_eps() -> None:
    theta, g, lr, eps = scalar(0.3), scalar(-0.7), scalar(0.05), scalar(0.02)
    direction = torchopt.transform.scale_by_adam(eps=eps)
    params = theta
    state = direction.init(params)
    for _ in range(6):
        updates, state = direction.update(g, state, inplace=False)
        params = params - lr * updates
    expected = constant_gradient_adam(theta, g, lr, eps, 6)
    torch.testing.assert_close(
        torch.autograd.grad(params, eps), torch.autograd.grad(expected, eps), rtol=1e-11, atol=0
    )


def test_rmsprop_with_a_constant_gradient_and_a_full_average() -> None:
    # With initial_scale = g^2 the average stays at g^2, so each step is lr * sign(g) up to eps.
    optimizer = torchopt.rmsprop(0.1, eps=0.0, initial_scale=4.0)
    params = torch.tensor(1.0, dtype=DOUBLE)
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(torch.tensor(-2.0, dtype=DOUBLE), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert params.item() == pytest.approx(1.5, abs=1e-14)


def test_adagrad_with_a_constant_gradient_sums_inverse_roots() -> None:
    optimizer = torchopt.adagrad(0.5, eps=0.0)
    params = torch.tensor(0.0, dtype=DOUBLE)
    state = optimizer.init(params)
    for _ in range(9):
        updates, state = optimizer.update(torch.tensor(3.0, dtype=DOUBLE), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert params.item() == pytest.approx(-0.5 * sum(k**-0.5 for k in range(1, 10)), abs=1e-14)


def test_bias_correction_is_exact_in_float32() -> None:
    optimizer = torchopt.adam(1.0)
    params = torch.tensor(1.0)
    updates, _ = optimizer.update(torch.tensor(2.0), optimizer.init(params), inplace=False)
    # The exact step is 1 / (1 + 0.5e-8); a correction computed in float32 is 6.7e-6 off.
    assert updates.item() == pytest.approx(-1.0, abs=1.2e-7)
