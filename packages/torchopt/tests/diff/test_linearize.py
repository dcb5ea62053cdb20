# SPDX-License-Identifier: Apache-2.0
"""Products with a Jacobian are the same with torch's engine and with torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from torchopt.diff.sealed import is_sealed_without
from torchopt.tree_function import linearize, linearize_parts

WEIGHT = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(3, 4)


def gradient(x: Tensor, y: Tensor) -> Tensor:
    return torch.func.grad(lambda x: torch.logsumexp(WEIGHT @ x, 0) + (y * x * x).sum())(x)


FUNCTIONS = {
    "one output": lambda x, y: torch.tanh(WEIGHT @ x) * y[:3],
    "a gradient": gradient,
    "several outputs": lambda x, y: (x * y, (x * x).sum()),
    "an unused argument": lambda x, y: torch.sin(x),
    "itself": lambda x, y: x,
    "a constant output": lambda x, y: (x * y, torch.ones(2, dtype=x.dtype)),
}


def point(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, dtype=dtype, generator=draw),
        torch.randn(4, dtype=dtype, generator=draw),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_do_not_depend_on_the_implementation(name: str) -> None:
    function, at = FUNCTIONS[name], point()
    value, pull = linearize(function, *at)
    cotangent: Any = (
        tuple(torch.cos(v) for v in value) if isinstance(value, tuple) else torch.cos(value)
    )
    expected = pull(cotangent)
    with torch.no_grad():
        alone, pull_alone = linearize(function, *at)
        torch.testing.assert_close(alone, value)
        for _ in range(2):  # the graph is kept
            torch.testing.assert_close(pull_alone(cotangent), expected, rtol=1e-12, atol=1e-12)
        assert not any(x.requires_grad for x in pull_alone(cotangent))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_of_some_arguments_are_parts_of_the_products_of_all(name: str) -> None:
    function, at = FUNCTIONS[name], point()
    assert linearize_parts(function, *at) is None  # a graph may follow
    with torch.no_grad():
        both = linearize_parts(function, *at)
        assert both is not None
        value, pull = both
        cotangent = tuple(map(torch.cos, value)) if isinstance(value, tuple) else value.cos()
        whole = linearize(function, *at)[1](cotangent)
        assert torch.equal(pull(cotangent, slice(1))[0], whole[0])
        assert torch.equal(pull(cotangent, slice(1, None))[0], whole[1])


def test_complex_products_are_conjugated() -> None:
    x, y = point(torch.complex128)
    with torch.no_grad():
        (found,) = linearize(lambda x: y * x, x)[1](x)
    torch.testing.assert_close(found, y.conj() * x)


def test_products_of_a_batch_are_the_rows_of_the_jacobian() -> None:
    x, y = point()
    with torch.no_grad():
        _, pull = linearize(gradient, x, y)
        rows = torch.func.vmap(lambda v: pull(v)[0])(torch.eye(4, dtype=x.dtype))
    torch.testing.assert_close(rows, torch.func.jacrev(gradient)(x, y))


def test_a_product_can_be_linearised_again() -> None:
    x, y = point()
    with torch.no_grad():
        _, pull = linearize(gradient, x, y)
        _, push = linearize(lambda v: pull(v)[0], torch.zeros_like(x))
        (found,) = push(y)
    torch.testing.assert_close(found, torch.func.jvp(lambda x: gradient(x, y), (x,), (y,))[1])


def test_no_gradients_are_left_in_the_inputs() -> None:
    x, y = point()
    x.requires_grad_()
    weight = torch.ones(4, dtype=x.dtype, requires_grad=True)
    with torch.no_grad():
        _, pull = linearize(lambda x: weight * x * y, x)
        pull(y)
    assert x.grad is None
    assert weight.grad is None


def test_an_integer_value_is_refused() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="floating-point or complex.*int64"):
        linearize(lambda x: x.long(), point()[0])


def test_losses_of_torch_need_no_search_and_a_captured_tensor_does() -> None:
    assert is_sealed_without(lambda x, y: mse_loss(x, y), frozenset())
    assert not is_sealed_without(lambda x: mse_loss(x, WEIGHT), frozenset())
