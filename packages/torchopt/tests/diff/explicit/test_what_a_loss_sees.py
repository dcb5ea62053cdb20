# SPDX-License-Identifier: Apache-2.0
"""Random numbers, buffers, checkpoints and closures of a loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unrolled_loops import outer, unrolled, worst

import torchopt
from torchopt.errors import NotDifferentiableError

WAYS: list[tuple[str, Any]] = [
    ("reverse", "all"),
    ("reverse", "steps"),
    ("reverse", 2),
    ("mixed", "steps"),
    ("mixed", 1),
    ("forward", "all"),
]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.last = nn.Linear(5, 2)

    def hidden(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.tanh(self.first(x)), 0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(checkpoint(self.hidden, x, use_reentrant=False))
        return out


class Recurrent(nn.Module):
    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = make(3, 2, batch_first=True)
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.cell(torch.stack([x, x**2], dim=1))[0][:, -1])
        return out


class Counting(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale = self.scale * 0.9
        out: Tensor = self.last(x) * self.scale * self.calls
        return out


class LargeBuffer(nn.Module):
    """It writes to a buffer that is too large to be copied if it were not one."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.register_buffer("table", torch.zeros(2**15))

    def forward(self, x: Tensor) -> Tensor:
        self.table.add_(0.1)
        out: Tensor = self.last(x) * self.table[0].clone()
        return out


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout": dropped,
    "batch normalisation": normalised,
    "a checkpoint with dropout": Checkpointed,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "a counter": Counting,
    "a large buffer": LargeBuffer,
}


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "adam") for name in MODULES), ("dropout", "noisy")]
)
def test_each_recomputation_sees_what_its_step_saw(name: str, optimizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    expected: Any = None
    for derivative, keep in [("plain", None), *WAYS]:
        torch.manual_seed(1)
        module = MODULES[name]().double()

        def loss(p: Any, batch: Any, m: Tensor, module: nn.Module = module) -> Tensor:
            out = torchopt.params.functional_call(module, p, batch[0])
            return ((out - batch[1] * m) ** 2).mean()

        m = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        params = {
            k: p.detach().clone().requires_grad_(derivative != "forward")
            for k, p in module.named_parameters()
        }
        made = torchopt.adam(lr=lr, eps=1e-1)
        if optimizer == "noisy":
            made = torchopt.chain(torchopt.transform.add_noise(0.1), made)
        inputs = [m, lr, *params.values()]
        if derivative == "plain":
            result: Any = unrolled(loss, made, params, [(x, y)] * 3, m)
        else:
            inner = torchopt.inner_loop(loss, made, steps=3, derivative=derivative, keep=keep)
            result = inner(params, (x, y), m)
        buffers = {k: b.clone() for k, b in module.named_buffers()}
        drawn = torch.rand(3)
        asked = inputs[:2] if derivative == "forward" else inputs
        got = torch.autograd.grad(
            outer(result[0], result[1 if derivative == "plain" else 2]), asked
        )
        if derivative == "plain":
            expected = got, buffers, drawn
            continue
        assert worst(expected[0][: len(got)], got, asked) < 1e-12, (derivative, keep)
        assert torch.equal(drawn, expected[2])
        for k, b in module.named_buffers():
            torch.testing.assert_close(b, expected[1][k], rtol=1e-13, atol=1e-13)
            assert torch.equal(b, buffers[k])  # the derivative leaves no trace
        if isinstance(module, Counting):
            assert module.calls == 3


@pytest.mark.parametrize("tasks", [None, (None, 0)])
@pytest.mark.parametrize(("derivative", "keep"), [*WAYS, ("first_order", "all")])
def test_a_tensor_that_only_the_aux_depends_on_is_named(
    derivative: str, keep: Any, tasks: Any
) -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda p, b: (((p - b) ** 2).sum(), {"shift": (p * weight).sum()}),
        torchopt.sgd(0.1),
        steps=2,
        derivative=derivative,
        keep=keep,
        tasks=tasks,
    )
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match=r"weight.*Pass it after the batch"):
        inner(start, torch.ones(3, 1, dtype=torch.float64) if tasks else torch.ones(2))


