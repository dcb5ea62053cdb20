# SPDX-License-Identifier: Apache-2.0
"""The distillation example: smoke run, and the gradient of the pixels."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("dataset_distillation")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert 0 < results["methods"]["random real images"]["accuracy"][0] < 1


def test_gradient_of_the_pixels_equals_a_finite_difference(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {k: v.double() for k, v in example.fresh_params(6, generator).items()}
    real = torch.randn(20, 64, generator=generator).double()
    labels = torch.randint(10, (20,), generator=generator)
    rates = torch.tensor([-1.0, -1.5], dtype=torch.float64)
    pixels, direction = torch.randn(2, 10, 64, generator=generator).double()

    def loss(pixels: torch.Tensor) -> torch.Tensor:
        return example.loss(example.train(start, pixels, rates), real, labels)

    slope = (torch.func.grad(loss)(pixels) * direction).sum().item()
    h = 1e-5
    ends = [loss(pixels + s * direction).item() for s in (h, -h)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
