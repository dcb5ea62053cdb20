# SPDX-License-Identifier: Apache-2.0
"""A constant of the loss in reverse mode is a constant in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unrolled_loops import unrolled, worst

import torchopt
from torchopt.errors import NotDifferentiableError

EYE = torch.eye(3, dtype=torch.float64)


def without_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        target = y.sin()
    return y - target


@torch.no_grad()
def decorated(y: Tensor) -> Tensor:
    return y.sin()


def switched(y: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    target = y.sin()
    torch.set_grad_enabled(before)
    return y.cos() - target


def nested(y: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.no_grad():
            first = y.sin()
        with torch.enable_grad():
            second = y.cos()
        third = y.exp()
    return (first + second + third) * y


def interrupted(y: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            raise KeyError
    except KeyError:
        return y.sin() * y


def views(y: Tensor) -> Tensor:
    with torch.no_grad():
        whole, (first, *_), turned = y.view(-1), y.unbind(), y.T
        own = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert own.requires_grad
    return y * whole.view(3, 3).sin() + first + turned.exp()


def transform_in_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        slope = torch.func.grad(lambda x: (x**3).sum())(y)
        with torch.enable_grad():
            moved = y.sin()
    return slope * moved * y


def no_grad_in_transform(y: Tensor) -> Tensor:
    def value(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = x.exp()
        return (factor * x**2).sum()

    return torch.func.grad(value)(y) * y


def views_in_a_vmap(y: Tensor) -> Tensor:
    with torch.no_grad():
        rows = torch.func.vmap(lambda row: row.view(-1))(y)
    mixed = torch.func.vmap(lambda row: row * torch.no_grad()(torch.flatten)(row))(y)
    return rows * y + mixed


def accumulated(y: Tensor, create_graph: bool = False) -> Tensor:
    z = 2 * y
    z.retain_grad()
    (z**3).sum().backward(inputs=[z], create_graph=create_graph, retain_graph=True)
    assert z.grad is not None
    return z.grad * y


def kept_constant(y: Tensor) -> Tensor:
    with torch.no_grad():
        factor = y.exp()
    return factor * y**2


def slope_without_graph(y: Tensor) -> Tensor:
    (g,) = torch.autograd.grad((y**3).sum(), y, retain_graph=True)
    return g * y


def slope_with_graph(y: Tensor) -> Tensor:
    (g,) = torch.autograd.grad((y**3).sum(), y, None, None, True)
    return g * y


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": without_grad,
    "a decorated function": lambda y: y - decorated(y),
    "set_grad_enabled": switched,
    "enable_grad in no_grad": nested,
    "an exception in no_grad": interrupted,
    "detach": lambda y: y - y.sin().detach(),
    "data": lambda y: y - y.sin().data,
    "a factor from no_grad in a checkpoint": lambda y: checkpoint(
        kept_constant, y, use_reentrant=False
    ),
    "views": views,
    "views in a vmap": views_in_a_vmap,
    "a transform in no_grad": transform_in_no_grad,
    "no_grad in a transform": no_grad_in_transform,
    "an accumulated gradient": accumulated,
    "an accumulated gradient with a graph": lambda y: accumulated(y, True),
    "a gradient without a graph": slope_without_graph,
    "a gradient with a graph": slope_with_graph,
    "no_grad in a checkpoint": lambda y: checkpoint(without_grad, y, use_reentrant=False),
}
# Its backward pass reads tensors without tangents or has no forward mode, unless it has a graph.
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda y: torch.linalg.solve(y + 3 * EYE, EYE[0]),
    "det": lambda y: torch.linalg.det(y + 3 * EYE),
    "slogdet": lambda y: torch.linalg.slogdet(y + 3 * EYE)[1],
    "logdet": lambda y: torch.logdet(y + 3 * EYE),
    "tensorsolve": lambda y: torch.linalg.tensorsolve(y + 3 * EYE, EYE[1]),
    "cumprod": lambda y: torch.cumprod(y * (1 - EYE), 0) + torch.cumprod(y, 1),
    "silu": torch.nn.functional.silu,
    "mish": torch.nn.functional.mish,
    "group norm": lambda y: torch.nn.functional.group_norm(y, 1),
}
WAYS: list[dict[str, Any]] = [
    {"derivative": "mixed"},
    {"derivative": "mixed", "keep": "steps"},
    {"derivative": "mixed", "keep": 1},
    {"derivative": "forward"},
    {"derivative": "reverse", "keep": "steps"},
]
TRACED: list[dict[str, Any]] = [
    {"derivative": "mixed", "execute": "trace"},
    {"derivative": "forward", "execute": "trace"},
]
CASES = [
    *((name, way) for name in (*CONSTANTS, *KEPT) for way in WAYS),
    *((name, way) for name in ("no_grad", "solve", "a gradient without a graph") for way in TRACED),
]


@pytest.mark.parametrize("way", [*WAYS, *TRACED], ids=str)
def test_the_mean_square_error_has_a_forward_mode(way: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, y = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def loss(p: Tensor, batch: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(torch.tanh(p @ batch), y)

    final, _, _ = unrolled(loss, torchopt.sgd(lr), w, [x] * 3)
    (expected,) = torch.autograd.grad(final.square().sum(), lr)
    inner = torchopt.inner_loop(loss, torchopt.sgd, steps=3, **way)
    result = inner(w.detach(), x, lr=lr)
    (found,) = torch.autograd.grad(result.params.square().sum(), lr)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def loss_by(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def loss(p: dict[str, Tensor], batch: Tensor, scale: Tensor) -> Tensor:
        y = torch.tanh(p["w"] @ batch * scale)
        return (function(y) ** 2).mean() + (p["w"] ** 2).sum()

    return loss


@pytest.mark.filterwarnings("ignore:Using backward")  # of a graph that `w.grad` keeps
@pytest.mark.parametrize(
    ("name", "way"),
    CASES,
    ids=lambda x: x if isinstance(x, str) else "/".join(map(str, x.values())),
)
def test_the_gradient_equals_that_of_the_unrolled_loop(name: str, way: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    if way["derivative"] != "forward":
        w.requires_grad_()
    inputs = [x for x in (w, scale, lr) if x.requires_grad]
    loss = loss_by({**CONSTANTS, **KEPT}[name])
    final, losses, _ = unrolled(loss, torchopt.sgd(lr), {"w": w}, [x] * 3, scale)
    expected = torch.autograd.grad(final["w"].sum() + losses.sum(), inputs)
    given = {"w": w if len(inputs) == 3 else w.detach()}
    result = torchopt.inner_loop(loss, torchopt.sgd, steps=3, **way)(given, x, scale, lr=lr)
    found = torch.autograd.grad(result.params["w"].sum() + result.losses.sum(), inputs)
    assert worst(expected, found, inputs) < 1e-12
    assert torch.is_grad_enabled()


class Target(nn.Module):
    """A block with a constant inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return x + torch.tanh(without_grad(y)) * y


