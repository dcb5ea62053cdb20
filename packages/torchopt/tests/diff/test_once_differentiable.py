# SPDX-License-Identifier: Apache-2.0
"""Functions without a second derivative are refused only where one is needed.

The oracle is the plain unrolled loop, of the same loss without the Function.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Cube
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import weight_norm

import torchopt
from torchopt.diff.implicit import custom_root
from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning

START = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)


class CastCube(Cube):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * cotangent


class NamedCube(Function):
    forward, setup_context, vjp = Cube.forward, Cube.setup_context, Cube.backward


def factor() -> Tensor:
    return torch.tensor([0.3, 0.9, -0.5], dtype=torch.float64, requires_grad=True)


def unrolled(loss: Any, meta: Tensor) -> Tensor:
    w = START.clone().requires_grad_()
    for _ in range(3):
        w = w - 0.1 * torch.autograd.grad(loss(w, None, meta), w, create_graph=True)[0]
    return torch.autograd.grad(w.pow(3).sum(), meta)[0]


def looped(loss: Any, meta: Tensor, **settings: Any) -> Tensor:
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, **settings)
    return torch.autograd.grad(inner(START, None, meta).params.pow(3).sum(), meta)[0]


def stepped(loss: Any, meta: Tensor) -> Tensor:
    net = nn.ParameterList([START.clone()])
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    for _ in range(3):
        optimizer.step(loss(net[0], None, meta))
    return torch.autograd.grad(net[0].pow(3).sum(), meta)[0]


def in_tasks(loss: Any, meta: Tensor) -> Tensor:
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, tasks=(0, None, None))
    return torch.autograd.grad(inner(START[None], None, meta).params.pow(3).sum(), meta)[0]


def transformed(loss: Any, meta: Tensor) -> Tensor:
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3)
    return torch.func.grad(lambda m: inner(START, None, m).params.pow(3).sum())(meta.detach())


WAYS = {
    "reverse": looped,
    "mixed": lambda *a: looped(*a, derivative="mixed"),
    "steps computed again": lambda *a: looped(*a, keep="steps"),
    "traced": lambda *a: looped(*a, execute="trace"),
    "MetaSGD": stepped,
    "tasks": in_tasks,
    "torch.func": transformed,
}


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-12 * expected.abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_a_function_of_a_meta_parameter_is_differentiated_once(way: str) -> None:
    got = WAYS[way](lambda w, _, m: (w**2 * Cube.apply(m)).sum(), factor())
    assert close(got, unrolled(lambda w, _, m: (w**2 * m**3).sum(), factor()))


@pytest.mark.parametrize("kind", [Cube, CastCube, NamedCube, type("Heir", (Cube,), {})])
def test_each_way_to_write_a_backward_pass_is_seen(kind: Any) -> None:
    with pytest.raises(NotDifferentiableError, match=f"{kind.__name__}, once_differentiable"):
        looped(lambda w, _, m: ((w**3 + kind.apply(w)) * m).sum(), factor())


@pytest.mark.parametrize("settings", [{}, {"keep": "steps"}, {"keep": 1}])
def test_a_function_of_later_steps_is_seen(settings: dict[str, Any]) -> None:
    count = itertools.count()

    def loss(w: Tensor, _: Any, m: Tensor) -> Tensor:
        return ((w**3 if next(count) == 0 else w**3 + Cube.apply(w)) * m).sum()

    with pytest.raises(NotDifferentiableError, match="Cube, once_differentiable"):
        looped(loss, factor(), **settings)


def sine_and_cosine() -> Any:
    class Sine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * Cosine.apply(*ctx.saved_tensors)

    class Cosine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.cos()

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return -cotangent * Sine.apply(*ctx.saved_tensors)

    return Sine.apply


def cube_with_two_derivatives() -> Any:
    class Slope(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, cotangent: Tensor) -> Tensor:
            ctx.save_for_backward(x, cotangent)
            return 3 * x * x * cotangent

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            x, first = ctx.saved_tensors
            return 6 * x * first * cotangent, 3 * x * x * cotangent

    class TwiceCube(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return Slope.apply(*ctx.saved_tensors, cotangent)

    return TwiceCube.apply


@pytest.mark.parametrize(
    ("made", "written_out"),
    [(sine_and_cosine, torch.sin), (cube_with_two_derivatives, lambda x: x**3)],
)
def test_functions_whose_backward_pass_uses_other_functions_have_a_second_derivative(
    made: Callable[[], Any], written_out: Any
) -> None:
    function = made()
    got = looped(lambda w, _, m: (function(w) * m).sum(), factor())
    assert close(got, unrolled(lambda w, _, m: (written_out(w) * m).sum(), factor()))


def test_weight_norm_of_a_vector_has_its_second_derivative() -> None:
    def loss(w: Tensor, _: Any, m: Tensor) -> Tensor:
        return (torch._weight_norm(w, 0.5 + m, 0) ** 3 * w * m).sum()

    def written_out(w: Tensor, _: Any, m: Tensor) -> Tensor:
        return (((0.5 + m) * w / w.abs()) ** 3 * w * m).sum()

    assert close(stepped(loss, factor()), unrolled(written_out, factor()))


def test_a_freed_graph_behind_constants_is_left_alone() -> None:
    torch.manual_seed(0)
    encoder = weight_norm(nn.Linear(3, 3, dtype=torch.float64))
    head = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    before = head.weight.detach().clone()
    features = encoder(START)
    torch.autograd.grad(features.sum(), [*encoder.parameters()])
    torchopt.MetaSGD(head, lr=0.1).step(head(features).sum())
    assert close(head.weight, before - 0.1 * features)


def test_a_later_step_warns_too() -> None:
    net = nn.ParameterList([START.clone()])
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(net[0].pow(3).sum())
    with pytest.warns(SecondDerivativeWarning, match="Cube, once_differentiable"):
        optimizer.step(Cube.apply(net[0]).sum())


class Described:
    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return Cube.apply


class ByClass:
    method = staticmethod(Cube.apply)
    table = types.MappingProxyType({"of": Cube.apply})
    bound = functools.partialmethod(lambda _, function, x: function(x), Cube.apply)
    described = Described()

    @functools.cached_property
    def cached(self) -> Any:
        return Cube.apply


HOLDER = ByClass()


@pytest.mark.parametrize("attribute", ["method", "bound", "described", "cached", "table"])
def test_a_function_that_an_object_has_by_its_class_is_seen(attribute: str) -> None:
    def call(w: Tensor) -> Tensor:
        found = getattr(HOLDER, attribute)
        return found["of"](w) if attribute == "table" else found(w)

    optimality = torch.func.grad(lambda w, m: (call(w) * m).sum() + (w - m).square().sum())
    meta = factor()
    with pytest.raises(NotDifferentiableError, match="Cube.*is zero in torch"):
        torch.autograd.grad(
            custom_root(optimality, argnums=1)(lambda _, m: START)(None, meta).sum(), meta
        )
