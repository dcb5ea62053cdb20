# SPDX-License-Identifier: Apache-2.0
"""The cart-pole example learns from returns alone, and counts them rightly."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("gymnasium")
    return load_example("cartpole_es")


def test_smoke_run_learns(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    (run,) = smoke(example)["runs"]
    assert run["curve"][0][1] < 100  # nothing is known at the start
    assert run["curve"][-1][1] >= 150
    assert run["episodes"] % 32 == 0


def test_returns_are_those_of_single_episodes(example: ModuleType) -> None:
    import gymnasium

    worlds = example.Worlds(6, seed=3)
    starts = []

    def lean(observations: torch.Tensor) -> torch.Tensor:
        starts.append(observations.clone())
        return (observations[:, 2] > 0).long()

    returns = worlds.play(lean)
    single = gymnasium.make("CartPole-v1").unwrapped
    for start, total in zip(starts[0].double().numpy(), returns.tolist()):
        single.reset()
        single.state = tuple(start)
        steps, over, angle = 0, False, start[2]
        while not over and steps < 500:
            observation, _, over, _, _ = single.step(int(angle > 0))
            angle = observation[2]
            steps += 1
        assert abs(steps - total) <= 1  # float32 observations of the vectorised environment
    assert len(starts) == max(returns)
    assert len(set(returns.tolist())) > 1


def test_particles_lie_on_both_sides(example: ModuleType) -> None:
    params = example.fresh_params(3, torch.Generator().manual_seed(0))
    noise = {k: torch.randn(2, *p.shape) for k, p in params.items()}
    particles = example.population(params, noise, 0.5)
    for name, p in params.items():
        assert particles[name].shape == (4, *p.shape)
        torch.testing.assert_close((particles[name][1] + particles[name][3]) / 2, p)
        torch.testing.assert_close(particles[name][1] - particles[name][3], noise[name][1])
