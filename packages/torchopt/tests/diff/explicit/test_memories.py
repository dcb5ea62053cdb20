# SPDX-License-Identifier: Apache-2.0
"""Losses with a memory: every recomputed step sees the memory of its first run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unrolled_loops import worst

import torchopt
from torchopt.diff.explicit import stepper
from torchopt.errors import NotDifferentiableError

STEPS = 4
X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WAYS: list[dict[str, Any]] = [
    {"keep": "steps"},
    {"keep": 1},
    {"keep": 2},
    {"keep": "100MiB"},
    {"derivative": "mixed"},
    {"derivative": "mixed", "keep": 1},
]

Loss = Callable[[Tensor, Any], Tensor]
# Each returns a loss, and a function that returns its memory.
Made = tuple[Loss, Callable[[], Any]]


def value(w: Tensor, factor: Any = 1, x: Tensor = X[0]) -> Tensor:
    return (torch.tanh(x @ w * factor) ** 2).mean()


def average_in_place() -> Made:
    mean = torch.zeros(4, dtype=torch.float64)

    def loss(w: Tensor, _: Any) -> Tensor:
        mean.mul_(0.9).add_(w.detach(), alpha=0.1)
        return value(w - mean)

    return loss, mean.clone


GLOBAL: dict[str, Any] = {}


def globals_in_place() -> Made:
    GLOBAL.update(calls=0, moved=torch.zeros(4, dtype=torch.float64))

    def loss(w: Tensor, _: Any) -> Tensor:
        GLOBAL["calls"] += 1
        GLOBAL["moved"].add_(0.1)
        return value(w + GLOBAL["moved"], GLOBAL["calls"])

    return loss, lambda: GLOBAL["moved"].clone()


def attributes_that_come_later() -> Made:
    class Memory:
        calls = 0

    memory = Memory()

    def loss(w: Tensor, _: Any) -> Tensor:
        memory.calls = memory.calls + 1
        return value(w, memory.calls)

    return loss, lambda: 0


def attribute_of_the_function() -> Made:
    def loss(w: Tensor, _: Any) -> Tensor:
        loss.calls = getattr(loss, "calls", 0) + 1  # type: ignore[attr-defined]
        return value(w, loss.calls)  # type: ignore[attr-defined]

    return loss, lambda: 0


def teacher() -> Made:
    torch.manual_seed(0)
    net = nn.Linear(4, 1).double()

    def loss(w: Tensor, _: Any) -> Tensor:
        with torch.no_grad():
            net.weight.mul_(0.8).add_(w, alpha=0.2)
            target = net(X[0])[:, 0]
        return ((X[0] @ w - target) ** 2).mean() + (w**2).sum()

    return loss, net.weight.detach().clone


class Averaging(nn.Module):
    """A module with a tensor that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros((), dtype=torch.float64)

    def forward(self, y: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(y.detach().mean())
        return y - self.mean.clone()


def module_with_a_plain_tensor() -> Made:
    net = Averaging()
    return lambda w, _: (net(torch.tanh(X[0] @ w)) ** 2).mean(), lambda: net.mean.clone()


def cycle() -> Made:
    factors = itertools.cycle([0.3, 0.8, 1.4])
    return lambda w, _: value(w, next(factors)), lambda: next(factors)


def loader() -> Made:
    def batches() -> Any:
        while True:
            yield from X

    iterator = batches()
    return lambda w, _: value(w, 1, next(iterator)), lambda: next(iterator).clone()


def iterator_of_an_object() -> Made:
    class Trainer:
        def __init__(self) -> None:
            self.batches = iter([*X, *X])

        def loss(self, w: Tensor, _: Any) -> Tensor:
            return value(w, 1, next(self.batches))

    trainer = Trainer()
    return trainer.loss, lambda: next(trainer.batches).clone()


def iterator_that_is_written_as_a_class() -> Made:
    class Stream:
        def __init__(self) -> None:
            self.rows, self.served = iter([*X, *X]), 1.0

        def __iter__(self) -> Stream:
            return self

        def __next__(self) -> Tensor:
            return next(self.rows)

        def __len__(self) -> int:
            return 6

    class Owner:
        stream = Stream()

    def loss(w: Tensor, _: Any) -> Tensor:
        Owner.stream.served += 0.1 * len(Owner.stream)
        return value(w, Owner.stream.served, next(Owner.stream))

    return loss, lambda: (Owner.stream.served, next(Owner.stream).sum())


def generator_that_is_answered() -> Made:
    def answers() -> Iterator[float]:
        total = 1.0
        while True:
            total += (yield total) or 0.0  # type: ignore[misc]

    generator: Any = answers()
    next(generator)
    return lambda w, _: value(w, generator.send(0.5)), lambda: next(generator)


def log() -> Made:
    values: list[float] = []

    def loss(w: Tensor, _: Any) -> Tensor:
        found = value(w, 1 + len(values))
        values.append(float(found.detach()))
        return found

    return loss, lambda: values[:STEPS]


MEMORIES: list[Callable[[], Made]] = [
    average_in_place,
    globals_in_place,
    attributes_that_come_later,
    attribute_of_the_function,
    teacher,
    module_with_a_plain_tensor,
    cycle,
    loader,
    iterator_of_an_object,
    iterator_that_is_written_as_a_class,
    generator_that_is_answered,
    log,
]


def run(make: Callable[[], Made], way: dict[str, Any]) -> tuple[Any, Any, Any]:
    loss, remembered = make()
    w = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    result = torchopt.inner_loop(loss, torchopt.adam, steps=STEPS, **way)(w, None, lr=lr, eps=0.1)
    total = result.params.sum() + (result.losses * torch.arange(1.0, STEPS + 1)).sum()
    return torch.autograd.grad(total, (w, lr)), result.losses, remembered()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "/".join(map(str, way.values())))
