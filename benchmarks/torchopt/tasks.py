# SPDX-License-Identifier: Apache-2.0
"""Whole tasks of meta-learning on networks of few small tensors, the same for every rival.

A task takes a snapshot, makes the optimizer, takes 5 steps on 10 examples, differentiates the loss
after them with respect to the initial parameters, and restores the network. All of it is timed.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from benchmarks.torchopt import problems

STEPS, WIDTH = 5, 32
NETWORKS = {"6 tensors": 3, "20 tensors": 10, "60 tensors": 30}
"""From the name of a network to its linear layers, each of which has a weight and a bias."""

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd task": ("SGD", {"lr": 0.1}),
    "momentum task": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam task": ("Adam", {"lr": problems.LR}),
}
"""From the name of a case to the class of torch.optim and its settings."""


def make_network(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a seeded network from one number to one, and its loss on 10 examples."""
    torch.manual_seed(0)
    count = NETWORKS[name]
    widths = [1, *[WIDTH] * (count - 1), 1]
    layers: list[nn.Module] = []
    for into, out in zip(widths, widths[1:]):
        layers += [nn.Linear(into, out), nn.Tanh()]
    x, y = torch.randn(10, 1), torch.randn(10, 1)

    def loss(module: nn.Module) -> Tensor:
        return nn.functional.mse_loss(module(x), y)

    return nn.Sequential(*layers[:-1]), loss


def expected(operation: str, network: str) -> list[Tensor]:
    """Return the gradient by the plain formulas, one tensor after the other."""
    module, loss = make_network(network)
    _, settings = OPTIMIZERS[operation]
    names = [name for name, _ in module.named_parameters()]
    start = params = list(module.parameters())
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]

    def loss_at(tensors: list[Tensor]) -> Tensor:
        def run(*args: Any) -> Any:
            return torch.func.functional_call(module, dict(zip(names, tensors)), args)

        return loss(run)  # type: ignore[arg-type]

    for step in range(1, STEPS + 1):
        grads = list(torch.autograd.grad(loss_at(params), params, create_graph=True))
        if operation == "adam task":
            params, first, second = problems.plain_adam(params, grads, first, second, step)
        else:
            momentum = settings.get("momentum", 0.0)
            first = [m * momentum + g for m, g in zip(first, grads)]
            params = [p - settings["lr"] * m for p, m in zip(params, first)]
    return list(torch.autograd.grad(loss_at(params), start))
