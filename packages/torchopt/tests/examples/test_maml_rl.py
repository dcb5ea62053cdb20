# SPDX-License-Identifier: Apache-2.0
"""The MAML-RL example: smoke run, exact rewards and the sampled gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("maml_rl")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert len(results["rewards"]["MAML"]) == results["config"]["inner_steps"] + 1


def test_the_optimal_policy_is_the_best_deterministic_one(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    worlds = example.Worlds.draw(4, generator)
    optimal = worlds.optimal(10)
    for _ in range(20):
        logits = 10 * torch.randn(4, 10, 5, generator=generator)
        assert (worlds.expected(logits, 10) <= optimal + 1e-4).all()
    # with one move the best is the largest mean reward of the first state
    torch.testing.assert_close(worlds.optimal(1), worlds.reward[:, 0].amax(-1))


def test_the_sampled_gradient_is_that_of_the_expected_reward(example: ModuleType) -> None:
    from dataclasses import replace

    generator = torch.Generator().manual_seed(0)
    config = replace(example.PRESETS["smoke"], walks=100_000, moves=4)
    worlds = example.Worlds.draw(2, generator)
    logits = torch.randn(2, 10, 5, generator=generator).requires_grad_()
    exact = torch.autograd.grad(worlds.expected(logits, config.moves).sum(), logits)[0]
    objective = example.sampled_objective(worlds, logits, config, generator).sum()
    found = torch.autograd.grad(objective, logits)[0]
    # 100,000 walks: the error is some 1 % of the norm.
    assert ((found - exact).norm() / exact.norm()).item() < 0.05
