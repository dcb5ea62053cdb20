# SPDX-License-Identifier: Apache-2.0
"""The LOLA example: smoke run, exact values, and DiCE's derivatives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("lola_dilemma")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert set(results["exact"]) == set(results["sampled"]) == {"0", "1"}


def test_exact_values_equal_the_discounted_sum_over_moves(example: ModuleType) -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 5, dtype=torch.float64)
    p, q = torch.sigmoid(own), torch.sigmoid(other)
    chances = torch.tensor(
        [p[0] * q[0], p[0] * (1 - q[0]), (1 - p[0]) * q[0], (1 - p[0]) * (1 - q[0])]
    )
    seen_by_other = [0, 2, 1, 3]
    step = torch.stack(
        [
            torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)])
            for a, b in ((p[1 + i], q[1 + seen_by_other[i]]) for i in range(4))
        ]
    )
    rewards = torch.tensor([[-1.0, -1.0], [-3.0, 0.0], [0.0, -3.0], [-2.0, -2.0]]).double()
    total, weight = torch.zeros(2, dtype=torch.float64), 1.0
    for _ in range(1500):
        total += weight * chances @ rewards
        chances, weight = chances @ step, 0.96 * weight
    found = torch.stack(example.values(own, other, 0.96))
    torch.testing.assert_close(found, 0.04 * total, rtol=1e-9, atol=1e-9)
    mirrored = torch.stack(example.values(other, own, 0.96))
    torch.testing.assert_close(mirrored, found.flip(0))


def test_tit_for_tat_cooperates_and_defectors_do_not(example: ModuleType) -> None:
    always = 50 * torch.ones(5)
    tit_for_tat = 50 * torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    assert [v.item() for v in example.values(tit_for_tat, tit_for_tat, 0.9)] == pytest.approx(
        [-1, -1], abs=1e-5
    )
    assert [v.item() for v in example.values(-always, -always, 0.9)] == pytest.approx([-2, -2])
    assert [v.item() for v in example.values(always, -always, 0.9)] == pytest.approx(
        [-3, 0], abs=1e-5
    )


def test_dice_has_the_value_of_the_games_and_the_score_function_as_gradient(
    example: ModuleType,
) -> None:
    generator = torch.Generator().manual_seed(0)
    moves, games, gamma = 6, 40, 0.9
    logits = torch.randn(moves, games, dtype=torch.float64, generator=generator).requires_grad_()
    other = torch.randn(moves, games, dtype=torch.float64, generator=generator)
    rewards = torch.randn(moves, games, dtype=torch.float64, generator=generator)
    objective = example.dice_objective(logits, other, rewards, gamma)
    discounted = gamma ** torch.arange(moves, dtype=torch.float64).unsqueeze(1) * rewards
    torch.testing.assert_close(objective, -discounted.sum(0).mean())
    to_come = discounted.flip(0).cumsum(0).flip(0)
    expected = -(to_come - to_come.mean(1, keepdim=True)) / games
    torch.testing.assert_close(torch.autograd.grad(objective, logits)[0], expected)


def test_look_ahead_gradient_equals_a_finite_difference(example: ModuleType) -> None:
    config = example.PRESETS["smoke"]
    torch.manual_seed(1)
    own, other, direction = torch.randn(3, 5, dtype=torch.float64)

    def value(own: torch.Tensor) -> float:
        y = other.clone().requires_grad_()
        slope = torch.autograd.grad(example.values(y, own, config.gamma)[0], y)[0]
        imagined = other + config.exact_lr_in * slope
        return example.values(own, imagined, config.gamma)[0].item()

    found = example.exact_gradient(own, other, 1, config) @ direction
    h = 1e-6
    expected = (value(own + h * direction) - value(own - h * direction)) / (2 * h)
    assert found.item() == pytest.approx(expected, rel=1e-5)
