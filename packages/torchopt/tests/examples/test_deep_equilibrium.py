# SPDX-License-Identifier: Apache-2.0
"""The equilibrium example: smoke run, its fixed point and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("deep_equilibrium")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    implicit, unrolled, _ = results["models"].values()
    assert implicit["saved_kib"] < 0.5 * unrolled["saved_kib"]
    assert results["gradient_gap"] < 1e-2


def test_anderson_finds_the_fixed_point_in_fewer_evaluations(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {k: v.double() for k, v in example.fresh_params(20, generator).items()}
    params["w"] = 6 * params["w"]
    params = example.contractive(params)
    assert torch.linalg.matrix_norm(params["w"], ord=2).item() == pytest.approx(0.95)
    x = torch.randn(5, 64, generator=generator).double()

    def f(z: torch.Tensor) -> torch.Tensor:
        return example.layer(z, params, x)

    z, used = example.anderson(f, torch.zeros(5, 20, dtype=torch.float64), 200, 1e-10)
    assert (f(z) - z).norm() < 1e-9 * z.norm()
    plain, steps = torch.zeros(5, 20, dtype=torch.float64), 0
    while (f(plain) - plain).norm() > 1e-10 * f(plain).norm():
        plain, steps = f(plain), steps + 1
    torch.testing.assert_close(z, plain, rtol=1e-8, atol=1e-8)
    assert used < steps
