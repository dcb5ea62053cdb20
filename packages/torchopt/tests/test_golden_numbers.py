# SPDX-License-Identifier: Apache-2.0
"""Numbers of worked examples, computed by hand or printed in the tutorials."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.base import EmptyState, UninitializedState


class Square(nn.Module):
    """y = a x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x**2


def test_one_inner_step_and_a_second_task_after_recovery() -> None:
    net = Square()
    x = torch.tensor(2.0, requires_grad=True)
    optimizer = torchopt.MetaSGD(net, lr=1.0)
    assert optimizer.state_dict() == (UninitializedState(),)
    start = torchopt.extract_state_dict(net, by="reference", enable_visual=True)
    start_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
    optimizer.step(net(x))
    assert optimizer.state_dict() == ((EmptyState(),),)
    net(x).backward()
    assert x.grad is not None
    assert x.grad.item() == -28.0
    torchopt.recover_state_dict(net, start)
    torchopt.recover_state_dict(optimizer, start_optimizer)
    optimizer.step(net(x) / x)
    (net(x) / x).backward()
    # a' = 1 - x, y = (1 - x) x, dy/dx = 1 - 2x = -3.
    assert x.grad.item() == -31.0


def test_clipping_coefficient_is_a_constant_for_the_meta_gradient() -> None:
    net = Square()
    x = torch.tensor(2.0, requires_grad=True)
    impl = torchopt.chain(
        torchopt.clip_grad_norm(2.0), torchopt.sgd(1.0, moment_requires_grad=True)
    )
    optimizer = torchopt.MetaOptimizer(net, impl)
    optimizer.step(net(x))
    net(x).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(-12.0, abs=1e-4)


def test_meta_adam_reaches_the_same_point_after_recovery() -> None:
    net = Square()
    x = torch.tensor(2.0)
    optimizer = torchopt.MetaAdam(net, lr=1.0)
    start = torchopt.extract_state_dict(net, by="reference")
    start_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
    reached = []
    for _ in range(2):
        for _ in range(2):
            optimizer.step(net(x))
        reached.append(net.a.item())
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(optimizer, start_optimizer)
    assert reached[0] == pytest.approx(-1.0, abs=1e-6)
    assert reached[0] == reached[1]


def test_functional_step_has_the_meta_gradient_of_the_tutorial() -> None:
    params = {
        "w": torch.tensor(1.0, requires_grad=True),
        "b": torch.tensor(0.0, requires_grad=True),
    }
    meta = torch.tensor(1.0, requires_grad=True)
    x = y = torch.tensor(1.0)
    optimizer = torchopt.sgd(lr=1.0)
    loss = (params["w"] * x + params["b"] + meta - y) ** 2
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True)))
    updates, _ = optimizer.update(grads, optimizer.init(params), inplace=False)
    params = torchopt.apply_updates(params, updates, inplace=False)
    outer = (params["w"] * x + params["b"] - y) ** 2
    # w' = -1, b' = -2, outer = 16; d outer / d meta = 2 (-4) (-2 - 2) = 32.
    assert torch.autograd.grad(outer, meta)[0].item() == 32.0


def test_adam_step_of_one_lands_on_zero() -> None:
    w = torch.tensor(1.0, requires_grad=True)
    optimizer = torchopt.Adam([w], lr=1.0)
    ((w * 2.0 - 1.0) ** 2).backward()
    optimizer.step()
    assert abs(w.item()) <= 1.2e-7


def test_state_layout() -> None:
    params = {"w": torch.zeros(2, 2), "b": torch.zeros(3)}

    def names(optimizer: torchopt.base.GradientTransformation) -> list[str]:
        return [type(member).__name__ for member in optimizer.init(params)]

    adam, empty, count = "ScaleByAdamState", "EmptyState", "ScaleByScheduleState"
    assert names(torchopt.sgd(0.1)) == [empty]
    assert names(torchopt.sgd(0.1, 0.9)) == ["TraceState", empty]
    assert names(torchopt.adam()) == [adam, empty]
    assert names(torchopt.adam(weight_decay=0.1)) == [empty, adam, empty]
    assert names(torchopt.adam(maximize=True)) == [empty, adam, empty]
    assert names(torchopt.adam(lambda count: 0.1)) == [adam, count]
    assert names(torchopt.adamw()) == [adam, empty, empty]
    assert names(torchopt.adamw(mask={"w": True, "b": False})) == [adam, "MaskedState", empty]
    assert names(torchopt.rmsprop()) == ["ScaleByRmsState", empty]
    assert names(torchopt.rmsprop(centered=True, momentum=0.9)) == [
        "ScaleByRStdDevState",
        "TraceState",
        empty,
    ]
    assert names(torchopt.adagrad()) == ["ScaleByRssState", count, empty]
    assert names(torchopt.adadelta()) == ["ScaleByAdadeltaState", empty]
    assert names(torchopt.adamax()) == ["ScaleByAdamaxState", empty]
    assert names(torchopt.radam()) == ["ScaleByRAdamState", empty]
    state = torchopt.adam().init(params)[0]
    assert [tuple(x.shape) for x in state.mu] == [(3,), (2, 2)]
    assert [x.item() for x in state.count] == [0, 0]
    assert state.count[0].dtype == torch.int64
