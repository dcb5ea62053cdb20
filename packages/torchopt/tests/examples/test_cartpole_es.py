# SPDX-License-Identifier: Apache-2.0
"""The cart-pole example learns from returns alone, and counts them rightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    path = Path(__file__).parents[2] / "examples" / "cartpole_es.py"
    spec = importlib.util.spec_from_file_location("cartpole_es", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cartpole_es"] = module
    spec.loader.exec_module(module)
    return module


def test_smoke_run_learns(example: ModuleType, tmp_path: Path) -> None:
    assert example.main(["--smoke", "--out", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "cartpole_es.json").read_text())["runs"]
    assert run["curve"][0][1] < 100  # nothing is known at the start
    assert run["curve"][-1][1] >= 150
    assert run["episodes"] % 32 == 0
    assert (tmp_path / "cartpole_es.png").stat().st_size > 1000


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
