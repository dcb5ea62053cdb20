# SPDX-License-Identifier: Apache-2.0
"""The loop of learn2learn's MAML, written out, because the package does not build for this torch.

As in learn2learn, the network is copied with clones of its parameters. A step computes the gradient
of all of them, adds -lr g to each, and puts the sums into the copy, sub-module by sub-module. Its
MAML has only plain SGD.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.case import UnsupportedError
from benchmarks.torchopt import tasks

DISTRIBUTIONS = ("torch",)
library: Any = torch


def _clone(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters are clones in the graph."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {
        key: None if p is None else p.clone()  # type: ignore[misc]
        for key, p in module._parameters.items()
    }
    clone._buffers = dict(module._buffers)
    clone._modules = {k: None if m is None else _clone(m) for k, m in module._modules.items()}
    return clone


def _put(module: nn.Module, updates: dict[Tensor, Tensor]) -> None:
    parameters: Any = module._parameters
    for key, p in parameters.items():
        if p is not None and p in updates:
            parameters[key] = p + updates[p]
    for below in module._modules.values():
        if below is not None:
            _put(below, updates)


def task(operation: str, network: str) -> Callable[[], list[Tensor]]:
    """Return a whole task of MAML."""
    module, loss = tasks.make_network(network)
    if operation != "sgd task":
        raise UnsupportedError("its MAML steps with plain SGD")
    _, settings = tasks.OPTIMIZERS[operation]
    lr, start = settings["lr"], list(module.parameters())

    def run() -> list[Tensor]:
        learner = _clone(module)
        for _ in range(tasks.STEPS):
            params = list(learner.parameters())
            grads = torch.autograd.grad(loss(learner), params, create_graph=True)
            _put(learner, {p: -lr * g for p, g in zip(params, grads)})
        return list(torch.autograd.grad(loss(learner), start))

    return run
