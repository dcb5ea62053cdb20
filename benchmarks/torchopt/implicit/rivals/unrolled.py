# SPDX-License-Identifier: Apache-2.0
"""Plain autograd through the steps of a solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.torchopt.implicit.rivals.ours import DISTRIBUTIONS, library
from benchmarks.torchopt.implicit.rivals.torch_counters import logistic_loss, tensors

__all__ = ["DISTRIBUTIONS", "equilibrium", "library", "logistic"]


def logistic(problem: Any) -> Any:
    """Differentiate through 200 steps of gradient descent, from the minimum."""
    data = tensors(problem)

    def run() -> Any:
        theta = data["theta"].clone().requires_grad_()
        w = data["w"].clone().requires_grad_()
        for _ in range(200):
            loss = logistic_loss(w, theta, data["X"], data["y"])
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.6 * g
        return torch.autograd.grad(w, theta, data["v"])[0].numpy()

    return run


def equilibrium(problem: Any) -> Any:
    """Differentiate through 200 plain iterations."""
    data = tensors(problem)

    def run() -> Any:
        x = data["x"].clone().requires_grad_()
        z: Tensor = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(z @ data["W"].T + x)
        return torch.autograd.grad(z, x, data["v"])[0].numpy()

    return run
