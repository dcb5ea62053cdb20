# SPDX-License-Identifier: Apache-2.0
"""Long runs of short steps: the last keep their graphs, others are reversed several at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from unrolled_loops import worst

import torchopt
from torchopt.diff.explicit import dispatch
from torchopt.diff.explicit.memory import CountBytes
from torchopt.errors import NotDifferentiableError

STEPS = 40
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROOMS = [0, 2**12, 2**14, 2**20]


def loss(w: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.nn.functional.dropout(x, 0.3) @ (w * m)
    return (torch.tanh(y) ** 2).mean() + 0.01 * (w**2).sum(), y.sum()


def leaves() -> list[Tensor]:
    w = torch.linspace(-1, 1, 4, dtype=torch.float64)
    more = [torch.tensor(v, dtype=torch.float64) for v in (0.8, 0.05)]
    return [x.requires_grad_() for x in (w, X.clone(), *more)]


def value(inputs: list[Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    w, x, m, lr = inputs
    inner = torchopt.inner_loop(loss, torchopt.adam, steps=STEPS, **options)
    result = inner(w, x, m, lr=lr, eps=0.1)
    counts = torch.arange(1.0, STEPS + 1, dtype=torch.float64)
    total: Tensor = result.params.sum() + ((result.losses + 0.1 * result.aux) * counts).sum()
    return total


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("window", [None, 35])
def test_the_gradient_is_that_of_the_plain_loop_each_time(
    room: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = leaves()
    expected = torch.autograd.grad(value(inputs, window=window), inputs, allow_unused=True)
    monkeypatch.setattr(dispatch, "ROOM", room)
    total = value(inputs, window=window, keep="steps")
    for again in (True, True, False):  # the first pass uses up the graph that is kept
        found = torch.autograd.grad(total, inputs, retain_graph=again)
        assert worst(expected, found, inputs) < 1e-12


def test_the_surroundings_of_the_call_change_nothing() -> None:
    inputs = leaves()
    expected = torch.autograd.grad(value(inputs), inputs)

    def around(*inputs: Tensor) -> Tensor:
        return value(list(inputs), keep="steps")

    found = torch.autograd.grad(checkpoint(around, *inputs, use_reentrant=False), inputs)
    assert worst(expected, found, inputs) < 1e-12
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        total = value(inputs, keep="steps")
    assert worst(expected, torch.autograd.grad(total, inputs), inputs) < 1e-12


def test_a_closure_that_only_late_steps_use_is_refused() -> None:
    hidden = torch.ones(4, dtype=torch.float64, requires_grad=True)
    calls = [0]

    def late(w: Tensor, _: Any) -> Tensor:
        calls[0] += 1
        return ((w - (hidden if calls[0] > STEPS - 2 else 1)) ** 2).sum()

    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(late, torchopt.sgd(0.1), steps=STEPS, keep="steps")
    with pytest.raises(NotDifferentiableError, match="hidden"):
        inner(w, None)


def test_a_run_that_was_small_is_kept_whole_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    run = dispatch.Run

    def counted(*args: Any) -> Any:
        made.append(1)
        return run(*args)

    monkeypatch.setattr(dispatch, "Run", counted)
    inputs = leaves()
    expected = torch.autograd.grad(value(inputs), inputs)
    w, x, m, lr = inputs
    inner = torchopt.inner_loop(loss, torchopt.adam, steps=STEPS, keep="steps")
    counts = torch.arange(1.0, STEPS + 1, dtype=torch.float64)
    for _ in range(3):
        torch.manual_seed(0)
        result = inner(w, x, m, lr=lr, eps=0.1)
        total = result.params.sum() + ((result.losses + 0.1 * result.aux) * counts).sum()
        assert worst(expected, torch.autograd.grad(total, inputs), inputs) < 1e-12
    assert len(made) == 1


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


@pytest.mark.parametrize("keep", ["all", "steps", 3])
@pytest.mark.parametrize("steps", [4, STEPS])
def test_a_late_step_without_a_second_derivative_is_refused(steps: int, keep: Any) -> None:
    calls = [0]

    def late(w: Tensor, _: Any) -> Tensor:
        calls[0] += 1
        return (Cube.apply(w) if calls[0] > steps - 1 else w**3).sum()  # type: ignore[no-any-return]

    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(late, torchopt.sgd(0.01), steps=steps, keep=keep)
    with pytest.raises(NotDifferentiableError, match="Cube, once_differentiable"):
        inner(w, None)


def test_memory_beyond_the_states_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of memory in the number of steps is that of a state, 100 numbers."""
    room, peaks = 2**20, list[int]()
    monkeypatch.setattr(dispatch, "ROOM", room)
    w = torch.ones(100, dtype=torch.float64, requires_grad=True)
    for steps in (1000, 2000):
        inner = torchopt.inner_loop(
            lambda w, _: (torch.tanh(w) ** 2).sum(), torchopt.sgd(0.1), steps=steps, keep="steps"
        )
        with CountBytes() as count:
            torch.autograd.grad(inner(w, None).params.sum(), w)
        peaks.append(count.peak)
    assert peaks[0] < room + 1000 * 1000
    assert (peaks[1] - peaks[0]) / 1000 < 1.1 * 800 + 16
