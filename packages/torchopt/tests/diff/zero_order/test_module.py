# SPDX-License-Identifier: Apache-2.0
"""Modules with an estimated derivative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchopt.diff.zero_order import ZeroOrderGradientModule
from torchopt.diff.zero_order.nn.module import enable_zero_order_gradients

F64 = torch.float64


class Linear(ZeroOrderGradientModule, method="antithetic", num_samples=20_000, sigma=0.1):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=F64))
        self.frozen = nn.Parameter(torch.ones((), dtype=F64), requires_grad=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * (self.w @ x).sum() + self.frozen

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(sample_shape, dtype=F64)


A = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
ERROR = ((A @ A + A.square()) / 20_000).sqrt()


def test_gradient_of_the_parameters() -> None:
    module = Linear()
    x = A.clone().requires_grad_()
    value = module(x)
    assert value.item() == 1.0
    value.backward()
    assert ((module.w.grad - A).abs() < 4 * ERROR).all()
    assert x.grad is None
    assert module.frozen.grad is None


def test_keyword_inputs() -> None:
    module = Linear()
    module(A, scale=3.0).backward()
    assert ((module.w.grad - 3 * A).abs() < 12 * ERROR).all()


def test_subclass_of_a_concrete_subclass() -> None:
    class Same(Linear):
        pass

    class Fewer(Linear, num_samples=1):
        pass

    class Extended(Linear):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return 2 * super().forward(x, **kwargs)

    torch.manual_seed(1)
    same = Same()
    same(A).backward()
    assert ((same.w.grad - A).abs() < 4 * ERROR).all()
    fewer = Fewer()
    fewer(A).backward()  # one direction: the gradient is a multiple of one random direction
    assert ((fewer.w.grad - A).abs() > 4 * ERROR).any()
    extended = Extended()
    value = extended(A)
    assert value.item() == 2.0
    value.backward()
    assert ((extended.w.grad - 2 * A).abs() < 8 * ERROR).all()


def test_error_texts() -> None:
    class Empty(ZeroOrderGradientModule):
        def forward(self) -> Tensor:
            return torch.zeros(())

        def sample(self, sample_shape: Any = ()) -> Tensor:
            return torch.randn(sample_shape)

    with pytest.raises(RuntimeError, match="The module has no parameters."):
        Empty()()
    with pytest.raises(
        TypeError,
        match="Zero-order gradient estimation is already enabled for the `forward` method.",
    ):
        enable_zero_order_gradients(Linear)

    class NoSample(ZeroOrderGradientModule):
        def forward(self) -> Tensor:
            return torch.zeros(())

    class NoForward(ZeroOrderGradientModule):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            return torch.randn(sample_shape)

    for cls in (NoSample, NoForward, ZeroOrderGradientModule):
        with pytest.raises(TypeError, match="Can't instantiate abstract class"):
            cls()
    with pytest.raises(ValueError, match="`method`"):

        class Wrong(ZeroOrderGradientModule, method="reverse"):
            def forward(self) -> Tensor:
                return torch.zeros(())

    class NotScalar(Linear):
        def forward(self, x: Tensor) -> Any:
            return self.w * x

    with pytest.raises(RuntimeError, match="`output` must be a scalar tensor."):
        NotScalar()(A)

    class NotTensor(Linear):
        def forward(self, x: Tensor) -> Any:
            return 1.0

    with pytest.raises(TypeError, match="`output` must be a tensor."):
        NotTensor()(A)


def test_forward_that_is_not_differentiable() -> None:
    class Numpy(Linear, vectorized=False):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(float((self.w.detach().numpy() * x.numpy()).sum()))

    module = Numpy()
    module(A).backward()
    # the loss is float32, so the differences of sigma 0.1 carry 1e-6 of rounding
    assert ((module.w.grad - A).abs() < 4 * ERROR + 1e-4).all()


class WithNorm(ZeroOrderGradientModule, method="antithetic", num_samples=4, sigma=0.1):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x))).square().mean()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(sample_shape)


def test_perturbed_evaluations_leave_the_buffers_alone() -> None:
    module = WithNorm()
    reference = copy.deepcopy(module.norm)
    x = torch.randn(8, 3)
    value = module(x)
    reference(x)
    value.backward()
    torch.testing.assert_close(dict(module.norm.named_buffers()), dict(reference.named_buffers()))
    assert module.norm.num_batches_tracked.item() == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_dropout_mask_is_common_to_a_backward_pass() -> None:
    class Dropped(WithNorm, num_samples=4000, method="antithetic"):
        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.out.weight).sum() + self.out.bias.sum()

    module = Dropped()
    module(torch.zeros(1)).backward()
    # a mask keeps (gradient 2) or drops (gradient 0); averaged masks would give 1
    distance = torch.minimum(module.out.weight.grad.abs(), (module.out.weight.grad - 2).abs())
    assert (distance < 4 * (13 + 4) ** 0.5 / 4000**0.5).all()


def test_tied_weights_move_together() -> None:
    class Tied(Linear, num_samples=20_000):
        def __init__(self) -> None:
            super().__init__()
            self.other = self.w

        def forward(self, x: Tensor) -> Tensor:
            return self.w @ x + self.other @ x

    module = Tied()
    module(A).backward()
    assert ((module.w.grad - 2 * A).abs() < 8 * ERROR).all()