@pytest.mark.parametrize(("derivative", "keep"), [*WAYS, ("first_order", "all")])
def test_tensors_of_a_closure_are_constants_without_grad_mode(derivative: str, keep: Any) -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda p, b: (((p - b * weight) ** 2).sum(), {"shift": (p * weight).sum()}),
        torchopt.sgd(0.5),
        steps=2,
        derivative=derivative,
        keep=keep,
    )
    start, batch = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with torch.no_grad():
        result = inner(start.requires_grad_(), batch)
    assert torch.equal(result.params, batch)
    assert torch.equal(result.aux["shift"], torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert not result.aux["shift"].requires_grad


@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_a_tensor_of_a_closure_that_requires_a_gradient_is_named(
    derivative: str, keep: Any
) -> None:
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(
        lambda p, b: ((p - b) ** 2 * weight).sum(),
        torchopt.sgd(0.1),
        steps=2,
        derivative=derivative,
        keep=keep,
    )
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match=r"weight.*Pass it after the batch"):
        inner(start, torch.ones(2, dtype=torch.float64))


def test_a_module_that_the_loss_calls_with_its_own_parameters_is_named() -> None:
    net = nn.Linear(2, 1)
    inner = torchopt.inner_loop(
        lambda p, b: (net(b) * p).sum(), torchopt.sgd(0.1), steps=1, keep="steps"
    )
    with pytest.raises(NotDifferentiableError, match=r"net.weight, net.bias"):
        inner(torch.ones(1, requires_grad=True), torch.ones(1, 2))


def test_an_exception_in_a_recomputation_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = normalised().double()

    def loss(p: Any, batch: Tensor) -> Tensor:
        if "TORCHOPT_TEST_INTERRUPT" in os.environ:  # which no recomputation restores
            raise KeyboardInterrupt
        out: Tensor = torchopt.params.functional_call(module, p, batch).pow(2).mean()
        return out

    params = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=4, keep=2)
    result = inner(params, torch.randn(6, 3, dtype=torch.float64))
    buffers = {k: b.clone() for k, b in module.named_buffers()}
    state = torch.get_rng_state()
    monkeypatch.setenv("TORCHOPT_TEST_INTERRUPT", "1")
    with pytest.raises(KeyboardInterrupt):
        outer(result.params, result.losses).backward()
    assert torch.equal(torch.get_rng_state(), state)
    for k, b in module.named_buffers():
        assert torch.equal(b, buffers[k])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_batch_may_hold_values_that_are_not_numbers(way: tuple[str, Any]) -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(p: Tensor, batch: dict[str, Any], weight: Tensor) -> Tensor:
        assert batch["name"] == "digits"
        assert batch["nothing"] is None
        fit = nn.functional.cross_entropy(p[batch["index"]], batch["labels"])
        return fit + weight * p.square().sum()

    batch = {
        "index": torch.tensor([0, 1, 0, 1]),
        "labels": torch.tensor([0, 1, 2, 1]),
        "name": "digits",
        "nothing": None,
    }
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)

    def gradient(derivative: str, keep: Any) -> Tensor:
        inner = torchopt.inner_loop(
            loss, torchopt.sgd(0.8), steps=4, derivative=derivative, keep=keep
        )
        return torch.autograd.grad(inner(start, batch, weight).params[0, 0], weight)[0]

    p = start.clone()
    for _ in range(4):
        q = p.requires_grad_() if p.is_leaf else p
        p = q - 0.8 * torch.autograd.grad(loss(q, batch, weight), q, create_graph=True)[0]
    (expected,) = torch.autograd.grad(p[0, 0], weight)
    torch.testing.assert_close(gradient(*way), expected, rtol=1e-12, atol=1e-14)
