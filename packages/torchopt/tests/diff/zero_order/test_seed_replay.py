# SPDX-License-Identifier: Apache-2.0
"""Gradients as seeds and numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchopt.diff.zero_order import Gaussian, ZeroOrder, seed_replay


def model() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return net, torch.randn(7, 4, dtype=torch.float64)


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "leave_one_out"])
def test_equals_the_engine_with_stored_noise(method: str) -> None:
    net, x = model()
    params = list(net.parameters())
    replayed = seed_replay.estimate(
        lambda: net(x).square().mean(), params, method=method, num_samples=5, sigma=0.1, seed=3
    )
    names = [name for name, _ in net.named_parameters()]

    def f(leaves: list[torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, leaves)), (x,)).square().mean()

    stored = ZeroOrder(Gaussian(), method, num_samples=5, sigma=0.1).estimate(f, params, seed=3)
    for got, expected in zip(replayed.materialize(params), stored.gradient):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    before = [p.detach().clone() for p in params]
    replayed.add_to_(params, -0.1)
    for p, b, g in zip(params, before, stored.gradient):
        torch.testing.assert_close(p.detach(), b - 0.1 * g)


def test_parameters_are_restored_bit_for_bit() -> None:
    net = nn.Linear(50, 50)
    with torch.no_grad():
        net.weight.mul_(torch.logspace(-20, 4, 50))
    before = [p.detach().clone() for p in net.parameters()]

    def bits_are_back() -> bool:
        return all(
            torch.equal(p.detach().view(torch.int32), b.view(torch.int32))
            for p, b in zip(net.parameters(), before)
        )

    moved = []

    def closure() -> torch.Tensor:
        moved.append(not bits_are_back())
        return net(torch.ones(50)).sum()

    seed_replay.estimate(closure, list(net.parameters()), num_samples=3, seed=0)
    assert moved == [True] * 6
    assert bits_are_back()

    def failing() -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        seed_replay.estimate(failing, list(net.parameters()), seed=0)
    assert bits_are_back()


def test_a_tensor_given_twice_is_reported() -> None:
    p = torch.ones(2)
    with pytest.raises(ValueError, match="got one of them twice"):
        seed_replay.estimate(lambda: p.sum(), [p, p])
