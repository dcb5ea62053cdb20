# SPDX-License-Identifier: Apache-2.0
"""Hooks in a loss, and backward passes that are not the derivative of any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unrolled_loops import unrolled, worst

import torchopt
from torchopt.errors import NotDifferentiableError

WAYS: list[dict[str, Any]] = [
    {},
    {"keep": "steps"},
    {"keep": 1},
    {"derivative": "mixed"},
    {"derivative": "forward"},
]
DRAW = torch.Generator().manual_seed(0)
W, X = (torch.randn(3, 3, generator=DRAW, dtype=torch.float64) for _ in range(2))

Placed = Callable[[Tensor, Any], Any]
PLACES: dict[str, Placed] = {
    "a tensor": lambda y, hook: y.register_hook(hook),
    "a node": lambda y, hook: y.grad_fn.register_hook(lambda given, _: _each(hook, given)),  # type: ignore[union-attr]
    "a node, before it": lambda y, hook: y.grad_fn.register_prehook(  # type: ignore[union-attr]
        lambda given: _each(hook, given)
    ),
}


def _each(hook: Any, given: tuple[Any, ...]) -> Any:
    found = tuple(None if x is None else hook(x) for x in given)
    return None if all(x is None for x in found) else found


def loss_with(place: Placed, hook: Any) -> Callable[..., Tensor]:
    def loss(p: dict[str, Tensor], batch: Tensor, scale: Tensor) -> Tensor:
        y = torch.tanh(p["w"] @ batch * scale)
        place(y, hook)
        return (y @ p["w"]).square().mean() + y.exp().mean()

    return loss


def gradient(loss: Any, way: dict[str, Any], params: dict[str, Tensor]) -> list[Tensor]:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.3), steps=3, **way)
    total = sum(x.pow(3).sum() for x in inner(params, X, scale).params.values())
    return list(torch.autograd.grad(total, [scale]))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_hook_that_returns_none_changes_nothing(name: str, way: dict[str, Any]) -> None:
    seen: list[int] = []
    loss = loss_with(PLACES[name], lambda g: seen.append(g.ndim))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    final, _, _ = unrolled(
        loss, torchopt.sgd(0.3), {"w": W.clone().requires_grad_()}, [X] * 3, scale
    )
    expected = torch.autograd.grad(final["w"].pow(3).sum(), [scale])
    seen.clear()
    assert worst(expected, gradient(loss, way, {"w": W}), [scale]) < 1e-12
    assert len(seen) >= 3


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_hook_that_changes_a_gradient_is_refused(name: str, way: dict[str, Any]) -> None:
    def doubled(g: Tensor) -> Tensor:
        return 2 * g

    with pytest.raises(NotDifferentiableError, match="expected one that returns None"):
        gradient(loss_with(PLACES[name], doubled), way, {"w": W})


@pytest.mark.parametrize("name", PLACES)
def test_first_order_takes_the_gradient_that_a_hook_returns(name: str) -> None:
    loss = loss_with(PLACES[name], lambda g: 2 * g)
    scale = torch.tensor(0.7, dtype=torch.float64)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.3), steps=1, derivative="first_order")
    w = W.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss({"w": w}, X, scale), w)
    torch.testing.assert_close(inner({"w": W}, X, scale).params["w"], W - 0.3 * g)


@pytest.mark.parametrize("way", WAYS[:3], ids=str)  # torch has no forward mode there
@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_modules_are_refused_where_they_change_a_gradient(
    before: bool, way: dict[str, Any]
) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch * scale)
        return out.square().mean()

    params = {k: p.detach() for k, p in net.named_parameters()}
    register = "register_full_backward_pre_hook" if before else "register_full_backward_hook"
    handle = getattr(net[2], register)(lambda *_: None)
    gradient(loss, way, params)
    handle.remove()
    getattr(net[2], register)(lambda module, *g: tuple(2 * x for x in g[0]))
    with pytest.raises(NotDifferentiableError, match="expected one that returns None"):
        gradient(loss, way, params)


class Reversed(torch.autograd.Function):
    """The identity with a reversed gradient, as in adversarial training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        return -given[0] / 2

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return tangents[0].clone()


def test_mixed_mode_refuses_a_backward_pass_that_is_no_derivative() -> None:
    def loss(p: dict[str, Tensor], batch: Tensor, scale: Tensor) -> Tensor:
        y: Any = Reversed.apply(torch.tanh(p["w"] @ batch * scale))  # type: ignore[no-untyped-call]
        return (y @ p["w"]).square().mean()

    with pytest.raises(NotDifferentiableError, match="whose backward pass is its derivative"):
        gradient(loss, {"derivative": "mixed"}, {"w": W})


def least_squares(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return ((x @ w - 3 * scale) ** 2).sum()


def saturated(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return ((torch.tanh(x @ w * scale) - (x[:, 0] > 0).to(x.dtype)) ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "lr"), [(least_squares, 0.005), (saturated, 1.0)])
def test_rounding_errors_at_a_minimum_are_no_wrong_gradient(
    loss: Callable[..., Tensor], lr: float, dtype: torch.dtype
) -> None:
    """Gradients, and the tangents of late steps, are nothing but rounding errors there."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(s, generator=generator).to(dtype) for s in ((5,), (40, 5)))
    scale = torch.tensor(1.2, dtype=dtype, requires_grad=True)
    found = []
    for derivative in ("reverse", "mixed"):
        inner = torchopt.inner_loop(loss, torchopt.sgd(lr), steps=300, derivative=derivative)
        found.append(torch.autograd.grad(inner(w, x, scale).params.sin().sum(), scale)[0])
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
