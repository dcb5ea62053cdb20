# SPDX-License-Identifier: Apache-2.0
"""The evolution-strategies example learns from an error rate that has no gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("evolution_strategies")


def test_smoke_run_learns(example: ModuleType, tmp_path: Path) -> None:
    assert example.main(["--smoke", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "evolution_strategies.json").read_text())
    assert results["curve"][0][1] > 0.75  # nothing is known at the start
    assert results["test_error"] < 0.6
    assert results["evaluations"] == 40 * 2 * 30


def test_the_loss_has_no_gradient(example: ModuleType) -> None:
    params = example.fresh_params(4, torch.Generator().manual_seed(0))
    params = {k: v.requires_grad_() for k, v in params.items()}
    images, labels, *_ = example.load()
    assert not example.error_rate(params, images, labels).requires_grad
