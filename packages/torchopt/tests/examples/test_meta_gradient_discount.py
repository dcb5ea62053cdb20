# SPDX-License-Identifier: Apache-2.0
"""The discount example: smoke run, returns, and the meta-gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("meta_gradient_discount")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert len(results["discounts"]) == example.NUM_STATES


def test_returns_are_discounted_by_the_state_that_is_entered(example: ModuleType) -> None:
    torch.manual_seed(0)
    rewards, gamma = torch.randn(3, 10), torch.rand(10)
    found = example.returns(rewards, gamma)
    for t in range(10):
        expected, weight = torch.zeros(3), 1.0
        for k in range(t, 10):
            expected = expected + weight * rewards[:, k]
            weight = weight * (gamma[k + 1].item() if k + 1 < 10 else 0.0)
        torch.testing.assert_close(found[:, t], expected)


def test_meta_gradient_equals_a_finite_difference(example: ModuleType) -> None:
    torch.manual_seed(0)
    logits, values, direction = torch.randn(3, 10)
    batch, judge = torch.randn(2, 4, 10)
    logits = logits.requires_grad_()
    loss, _ = example.meta_loss(logits, values, batch, judge, 0.5)
    slope = (torch.autograd.grad(loss, logits)[0] * direction).sum().item()
    h = 1e-2
    ends = [
        example.meta_loss(logits.detach() + s * direction, values, batch, judge, 0.5)[0].item()
        for s in (h, -h)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-3)
