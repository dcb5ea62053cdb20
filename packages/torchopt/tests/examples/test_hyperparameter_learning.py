# SPDX-License-Identifier: Apache-2.0
"""The hyper-parameter example: smoke run, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("hyperparameter_learning")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert set(results["penalties"]) == set(results["rates"]) == {"grid search", "learned"}


@pytest.fixture(scope="module")
def folds(example: ModuleType) -> tuple[torch.Tensor, ...]:
    x, y = example.load_table()
    return example.make_folds(x[:60], y[:60])


def test_fit_solves_its_equation(example: ModuleType, folds: tuple[torch.Tensor, ...]) -> None:
    x, y = folds[0][0], folds[1][0]
    log_penalty = torch.tensor([-3.0, 0.0, 1.0], dtype=torch.float64)
    w = example.fit(torch.zeros(66, dtype=torch.float64), log_penalty, x, y)
    residual = torch.func.grad(example.penalised)(w, log_penalty, x, y)
    assert residual.abs().max() < 1e-10


def test_hypergradient_equals_a_finite_difference(
    example: ModuleType, folds: tuple[torch.Tensor, ...]
) -> None:
    torch.manual_seed(0)
    log_penalty = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    direction = torch.randn(3, dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return example.fold_losses(value, folds).mean()

    slope = (torch.func.grad(loss)(log_penalty) * direction).sum().item()
    h = 1e-5
    ends = [loss(log_penalty + s * direction).item() for s in (h, -h)]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_one_penalty_for_all_is_three_equal_ones(
    example: ModuleType, folds: tuple[torch.Tensor, ...]
) -> None:
    one, three = torch.zeros(1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(example.fold_losses(one, folds), example.fold_losses(three, folds))
