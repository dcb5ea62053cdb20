# SPDX-License-Identifier: Apache-2.0
"""Modules with an estimated derivative."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
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
    class Numpy(Linear, vectorized=False, num_samples=2000):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(float((self.w.detach().numpy() * x.numpy()).sum()))

    module = Numpy()
    module(A).backward()
    # the loss is float32, so the differences of sigma 0.1 carry 1e-6 of rounding
    assert ((module.w.grad - A).abs() < 4 * 10**0.5 * ERROR + 1e-4).all()


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


# --- buffers, random draws, nesting, copies -------------------------------------------------------


class Net(ZeroOrderGradientModule, method="antithetic", num_samples=20, sigma=0.1):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(sample_shape, dtype=F64)


X = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def gradients(module: nn.Module) -> list[Tensor]:
    torch.manual_seed(5)
    return list(torch.autograd.grad(module(X), list(module.parameters())))


def test_loop_and_vmap_agree_with_batch_norm_and_dropout() -> None:
    class Loop(Net, vectorized=False):
        pass

    module, loop = Net(), Loop()
    loop.load_state_dict(module.state_dict())
    torch.testing.assert_close(gradients(loop), gradients(module), rtol=1e-9, atol=1e-12)


def test_in_eval_mode_the_buffers_stay_and_nothing_is_dropped() -> None:
    module = Net().eval()
    with torch.no_grad():
        module(X)
    before = copy.deepcopy(dict(module.named_buffers()))
    first = gradients(module)
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)
    # without draws in `forward`, only the seed of the directions matters
    torch.testing.assert_close(gradients(module), first, rtol=0, atol=0)


def test_each_call_has_its_own_directions() -> None:
    module = Linear()
    module.w.data.normal_()

    class One(Linear, num_samples=1):
        pass

    one = One()
    a, b = (torch.autograd.grad(one(A), one.w)[0] for _ in range(2))
    assert not torch.allclose(a, b)
    torch.manual_seed(7)
    (both,) = torch.autograd.grad(one(A) + one(A), one.w)
    torch.manual_seed(7)
    c, d = (torch.autograd.grad(one(A), one.w)[0] for _ in range(2))
    torch.testing.assert_close(both, c + d)


def test_a_copy_and_a_loaded_module_give_the_same() -> None:
    module = Net()
    clone = copy.deepcopy(module)
    torch.testing.assert_close(gradients(clone), gradients(module), rtol=0, atol=0)
    assert clone.layers[0].weight is not module.layers[0].weight


def test_a_module_within_a_module() -> None:
    class Outer(ZeroOrderGradientModule, method="antithetic", num_samples=20_000, sigma=0.1):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Linear()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)

        def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
            return torch.randn(sample_shape, dtype=F64)

    outer = Outer()
    outer(A).backward()
    # at w = 0: d/dw = 2 a, d/dscale = inner value = 1; one joint direction of four entries
    gradient = torch.cat([2 * A, torch.ones(1, dtype=F64)])
    got = torch.cat([outer.inner.w.grad, outer.scale.grad[None]])
    error = ((gradient @ gradient + gradient.square()) / 20_000).sqrt()
    assert ((got - gradient).abs() < 4.5 * error).all()


def test_works_as_parameters_of_a_function() -> None:
    module = Linear()
    params = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    got = torch.func.grad(lambda p: torch.func.functional_call(module, p, (A,)))(params)
    assert ((got["w"] - A).abs() < 4 * ERROR).all()
    assert module.w.grad is None


def test_all_frozen_parameters_need_no_estimate() -> None:
    module = Linear().requires_grad_(False)
    assert not module(A).requires_grad


def test_an_error_inside_forward_leaves_the_module_usable() -> None:
    calls: list[None] = []  # a log is kept, while a flag would be restored to its value in the call

    class Fails(Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(None)
            if len(calls) in (1, 3):
                raise KeyError("mine")
            return super().forward(x)

    module = Fails()
    with pytest.raises(KeyError, match="mine"):
        module(A)
    value = module(A)
    with pytest.raises(KeyError, match="mine"):
        value.backward()
    module(A).backward()
    assert ((module.w.grad - A).abs() < 4 * ERROR).all()


def test_one_warning_for_a_module_that_vmap_cannot_take() -> None:
    class Branches(Linear, num_samples=3):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.item() > 0 else -y

    module = Branches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module(A).backward()
        module(A).backward()
    assert len(caught) == 1
    assert "vmap cannot take this function" in str(caught[0].message)


class Waits(ZeroOrderGradientModule, method="antithetic", num_samples=2, vectorized=False):
    """|w|^2, whose evaluation waits until a second thread evaluates too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=F64))
        self.barrier = threading.Barrier(2)

    def forward(self) -> Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(timeout=5)
        return self.w.detach().square().sum()  # no derivative but the estimated one

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.ones(sample_shape, dtype=F64)


def test_threads_that_evaluate_one_module_all_get_estimates() -> None:
    module = Waits()

    def gradient(_: int) -> Tensor:
        return torch.autograd.grad(module(), module.w)[0]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gradient, range(2)))
    for g in found:  # (z'grad) z for z of ones
        torch.testing.assert_close(g, torch.full((3,), 6.0, dtype=F64))
