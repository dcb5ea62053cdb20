# SPDX-License-Identifier: Apache-2.0
"""The sinusoid example: smoke run, and its meta-gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("maml_sinusoid")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert set(results["methods"]) == set(example.METHODS)
    assert len(results["methods"]["MAML"]["errors"]) == results["config"]["test_steps"] + 1


def learner_of(example: ModuleType, method: str) -> Any:
    learner = example.Learner.fresh(method, example.PRESETS["smoke"])
    learner.params = {
        name: p.detach().double().requires_grad_() for name, p in learner.params.items()
    }
    if isinstance(learner.step_size, dict):
        learner.step_size = {
            name: x.detach().double().requires_grad_() for name, x in learner.step_size.items()
        }
    return learner


@pytest.mark.parametrize("method", ["MAML", "Meta-SGD"])
def test_meta_gradient_equals_a_finite_difference(example: ModuleType, method: str) -> None:
    learner = learner_of(example, method)
    x, y = (t.double() for t in example.draw(3, 20, torch.Generator().manual_seed(0)))
    grads = torch.autograd.grad(learner.meta_loss(x, y, 10), learner.tensors())
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in learner.tensors()]
    slope = sum((g * d).sum() for g, d in zip(grads, directions)).item()
    values = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for p, d in zip(learner.tensors(), directions):
                p.add_(h * d)
            values.append(learner.meta_loss(x, y, 10).item())
            for p, d in zip(learner.tensors(), directions):
                p.sub_(h * d)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_first_order_gradient_is_that_of_the_adapted_parameters(example: ModuleType) -> None:
    learner = learner_of(example, "first-order MAML")
    x, y = (t.double() for t in example.draw(1, 20, torch.Generator().manual_seed(0)))
    found = torch.autograd.grad(learner.meta_loss(x, y, 10), learner.tensors())
    path = example.adapt(learner.params, x[0, :10], y[0, :10], learner.step_size, 1, True)
    adapted = {name: p.detach().requires_grad_() for name, p in path[-1].items()}
    expected = torch.autograd.grad(
        example.loss(adapted, x[0, 10:], y[0, 10:]), list(adapted.values())
    )
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, e)
