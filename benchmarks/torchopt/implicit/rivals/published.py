# SPDX-License-Identifier: Apache-2.0
"""The published torchopt, through its public functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

import torchopt
from benchmarks.harness.case import UnsupportedError
from benchmarks.torchopt.implicit.rivals.torch_counters import (
    count_products,
    inner_problem,
    logistic_loss,
    measure,
    tensors,
)
from torchopt.diff.implicit import custom_root
from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

DISTRIBUTIONS = ("torchopt", "optree", "torch")
library: Any = torchopt


def logistic(problem: Any) -> Any:
    """Differentiate the given minimum by conjugate gradients."""
    data = tensors(problem)

    @custom_root(grad(logistic_loss), argnums=1, solve=solve_cg(rtol=1e-8))
    def solve(w: Tensor, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return w

    def run() -> Any:
        theta = data["theta"].clone().requires_grad_()
        w = solve(data["w"], theta, data["X"], data["y"])
        return torch.autograd.grad(w, theta, data["v"])[0].numpy()

    return run


def equilibrium(problem: Any) -> Any:
    """Solve by plain iteration and differentiate by normal conjugate gradients."""
    data = tensors(problem)

    def layer(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ data["W"].T + x)

    @custom_root(lambda z, x: layer(z, x) - z, argnums=1, solve=solve_normal_cg(rtol=1e-8))
    def solve(z: Tensor, x: Tensor) -> Tensor:
        for _ in range(1000):
            new = layer(z, x)
            if (new - z).norm() <= 1e-9:
                return new
            z = new
        return z

    def run() -> Any:
        x = data["x"].clone().requires_grad_()
        z = solve(torch.zeros_like(x), x)
        return torch.autograd.grad(z, x, data["v"])[0].numpy()

    return run


@custom_root(
    lambda w, theta, X, y: X.T @ (X @ w - y) / 20 + theta.exp() * w, argnums=1, solve=solve_inv()
)
def _ridge(w: Tensor, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    A = X.T @ X / 20 + theta.exp() * torch.eye(5, dtype=X.dtype)
    return torch.linalg.solve(A, X.T @ y / 20)


def small_ridge(problem: Any) -> Any:
    """Solve and differentiate in a Python loop: it does not run under vmap."""
    data = tensors(problem)
    start = torch.zeros(5, dtype=torch.float64)

    def run() -> Any:
        found = []
        for theta, X, y, v in zip(data["theta"], data["X"], data["y"], data["v"]):
            variable = theta.clone().requires_grad_()
            found.append(torch.autograd.grad(_ridge(start, variable, X, y), variable, v)[0].item())
        return np.array(found)

    return run


def memory(mode: str, steps: int) -> dict[str, Any]:
    """Return bytes and seconds of an implicit meta-gradient after `steps` steps."""
    if mode != "implicit":
        raise UnsupportedError("the same graph as ours")
    loss, start, theta = inner_problem()

    @custom_root(grad(loss), argnums=1, solve=solve_cg(rtol=0.0, maxiter=20))
    def descend(w: Tensor, theta: Tensor) -> Tensor:
        for _ in range(steps):
            w = w - 0.05 * grad(loss)(w, theta)
        return w

    def meta_gradient() -> Tensor:
        variable = theta.clone().requires_grad_()
        return torch.autograd.grad(descend(start, variable).pow(2).sum(), variable)[0]

    return measure(meta_gradient)


def products(steps: int) -> dict[str, Any]:
    """Return the counts of a backward pass."""
    return count_products(custom_root, solve_cg(rtol=0.0, maxiter=steps))
