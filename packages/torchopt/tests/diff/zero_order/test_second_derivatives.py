# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of estimates: Hessians of the smoothed function, by Stein's identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff.zero_order import (
    Gaussian,
    Orthogonal,
    Sobol,
    ZeroOrder,
    ZeroOrderGradientModule,
    zero_order,
)
from torchopt.diff.zero_order.estimators import ESTIMATORS

F64 = torch.float64
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]], dtype=F64)
B = torch.tensor([1.0, -0.5, 0.2], dtype=F64)
X = torch.tensor([1.0, -2.0, 0.7], dtype=F64)
V = torch.tensor([0.5, 1.0, -1.0], dtype=F64)
TWICE = [name for name, e in ESTIMATORS.items() if e.curvature is not None]


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x @ H @ x + B @ x


def product(f: Any, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g @ v, x)[0]


def repeated(make: Any, repetitions: int) -> tuple[Tensor, Tensor]:
    draws = torch.stack([make(seed) for seed in range(repetitions)])
    return draws.mean(0), draws.std(0) / repetitions**0.5


@pytest.mark.parametrize(
    ("directions", "name"),
    [(Gaussian(), name) for name in TWICE]
    + [(Orthogonal(), "antithetic"), (Sobol(64), "leave_one_out")],
    ids=str,
)
def test_product_with_the_hessian_is_unbiased(name: str, directions: Any) -> None:
    def one(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        f = zero_order(directions, name, num_samples=1024, sigma=0.7, generator=generator)
        return product(f(quadratic), X, V)

    mean, error = repeated(one, 64)
    assert ((mean - H @ V).abs() < 4.5 * error).all()  # Student's t with 63 degrees
    assert (error < 0.6).all()


def test_error_of_a_central_product_is_that_of_the_closed_form() -> None:
    # One dimension, f = a x^2 / 2: h z^2 - h with h = a z^2 / 2 sums to a/2 (z^4 - z^2):
    # mean a, variance a^2 (E (z^4 - z^2)^2 / 4 - 1) = a^2 (105 - 30 + 3) / 4 - a^2 = 18.5 a^2
    n, a = 100_000, 3.0
    f = zero_order(Gaussian(), "antithetic", 0, n, 0.5, generator=torch.Generator().manual_seed(0))(
        lambda x: 0.5 * a * x @ x + x.sum() + 7.0
    )
    got = product(f, torch.ones(1, dtype=F64), torch.ones(1, dtype=F64))
    assert abs(got.item() - a) < 4 * (18.5 * a**2 / n) ** 0.5


def test_symmetric_whatever_the_function() -> None:
    f = ZeroOrder(Gaussian(), "antithetic", num_samples=5, generator=torch.Generator())
    columns = []
    for v in torch.eye(3, dtype=F64):
        f.generator.manual_seed(3)
        columns.append(product(f(lambda x: torch.sin(x).prod()), X, v))
    estimate = torch.stack(columns)
    torch.testing.assert_close(estimate, estimate.T)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("name", TWICE)
def test_derivative_of_a_composition_uses_value_gradient_and_hessian(
    name: str, chunk_size: int
) -> None:
    # d/dx of v' grad(f^2 / 2) = (v'g) g + f H v with the estimates g and H of the same directions
    def decorated(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return zero_order(
            Gaussian(), name, num_samples=9, sigma=0.3, generator=generator, chunk_size=chunk_size
        )(quadratic)

    got = product(lambda x: 0.5 * decorated(5)(x) ** 2, X, V)
    x = X.clone().requires_grad_()
    value = decorated(5)(x)
    (g,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(
        got, (g @ V) * g + value.detach() * product(decorated(5), X, V), rtol=1e-9, atol=1e-9
    )


def test_vector_output_has_a_derivative_in_its_cotangent() -> None:
    # The gradient J'c is linear in c with derivative J, estimated with the same directions.
    J = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0]], dtype=F64)
    f = zero_order(Gaussian(), "forward", num_samples=7, vector_output=True)(lambda x: J @ x)
    x = X.clone().requires_grad_()
    c = torch.tensor([2.0, -1.0], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(f(x), x, c, create_graph=True)
    (along,) = torch.autograd.grad(g @ V, c, retain_graph=True)
    assert (along @ c - g @ V).abs() < 1e-12  # Euler: linear in c
    (hv,) = torch.autograd.grad(g @ V, x)
    assert hv.shape == (3,)


def test_reverse_over_reverse_transforms() -> None:
    def f(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        engine = ZeroOrder(Gaussian(), "antithetic", num_samples=20_000, generator=generator)
        return engine(quadratic)(x)

    got = torch.func.jacrev(torch.func.grad(f))(X)
    # per sample: entries of z z'Hz/2 z - ..., of variance below 30 |H|^2
    assert ((got - H).abs() < 4 * (30 * H.square().sum() / 20_000).sqrt()).all()


def test_of_a_module() -> None:
    class Quadratic(ZeroOrderGradientModule, method="antithetic", num_samples=40_000):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(X.clone())

        def forward(self) -> Tensor:
            return quadratic(self.x)

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return torch.randn(sample_shape, dtype=F64)

    module = Quadratic()
    (g,) = torch.autograd.grad(module(), module.x, create_graph=True)
    # a module's own `sample` may be any distribution; one that is not known to be normal is refused
    from torchopt.errors import NotDifferentiableError

    with pytest.raises(NotDifferentiableError, match="standard normal directions"):
        torch.autograd.grad(g @ V, module.x)


@pytest.mark.parametrize("which", [0, 1])
def test_a_third_derivative_is_refused_in_every_argument(which: int) -> None:
    from torchopt.errors import NotDifferentiableError

    x, v = X.clone().requires_grad_(), V.clone().requires_grad_()
    f = zero_order(Gaussian(), "antithetic", num_samples=8)(quadratic)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (h,) = torch.autograd.grad(g, x, v, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="a request for a third one"):
        torch.autograd.grad(h.sum(), (x, v)[which])
