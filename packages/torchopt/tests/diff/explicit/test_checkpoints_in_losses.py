# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in a loss recomputes what it computed, including replaced operations.

The oracle is the unrolled loop with the operation written out, and without a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.errors import NotDifferentiableError

draw = torch.Generator().manual_seed(0)
W = torch.randn(4, 4, generator=draw, dtype=torch.float64)
X = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64)


def attention(w: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(X @ w, X @ w, X)


def written_attention(w: Tensor) -> Tensor:
    q = X @ w
    return torch.softmax(q @ q.mT / 2, -1) @ X


def normed(w: Tensor) -> Tensor:
    return X @ torch._weight_norm(w, w[:, :1], 0)


def written_norm(w: Tensor) -> Tensor:
    return X @ (w * w[:, :1] / w.square().sum(1, keepdim=True).sqrt())


def nested(w: Tensor) -> Tensor:
    return w.sum() * checkpoint(attention, w, use_reentrant=False)


def thrice(w: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return x.exp() * checkpoint(torch.sin, x, use_reentrant=False)

    return w * checkpoint(inner, w.tanh(), use_reentrant=False)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "attention": (attention, written_attention),
    "weight_norm": (normed, written_norm),
    "a checkpoint in a checkpoint": (nested, lambda w: w.sum() * written_attention(w)),
    "three of them": (thrice, lambda w: w * w.tanh().exp() * w.tanh().sin()),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"keep": "steps"},
    {"keep": 1},
    {"derivative": "mixed"},
    {"derivative": "forward"},
]


CASES = [(name, way) for name in OPERATIONS for way in WAYS]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_gradient_equals_that_of_the_unrolled_loop(name: str, way: dict[str, Any]) -> None:
    function, written_out = OPERATIONS[name]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, _: Any, scale: Tensor) -> Tensor:
        return scale * checkpoint(function, w, use_reentrant=False).square().mean()

    w = W.clone().requires_grad_()
    for _ in range(3):
        value = scale * written_out(w).square().mean()
        w = w - 0.1 * torch.autograd.grad(value, w, create_graph=True)[0]
    (expected,) = torch.autograd.grad(w.pow(3).sum(), scale)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, **way)
    (found,) = torch.autograd.grad(inner(W, None, scale).params.pow(3).sum(), scale)
    assert (found - expected).abs() <= 1e-11 * expected.abs()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_checkpoints_are_right_in_a_batch_of_tasks(way: dict[str, Any]) -> None:
    def inside(x: Tensor) -> Tensor:
        return nn.functional.dropout((x @ x.mT).tanh(), 0.3) + attention(x)[0, :4]

    found = []
    for wrapped in (inside, lambda x: checkpoint(inside, x, use_reentrant=False)):
        torch.manual_seed(0)
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def loss(w: Tensor, x: Tensor, scale: Tensor, wrapped: Any = wrapped) -> Tensor:
            return (scale * wrapped(w * x)).square().mean()

        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, tasks=(None, 0, None), **way)
        batch = torch.stack([W, W.sin(), W.cos()])
        total = inner(W, batch, scale).params.pow(3).sum()
        found.append(torch.autograd.grad(total, scale)[0])
    assert found[0].abs() > 1e-6
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def loop_by_hand(function: Callable[[Tensor], Tensor], w: Tensor, scale: Tensor) -> Tensor:
    def loss(w: Tensor) -> Tensor:
        return scale * function(w).square().mean()

    for _ in range(2):
        w = w - 0.1 * torch.func.grad(loss)(w)
    return w


def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args).pow(3).sum()


SCALE = torch.tensor(0.7, dtype=torch.float64)
MANY = torch.stack([W, W.sin()])
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "vmap": lambda f: torch.func.vmap(f, (0, None))(MANY, SCALE),
    "grad": lambda f: torch.func.grad(total(f), 1)(W, SCALE),
    "jvp": lambda f: torch.func.jvp(lambda s: f(W, s), (SCALE,), (SCALE,))[1],
    "hessian": lambda f: torch.func.hessian(total(f), 1)(W, SCALE),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(total(f), 1), (0, None))(MANY, SCALE),
    "grad of vmap": lambda f: torch.func.grad(
        lambda s: torch.func.vmap(f, (0, None))(MANY, s).pow(3).sum()
    )(SCALE),
}


# torch has no rule for a batch of weight_norm, and warns.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("way", [*WAYS, {"derivative": "first_order"}], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_checkpoint_in_a_transform_of_the_call(transform: str, way: dict[str, Any]) -> None:
    for name, (function, written_out) in OPERATIONS.items():

        def loss(w: Tensor, _: Any, scale: Tensor, function: Any = function) -> Tensor:
            return scale * checkpoint(function, w, use_reentrant=False).square().mean()

        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, **way)
        found = TRANSFORMS[transform](lambda w, scale, run=inner: run(w, None, scale).params)
        if way.get("derivative") == "first_order" and transform != "vmap":
            continue  # a different derivative
        expected = TRANSFORMS[transform](lambda w, scale, f=written_out: loop_by_hand(f, w, scale))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_checkpoint_draws_in_a_vmap_what_it_draws_without_one(way: dict[str, Any]) -> None:
    def inside(w: Tensor) -> Tensor:
        return nn.functional.dropout(w.tanh(), 0.5)

    found = []
    for wrapped in (inside, lambda w: checkpoint(inside, w, use_reentrant=False)):
        torch.manual_seed(0)

        def loss(w: Tensor, _: Any, wrapped: Any = wrapped) -> Tensor:
            return wrapped(w).pow(4).mean()

        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, **way)
        over = torch.func.vmap(
            torch.func.grad(lambda w, run=inner: run(w).params.pow(3).sum()),
            randomness="different",
        )
        found.append(over(MANY))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def reentrant(w: Tensor, _: Any) -> Tensor:
    return checkpoint(torch.sin, w, use_reentrant=True).square().sum()


def hooked(w: Tensor, _: Any) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return w.sin().square().sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [(reentrant, "expected use_reentrant=False"), (hooked, "expected no hooks for saved tensors")],
)
def test_what_no_transform_can_differentiate_is_named(loss: Any, message: str) -> None:
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2)
    for transform in (torch.func.vmap, torch.func.jacrev):
        with pytest.raises(NotDifferentiableError, match=message):
            transform(lambda w: inner(w).params)(MANY)
