# SPDX-License-Identifier: Apache-2.0
"""The learned optimizer example: smoke run, and its tasks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import torchopt


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("learned_optimizer")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    rows = smoke(example)["rows"]
    assert len(rows) == 5
    adam = next(iter(rows.values()))
    assert adam["margin"] == 0.0
    assert adam["curve"][-1] < adam["curve"][0]
    for row in rows.values():
        assert row["margin"] == pytest.approx(adam["mean_loss"] - row["mean_loss"], abs=1e-5)
        assert row["margin"] == pytest.approx(sum(row["margins"]) / 2, abs=1e-5)
        assert row is adam or row["margins"][0] != row["margins"][1]
    assert len({row["mean_loss"] for row in rows.values()}) == 5


def test_all_optimizers_are_judged_on_the_same_tasks(example: ModuleType) -> None:
    config = example.PRESETS["smoke"]
    images, labels = example.load_digits()
    torch.manual_seed(0)
    tasks = example.task_batch(config, example.Digits(images[1200:], labels[1200:]), 3)
    curves = [example.judge(torchopt.sgd(lr), tasks, config) for lr in (0.1, 0.5)]
    assert curves[0].shape == (3, config.horizon)
    torch.testing.assert_close(curves[0][:, 0], curves[1][:, 0])
    assert (curves[0][:, -1] != curves[1][:, -1]).all()
