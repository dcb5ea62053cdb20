# SPDX-License-Identifier: Apache-2.0
"""The ensemble example: smoke run, and vmap against loops."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("vmap_ensembles")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert results["maml"]["gap"] < 1e-3
    assert 0.3 < results["ensemble"]["accuracy"] <= 1


def test_a_member_learns_what_it_learns_alone(example: ModuleType) -> None:
    from dataclasses import replace

    import torchopt

    config = replace(example.PRESETS["smoke"], steps=5, members=3)
    generator = torch.Generator().manual_seed(0)
    x, y = example.spirals(config, generator)
    samples = torch.randint(len(y), (3, len(y)), generator=generator)
    together = example.train_ensemble(config, x, y, samples)
    optimizer = torchopt.adam(config.lr)
    step = example.train_member(optimizer)
    begin = torch.Generator().manual_seed(config.seed + 1)
    for member in range(3):
        params = example.fresh_params((2, config.width, config.width, 2), begin)
        state = optimizer.init(params)
        for _ in range(5):
            params, state = step(params, state, x[samples[member]], y[samples[member]])
        for name, value in params.items():
            torch.testing.assert_close(together[name][member], value, rtol=1e-3, atol=1e-5)
