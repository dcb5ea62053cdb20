# SPDX-License-Identifier: Apache-2.0
"""The example force_matching: smoke run, and the same gradient by one program."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import torchopt


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("force_matching")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    eager, traced = results["eager"], results["second_order.compile"]
    assert traced["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert eager["losses"][-1] < eager["losses"][0]


def test_forces_are_traced_exactly(example: ModuleType) -> None:
    potential = example.Potential(8).double()
    positions = torch.randn(3, 4, 3, dtype=torch.float64)
    wanted = example.forces(example.morse, positions).detach()
    assert wanted.sum(1).abs().max() < 1e-12  # no net force
    fast = torchopt.second_order.compile(example.force_loss, execute="trace")
    found = [
        torch.autograd.grad(loss(potential, positions, wanted), list(potential.parameters())[:-1])
        for loss in (fast, example.force_loss)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
