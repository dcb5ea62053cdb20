# SPDX-License-Identifier: Apache-2.0
"""Changes of an optimizer's content during a run, or between a run and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unrolled_loops import unrolled

import torchopt
from torchopt import schedule
from torchopt.diff import Explicit, Verify
from torchopt.diff.explicit import trace

X = torch.tensor([1.0, 2.0], dtype=torch.float64)
START = torch.tensor([0.1, 0.2], dtype=torch.float64)
WAYS: list[dict[str, Any]] = [
    {"keep": "all"},
    {"keep": "steps"},
    {"keep": 1},
    {"keep": 2},
    {"derivative": "mixed"},
    {"derivative": "mixed", "keep": "steps"},
    {"derivative": "mixed", "keep": 1},
    {"derivative": "differences"},
    {"derivative": "forward"},
    {"execute": "trace"},
]
Case = tuple[Any, Callable[[], object]]
ways = pytest.mark.parametrize("options", WAYS, ids=lambda x: "-".join(map(str, x.values())))


def loss_of(w: Tensor, x: Tensor) -> Tensor:
    return ((w - x) ** 4).sum()


def gradient(optimizer: Any, change: Callable[[], object], options: dict[str, Any]) -> Tensor:
    w = START.clone().requires_grad_()
    result = torchopt.inner_loop(loss_of, optimizer, steps=4, **options)(w, X)
    change()
    return torch.autograd.grad(result.params.sum(), w)[0]


def a_plateau() -> Case:
    rate = schedule.ReduceOnPlateau(0.05, factor=0.5, patience=0)
    return torchopt.sgd(rate), lambda: [rate.observe(1.0) for _ in range(3)]


def a_tensor() -> Case:
    rate = torch.tensor(0.05, dtype=torch.float64)
    return torchopt.sgd(rate), lambda: rate.mul_(0.5)


def a_momentum() -> Case:
    momentum = torch.tensor(0.9, dtype=torch.float64)
    return torchopt.sgd(0.01, momentum=momentum), lambda: momentum.mul_(0.5)


def a_list() -> Case:
    held = [0.05]
    return torchopt.sgd(lambda count: held[0]), lambda: held.__setitem__(0, 0.025)


class Rate:
    def __init__(self) -> None:
        self.value: Any = 0.05

    def __call__(self, count: Any) -> Any:
        return self.value


def an_attribute() -> Case:
    rate = Rate()
    return torchopt.sgd(rate), lambda: setattr(rate, "value", 0.025)


def a_buffer() -> Case:
    module = nn.Module()
    module.register_buffer("rate", torch.tensor(0.05, dtype=torch.float64))
    return torchopt.sgd(lambda count: module.rate), lambda: module.rate.mul_(0.5)


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@ways
@pytest.mark.parametrize("case", [a_plateau, a_tensor, a_momentum, a_list, an_attribute, a_buffer])
def test_a_change_after_the_run_is_not_seen(case: Callable[[], Case], options: Any) -> None:
    optimizer, change = case()
    expected = gradient(optimizer, lambda: None, {"keep": "all"})
    optimizer, change = case()
    got = gradient(optimizer, change, options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", WAYS[:4], ids=lambda x: "-".join(map(str, x.values())))
def test_a_large_tensor_that_is_changed_is_refused(options: Any) -> None:
    rate = torch.full((2**14 + 1,), 0.05, dtype=torch.float64)
    x = torch.ones_like(rate)
    w = (x / 2).requires_grad_()

    def update(grads: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return -rate * grads, state

    def found(change: bool) -> Tensor:
        rates = torchopt.base.GradientTransformation(lambda params: (), update)
        result = torchopt.inner_loop(loss_of, rates, steps=2, **options)(w, x)
        if change:
            rate.mul_(0.5)
        return torch.autograd.grad(result.params.sum(), w)[0]

    expected = found(change=False)
    if options["keep"] == "all":
        torch.testing.assert_close(found(change=True), expected, rtol=1e-9, atol=1e-9)
        return
    with pytest.raises(RuntimeError, match="got rate, which was changed in place"):
        found(change=True)


class Counted:
    """A learning rate that falls with each call, independently of the count."""

    def __init__(self, rate: Tensor) -> None:
        self.rate, self.calls = rate, 0

    def __call__(self, count: Any) -> Tensor:
        self.calls += 1
        return self.rate / self.calls


@pytest.mark.parametrize("options", WAYS[:8], ids=lambda x: "-".join(map(str, x.values())))
def test_a_schedule_with_its_own_state_is_differentiated(options: Any) -> None:
    def by_hand(rate: Tensor) -> Tensor:
        w = START
        for k in range(1, 6):
            w = w - rate / k * 4 * (w - X) ** 3
        return w.sum()

    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(by_hand(rate), rate)
    inner = torchopt.inner_loop(loss_of, torchopt.sgd(Counted(rate)), steps=5, **options)
    (got,) = torch.autograd.grad(inner(START, X).params.sum(), rate)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("keep", ["steps", 1])
def test_a_loss_that_holds_another_value_is_not_traced_for_the_run(
    keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_kept", trace.Kept())
    held = [1.5]

    def inner(w: Tensor) -> Tensor:
        def loss(w: Tensor, x: Tensor) -> Tensor:
            return held[0] * ((w - x) ** 4).sum()

        sgd = torchopt.sgd(0.03, momentum=0.9)
        return torchopt.inner_loop(loss, sgd, steps=4, keep=keep, execute="trace")(w, X).params

    def by_hand(w: Tensor) -> Tensor:
        m = torch.zeros_like(w)
        for _ in range(4):
            m = 0.9 * m + 1.5 * 4 * (w - X) ** 3
            w = w - 0.03 * m
        return w

    w = START.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(w).sum(), w)
    found = inner(w)
    held[0] = 3.0
    with pytest.raises(RuntimeError, match=r"held\[0\], which has another value now"):
        torch.autograd.grad(found.sum(), w)
    held[0] = 1.5
    (got,) = torch.autograd.grad(inner(w).sum(), w)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


WIDE = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)


def from_a_draw(rate: Tensor) -> Any:
    """Return descent with a velocity that starts at random multiples of the parameters."""

    def init(params: Tensor) -> Tensor:
        return torch.rand_like(params, requires_grad=False) * params

    def update(grads: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        state = 0.9 * state + grads
        return -rate * state, state

    return torchopt.base.GradientTransformation(init, update)


def dropped(w: Tensor, x: Tensor) -> Tensor:
    return (nn.functional.dropout(w - x / 2, 0.5) ** 4).sum()


def run_from_a_draw(options: dict[str, Any] | None) -> list[Tensor]:
    """Return losses, the next random numbers, and gradients; None: of the loop by hand."""
    torch.manual_seed(0)
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    w = WIDE.clone().requires_grad_()
    if options is None:
        params, losses, _ = unrolled(dropped, from_a_draw(rate), w, [WIDE] * 4)
    else:
        inner = torchopt.inner_loop(dropped, from_a_draw(rate), steps=4, **options)
        params, _, losses, _ = inner(w, WIDE)
    drawn = torch.rand(2)
    return [losses, drawn, *torch.autograd.grad(params.sum() + losses.sum(), (w, rate))]


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        *WAYS,
        *({"derivative": x, "keep": "1MiB"} for x in ("reverse", "mixed", "forward")),
        {"derivative": "forward", "execute": "trace"},
        {"verify": Verify(Explicit(derivative="mixed"), rate=1.0, limit=1e-12)},
    ],
    ids=lambda x: "-".join(map(str, x.values()))[:40],
)
def test_numbers_drawn_at_the_start_are_not_those_of_the_first_step(options: Any) -> None:
    for got, expected in zip(run_from_a_draw(options), run_from_a_draw(None)):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