@pytest.mark.parametrize("make", MEMORIES)
def test_memories_are_restored_for_each_recomputed_step(
    make: Callable[[], Made], way: dict[str, Any]
) -> None:
    expected, losses, memory = run(make, {"keep": "all"})
    found, again, left = run(make, way)
    assert torch.equal(losses, again)
    assert worst(expected, found, expected) < 1e-12
    assert (
        memory == pytest.approx(left, abs=0) if isinstance(memory, float) else _same(memory, left)
    )


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def test_a_large_tensor_that_is_changed_in_place_is_named() -> None:
    large = torch.zeros(2**15, dtype=torch.float64)

    def loss(w: Tensor, _: Any) -> Tensor:
        large.add_(0.1)
        return value(w + large[:4])

    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, keep="steps")
    with pytest.raises(NotDifferentiableError, match=r"got large of shape \(32768,\)"):
        inner(w, None)
    with torch.no_grad():
        assert inner(w, None).losses.isfinite().all()


def test_a_budget_takes_complex_parameters() -> None:
    w = torch.view_as_complex(X[0, :, :2].clone()).requires_grad_()
    found = []
    for keep in ("all", "1MiB"):
        inner = torchopt.inner_loop(
            lambda w, _: (w.abs() ** 4).sum(), torchopt.sgd(0.01), steps=3, keep=keep
        )
        found.append(torch.autograd.grad(inner(w, None).losses.sum(), w))
    assert worst(*found, found[0]) < 1e-12


@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: str(way["keep"]))
def test_autocast_around_the_call_is_around_each_recomputation(way: dict[str, Any]) -> None:
    w, x = (X[0, :4, :].float().clone().requires_grad_(), X[1].float())

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh((x @ w).float()) ** 2).mean()

    found = []
    for options in ({"keep": "all"}, way):
        with torch.autocast("cpu", torch.bfloat16):
            result = torchopt.inner_loop(loss, torchopt.sgd(0.5), steps=3, **options)(w, x)
        found.append(torch.autograd.grad(result.params.sum() + result.losses.sum(), w))
    assert worst(*found, found[0]) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.autograd.grad(loss(w, x), w)
    assert worst(rounded, torch.autograd.grad(loss(w, x), w), rounded) > 1e-4


def test_the_sizes_of_a_bounded_number_of_forms_are_remembered() -> None:
    sizes = stepper.Memory().sizes
    for i in range(3 * stepper.MOST):
        sizes[i] = i
    assert list(sizes) == list(range(2 * stepper.MOST, 3 * stepper.MOST))
