# SPDX-License-Identifier: Apache-2.0
"""The reweighting example: smoke run, and its weights in closed form."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], ModuleType]) -> ModuleType:
    return load_example("learning_to_reweight")


def test_smoke_run_writes_results(
    example: ModuleType, smoke: Callable[[ModuleType], dict[str, Any]]
) -> None:
    results = smoke(example)
    assert set(results["proportions"]["0.98"]) == set(example.METHODS)


def test_weights_are_the_alignment_of_gradients(example: ModuleType) -> None:
    """At e = 0 the derivative of the clean loss is -lr <grad of clean loss, grad of l_i>."""
    torch.manual_seed(0)
    net = example.Network(8).double()
    before = [p.detach().clone() for p in net.parameters()]
    images, labels = torch.randn(12, 64, dtype=torch.float64), torch.arange(12) % 2
    clean = (torch.randn(4, 64, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    weights = example.example_weights(net, images, labels, clean, 0.3)

    def flat_gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    towards = flat_gradient(example.example_losses(net, *clean).mean())
    aligned = torch.stack(
        [
            flat_gradient(example.example_losses(net, images[i : i + 1], labels[i : i + 1]).sum())
            @ towards
            for i in range(12)
        ]
    ).clamp(min=0)
    assert 0 < (aligned > 0).sum() < 12
    torch.testing.assert_close(weights, aligned / aligned.sum())
    for p, old in zip(net.parameters(), before):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)


def test_sets_are_disjoint_and_of_the_asked_proportion(example: ModuleType) -> None:
    config = example.PRESETS["smoke"]
    split = example.draw(0.98, config, torch.Generator().manual_seed(0))
    assert split.labels.float().mean().item() == pytest.approx(0.02)
    assert split.clean_labels.tolist() == [0] * 5 + [1] * 5
    assert split.test_labels.float().mean().item() == 0.5
