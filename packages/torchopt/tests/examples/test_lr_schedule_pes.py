# SPDX-License-Identifier: Apache-2.0
"""The learned schedule beats the ones it is compared with, and its inner loop is plain SGD."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("lr_schedule_pes")


def test_smoke_run_learns(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    found = {name: one["mean_loss"] for name, one in results["schedules"].items()}
    assert set(found) == {"PES", "truncated ES", "best constant", "start"}
    assert found["PES"] < min(found["truncated ES"], 0.7 * found["start"])
    assert len(results["history"]["PES"]) == 61


def test_the_schedule_is_a_polygon_of_logarithms(example: ModuleType) -> None:
    knots = torch.tensor([0.0, -2.0, -2.0, 1.0])
    got = torch.stack([example.rate(knots, t, 13) for t in range(13)]).log()
    expected = torch.tensor([0, -0.5, -1, -1.5, -2, -2, -2, -2, -2, -1.25, -0.5, 0.25, 1.0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_inner_step_is_gradient_descent_on_a_batch(example: ModuleType) -> None:
    config, digits = example.PRESETS["smoke"], example.load()
    loop = example.training(config, digits)
    knots = torch.full((config.knots,), -1.0)
    torch.manual_seed(0)
    net = {k: w.requires_grad_() for k, w in loop.start(knots).items()}
    torch.manual_seed(1)
    moved, loss = loop.step(knots, net, 3)
    torch.manual_seed(1)
    batch = torch.randint(len(digits.labels), (config.batch,))
    direct = example.loss_of(net, digits.images[batch], digits.labels[batch])
    for (k, w), g in zip(net.items(), torch.autograd.grad(direct, list(net.values()))):
        torch.testing.assert_close(moved[k], w - torch.exp(torch.tensor(-1.0)) * g)
    held_out = torch.randint(len(digits.held_out_labels), (50,))
    images, labels = digits.held_out_images[held_out], digits.held_out_labels[held_out]
    torch.testing.assert_close(loss, example.loss_of(moved, images, labels))
