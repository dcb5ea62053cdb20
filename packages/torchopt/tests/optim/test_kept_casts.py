# SPDX-License-Identifier: Apache-2.0
"""Autocast keeps the casts of weights until its outermost region ends: none is used too late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.zero_order import seed_replay
from torchopt.distributed.contents import Contents

X = torch.linspace(-1.0, 1.0, 32).reshape(8, 4)


def region() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def made() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(net: Callable[[Tensor], Tensor]) -> Tensor:
    return (net(X).float() - 1.0).square().mean()


def in_groups(net: nn.Sequential) -> torchopt.Optimizer:
    optimizer = torchopt.SGD(net[0].parameters(), lr=0.5)
    optimizer.add_param_group(net[2].parameters())
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Sequential], Any]] = {
    "SGD": lambda net: torchopt.SGD(net.parameters(), lr=0.5, momentum=0.9),
    "Adam": lambda net: torchopt.Adam(net.parameters(), lr=0.1),
    "two groups": in_groups,
    "a chain": lambda net: torchopt.Optimizer(
        net.parameters(), torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(0.5))
    ),
    "functions": lambda net: torchopt.FuncOptimizer(torchopt.adam(0.1)),
    "torch.optim": lambda net: torchopt.optim.TorchOptimizer(
        net.parameters(), torchopt.adam, lr=0.1
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_inside_a_region_is_seen_by_the_next_forward_pass(name: str) -> None:
    def trained(*, around: bool) -> list[Tensor]:
        net = made()
        optimizer = OPTIMIZERS[name](net)
        with region() if around else contextlib.nullcontext():
            for _ in range(4):
                with region():
                    loss = loss_of(net)
                params = tuple(net.parameters())
                if isinstance(optimizer, torchopt.FuncOptimizer):
                    optimizer.step(loss, params, inplace=True)
                    continue
                for p, g in zip(params, torch.autograd.grad(loss, params)):
                    p.grad = g
                optimizer.step()
        return list(net.parameters())

    for got, expected in zip(trained(around=True), trained(around=False), strict=True):
        assert torch.equal(got, expected)


def test_updates_inside_a_region_are_seen() -> None:
    def outputs(*, around: bool) -> list[Tensor]:
        net, found = made(), []
        with region() if around else contextlib.nullcontext():
            for _ in range(2):
                with region():
                    found.append(net(X))
                params = tuple(net.parameters())
                torchopt.apply_updates(params, tuple(-p for p in params), inplace=True)
        return found

    for got, expected in zip(outputs(around=True), outputs(around=False), strict=True):
        assert torch.equal(got, expected)


def test_seed_replay_inside_a_region_sees_its_perturbations() -> None:
    def estimated(*, around: bool) -> list[Tensor]:
        net = made()
        params = list(net.parameters())

        def closure() -> Tensor:
            with region():
                return loss_of(net)

        with region() if around else contextlib.nullcontext():
            found = []
            for seed in range(2):
                estimate = seed_replay.estimate(
                    closure, params, num_samples=4, sigma=0.5, seed=seed
                )
                estimate.add_to_(params, -0.1)
                found.append(estimate.coefficients)
            with region():
                return [*found, *torch.autograd.grad(loss_of(net), params)]

    got, expected = estimated(around=True), estimated(around=False)
    assert (expected[0] != 0).any()
    assert all(map(torch.equal, got, expected))


def test_an_implicit_module_solves_in_a_region() -> None:
    class Ridge(torchopt.nn.ImplicitMetaGradientModule, tol=1e9):
        def __init__(self, penalty: Tensor) -> None:
            super().__init__()
            self.penalty, self.weight = penalty, nn.Parameter(torch.zeros(1, 4))

        def objective(self, x: Tensor) -> Tensor:
            with region():
                fit = loss_of(lambda x: nn.functional.linear(x, self.weight))
            return fit + self.penalty * self.weight.square().sum()

        @torch.enable_grad()
        def solve(self, x: Tensor) -> Ridge:
            optimizer = torchopt.SGD(self.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                self.objective(x).backward()
                optimizer.step()
            return self

    def solved(*, around: bool) -> list[Tensor]:
        module, found = Ridge(torch.ones((), requires_grad=True)), []
        with region() if around else contextlib.nullcontext():
            for _ in range(3):
                module.solve(X)
                found.append(module.objective(X).detach())
        return found

    assert solved(around=True) == solved(around=False)


@pytest.mark.parametrize("keep", [1, "reversible"])
def test_an_inner_loop_keeps_no_casts_of_earlier_steps(keep: Any) -> None:
    def peak(steps: int) -> tuple[int, int]:
        params, scale = torch.eye(32), torch.ones((), requires_grad=True)
        inner = torchopt.inner_loop(
            lambda p, batch, scale: ((batch @ p) * scale).float().square().mean(),
            torchopt.sgd(0.1, momentum=0.5),
            steps=steps,
            keep=keep,
        )
        batch = torch.ones(1, 32)
        with region(), CountBytes() as count:
            result = inner(params, batch, scale)
            torch.autograd.grad(result.params.sum(), scale)
            del result
            return count.peak, count.now

    (few, left), (many, _) = peak(2), peak(16)
    cast = 32 * 32 * 2
    assert many - few < (16 - 2) * cast / 2  # a reversible run keeps some bits of each step
    assert left < cast


def test_a_parameter_that_is_put_back_is_cast_again() -> None:
    net = made()
    with region():
        expected = net(X)
        contents = Contents()
        contents.keep([*net.parameters()], [net], only_shards=False)
        torch.nn.init.zeros_(net[0].weight)
        torch.clear_autocast_cache()
        assert not torch.equal(net(X), expected)
        contents.put_back()
        assert torch.equal(net(X), expected)
