# SPDX-License-Identifier: Apache-2.0
"""Transforms of torch.func over a call, and derivatives beyond the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

import torchopt

WAYS = [("reverse", "all"), ("reverse", "steps"), ("mixed", 1), ("forward", "all")]
Function = Callable[[Tensor, Tensor, Tensor], Any]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


BATCH = (draw(5, 3, seed=0), draw(5, seed=1))
AT = (draw(3, seed=2) / 2, torch.tensor(0.3).double(), torch.tensor(0.1).double())


def loss_of(p: Tensor, batch: Any, m: Tensor) -> Tensor:
    return ((torch.tanh(batch[0] @ p) - batch[1]) ** 2).mean() + m * (p**4).sum()


def plain(p: Tensor, m: Tensor, lr: Tensor) -> Tensor:
    optimizer = torchopt.adam(lr=lr, eps=1e-1)
    state = optimizer.init(p)
    for _ in range(3):
        g = torch.func.grad(loss_of)(p, BATCH, m)
        updates, state = optimizer.update(g, state, params=p, inplace=False)
        p = torchopt.apply_updates(p, updates, inplace=False)
    return p


def looped(derivative: str, keep: Any) -> Function:
    inner = torchopt.inner_loop(loss_of, torchopt.adam, steps=3, derivative=derivative, keep=keep)
    return lambda p, m, lr: inner(p, BATCH, m, lr=lr, eps=1e-1).params


def squared(function: Function) -> Function:
    return lambda *args: (function(*args) ** 2).sum()


def forward_mode(function: Function) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone(), torch.ones_like(x)) for x in AT]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        assert tangent is not None
        return tangent


def third(function: Function) -> Any:
    at = [x.clone().requires_grad_() for x in AT]
    value = function(*at)
    for _ in range(2):
        grads = torch.autograd.grad(value, at, create_graph=True)
        value = sum((g**2).sum() for g in grads)  # type: ignore[assignment]
    return torch.autograd.grad(value, at)


def rows(function: Function) -> Any:
    at = [x.clone().requires_grad_() for x in AT]
    value = function(*at)
    each = torch.eye(3, dtype=torch.float64)
    return torch.autograd.grad(value, at, each, is_grads_batched=True)


MANY = (torch.stack([AT[0], -AT[0]]), torch.tensor([0.3, 0.5]).double(), AT[2])
EVERY = (0, 1, 2)
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: torch.func.grad(squared(f), EVERY)(*AT),
    "vjp": lambda f: torch.func.vjp(f, *AT)[1](torch.ones(3, dtype=torch.float64)),
    "jacrev": lambda f: torch.func.jacrev(f, EVERY)(*AT),
    "jacfwd": lambda f: torch.func.jacfwd(f, EVERY)(*AT),
    "jvp": lambda f: torch.func.jvp(f, AT, AT)[1],
    "hessian": lambda f: torch.func.hessian(squared(f), EVERY)(*AT),
    "third": lambda f: third(squared(f)),
    "vmap": lambda f: torch.func.vmap(f, (0, 0, None))(*MANY),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(squared(f), EVERY), (0, 0, None))(
        *MANY
    ),
    "forward mode": forward_mode,
    "a batch of cotangents": rows,
}


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize(("derivative", "keep"), WAYS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_the_call(name: str, derivative: str, keep: Any) -> None:
    expected = _pytree.tree_leaves(TRANSFORMS[name](plain))
    got = _pytree.tree_leaves(TRANSFORMS[name](looped(derivative, keep)))
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_a_hyper_parameter_in_a_finished_transformation(derivative: str, keep: Any) -> None:
    def of_lr(lr: Tensor) -> Tensor:
        inner = torchopt.inner_loop(
            loss_of, torchopt.adam(lr, eps=1e-1), steps=3, derivative=derivative, keep=keep
        )
        return (inner(AT[0], BATCH, AT[1]).params ** 2).sum()

    expected = torch.func.grad(squared(plain), 2)(*AT)
    torch.testing.assert_close(torch.func.grad(of_lr)(AT[2]), expected, rtol=1e-12, atol=1e-12)


class Base:
    __slots__ = ("__rate",)

    def __init__(self, rate: Tensor, share: float) -> None:
        self.__rate = rate

    def rate(self) -> Tensor:
        return self.__rate


class InSlotsOfABase(Base):
    __slots__ = ("share",)

    def __init__(self, rate: Tensor, share: float) -> None:
        super().__init__(rate, share)
        self.share = share

    def __call__(self, count: Any) -> Tensor:
        return self.share * self.rate()


class InSlotsAndATable(Base):
    def __init__(self, rate: Tensor, share: float) -> None:
        super().__init__(rate, share)
        self.half = rate / 2
        self.share = 2 * (share - 0.5)

    def __call__(self, count: Any) -> Tensor:
        return self.half + self.share * self.rate()


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize("kind", [InSlotsOfABase, InSlotsAndATable])
@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_a_schedule_whose_numbers_are_in_slots(derivative: str, keep: Any, kind: Any) -> None:
    def of_lr(lr: Tensor) -> Tensor:
        inner = torchopt.inner_loop(
            loss_of, torchopt.sgd(kind(lr, 0.7)), steps=3, derivative=derivative, keep=keep
        )
        return (inner(AT[0], BATCH, AT[1]).params ** 2).sum()

    def by_hand(lr: Tensor) -> Tensor:
        p, rate = AT[0], kind(torch.ones_like(lr), 0.7)(0) * lr
        for _ in range(3):
            p = p - rate * torch.func.grad(loss_of)(p, BATCH, AT[1])
        return (p**2).sum()

    lr = AT[2].clone().requires_grad_()
    expected = torch.func.grad(by_hand)(AT[2])
    (got,) = torch.autograd.grad(of_lr(lr), lr)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
