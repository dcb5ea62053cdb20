# SPDX-License-Identifier: Apache-2.0
"""The example pinn_burgers: smoke run, and the same gradient by one program."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import torchopt


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("pinn_burgers")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    eager, traced = results["eager"], results["second_order.compile"]
    assert traced["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert eager["losses"][-1] < eager["losses"][0]


def test_the_residual_of_the_solution_is_zero(example: ModuleType) -> None:
    x, t = torch.rand(2, 9, dtype=torch.float64)
    found = example.residual(lambda p: example.front(*p.unbind(1)).unsqueeze(1), x, t)
    assert found.abs().max() < 1e-12


def test_the_loss_is_traced_exactly(example: ModuleType) -> None:
    net = example.fresh_net(example.PRESETS["smoke"]).double()
    points = torch.rand(2, 9, 2, dtype=torch.float64).unbind(0)
    fast = torchopt.second_order.compile(example.loss, execute="trace")
    found = [
        torch.autograd.grad(loss(net, *points), list(net.parameters()))
        for loss in (fast, example.loss)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
