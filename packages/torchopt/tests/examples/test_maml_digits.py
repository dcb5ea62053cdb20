# SPDX-License-Identifier: Apache-2.0
"""The digits example runs, writes its results, and its meta-gradient is that of its meta-loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("maml_digits")


def test_smoke_run_writes_results(example: ModuleType, tmp_path: Path) -> None:
    assert example.main(["--smoke", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "maml_digits.json").read_text())
    assert set(results["methods"]) == {"MAML", "first-order MAML"}
    assert set(results["step_times"]) == {"eager", "trace"}
    assert (tmp_path / "maml_digits.png").stat().st_size > 1000


def test_splits_share_no_image_and_no_code(example: ModuleType) -> None:
    train, test = example.TaskSampler("train", 0), example.TaskSampler("test", 0)
    for own, other in zip(train.images, test.images):
        assert not (own[:, None] == other[None]).all(-1).any()
    assert not any(example.is_odd(train.code().tolist()) for _ in range(20))
    assert all(example.is_odd(test.code().tolist()) for _ in range(20))


def test_meta_gradient_equals_a_finite_difference(example: ModuleType) -> None:
    config = example.PRESETS["smoke"]
    trainer = example.MetaTrainer(example.Learner(config.width), config, first_order=False)
    trainer.learner.net.double()
    trainer.params = {k: v.detach().double().requires_grad_() for k, v in trainer.params.items()}
    drawn = example.TaskSampler("train", 1).draw(3, 2)
    tasks = example.Tasks(
        drawn.support.double(), drawn.support_labels, drawn.query.double(), drawn.query_labels
    )
    trainer.meta_loss(tasks).backward()
    weight = trainer.params["4.weight"]
    direction = torch.randn(weight.shape, dtype=torch.float64)
    slope = (weight.grad * direction).sum().item()
    values = []
    for h in (1e-5, -1e-5):
        trainer.params["4.weight"] = weight.detach() + h * direction
        values.append(trainer.meta_loss(tasks).item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
