# SPDX-License-Identifier: Apache-2.0
"""The example of three levels: smoke run, and its gradient against differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("three_levels")


def test_smoke_run_writes_one_table(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert list(results["methods"]) == ["untuned", "random search", "tuned"]
    for row in results["methods"].values():
        assert 0 < row["test"][0] < 20
        assert len(row["alpha"]) == 6


@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
def test_the_gradient_of_the_top_level_is_its_slope(example: ModuleType, derivative: str) -> None:
    config = replace(example.PRESETS["smoke"], tasks=2, shots=3)
    start = {name: p.double() for name, p in example.fresh(0).items()}
    generator = torch.Generator().manual_seed(0)
    waves, validation = (
        tuple(x.double() for x in example.draw(shape, 6, generator)) for shape in ((3, 2), (4,))
    )
    levels = example.Levels(config, derivative)

    def objective(log_alpha: torch.Tensor, log_beta: torch.Tensor) -> torch.Tensor:
        hypers = (log_alpha, log_beta)
        value: torch.Tensor = levels.meta_loss(
            levels.trained(start, waves, hypers), validation, log_alpha
        )
        return value

    at = [torch.full((6,), -3.0).double().requires_grad_(), torch.tensor(-3.0).double()]
    at[1].requires_grad_()
    found = torch.cat([g.flatten() for g in torch.autograd.grad(objective(*at), at)])
    direction = torch.linspace(-1, 1, 7).double()
    h = 1e-4
    with torch.no_grad():
        ends = [
            objective(at[0] + s * h * direction[:6], at[1] + s * h * direction[6]) for s in (1, -1)
        ]
    slope = (ends[0] - ends[1]) / (2 * h)
    assert abs(slope) > 1e-3
    torch.testing.assert_close(found @ direction, slope, rtol=1e-6, atol=1e-9)