def test_constants_of_blocks_are_constants() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Target() for _ in range(3))).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    params = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}

    def loss(p: Any, batch: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out**2).mean()

    found = []
    for options in ({}, {"derivative": "mixed", "blocks": ()}, {"derivative": "mixed"}):
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, keep="all", **options)
        value = inner(params, x).losses.sum()
        found.append(torch.autograd.grad(value, [*params.values(), x]))
    for other in found[1:]:
        assert worst(found[0], other, found[0]) < 1e-12


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_an_operation_without_forward_mode_is_named() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda w, x: Cube.apply(w).sum(), torchopt.sgd(0.1), steps=2, derivative="mixed"
    )
    result = inner(w, None)
    with pytest.raises(NotDifferentiableError, match='use derivative="reverse"'):
        result.params.sum().backward()


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize(
    ("function", "instead"),
    [
        (torch.cholesky_inverse, "torch.cholesky_solve"),
        (lambda x: torch.triangular_solve(EYE, x)[0], "torch.linalg.solve_triangular"),
    ],
)
@pytest.mark.parametrize("derivative", ["mixed", "forward"])
def test_an_operation_with_a_wrong_tangent_is_refused(
    derivative: str, function: Any, instead: str
) -> None:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda w, x, scale: function(w * scale + 3 * EYE).square().sum(),
        torchopt.sgd(0.1),
        steps=1,
        derivative=derivative,
    )
    with pytest.raises(NotDifferentiableError, match=f"tangent torch computes wrongly.*{instead}"):
        inner(EYE.clone(), None, scale).params.sum().backward()


@pytest.mark.parametrize("norm", [nn.LayerNorm(3), nn.BatchNorm1d(3)])
@pytest.mark.parametrize("derivative", ["mixed", "forward"])
def test_a_penalty_of_the_gradient_of_a_normalisation_is_refused(
    derivative: str, norm: nn.Module
) -> None:
    norm = norm.double().requires_grad_(False)

    def loss(w: Tensor, batch: Tensor, scale: Tensor) -> Tensor:
        value = norm((batch * scale) @ w).pow(3).sum()
        (slope,) = torch.autograd.grad(value, w, create_graph=True)
        return slope.square().sum()

    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, derivative=derivative)
    with pytest.raises(NotDifferentiableError, match="in which torch's forward mode treats mean"):
        inner(w, x, scale).params.sum().backward()


class _Doubled(torch.autograd.Function):
    """The identity, whose backward pass doubles the gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return 2 * cotangents[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return tangents[0].clone()


@pytest.mark.parametrize("changed", [False, True])
def test_half_precision_inside_a_loss_is_no_wrong_slope(changed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, y = (torch.randn(8, 8, generator=generator) for _ in range(3))

    def loss(w: Tensor, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.tanh(torch.tanh(batch @ w) @ w) - y
        return ((_Doubled.apply(z) if changed else z).float() ** 2).mean()  # type: ignore[no-untyped-call]

    w.requires_grad_()

    def moved(derivative: str) -> Tensor:  # its cotangent is along the gradient of the loss
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.3), steps=1, derivative=derivative)
        return (inner(w, x).params - w.detach()).square().sum()

    (expected,) = torch.autograd.grad(moved("reverse"), w)
    total = moved("mixed")
    if changed:
        with pytest.raises(NotDifferentiableError, match="whose backward pass is its derivative"):
            total.backward()
    else:
        (found,) = torch.autograd.grad(total, w)
        assert (found - expected).norm() < 2**-6 * expected.norm()  # of 8 bits, rounding takes two
