# SPDX-License-Identifier: Apache-2.0
"""This torchopt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

import torchopt
from benchmarks.torchopt.implicit.rivals.torch_counters import (
    count_products,
    inner_problem,
    logistic_loss,
    measure,
    tensors,
)
from torchopt.diff.implicit import custom_fixed_point, custom_root
from torchopt.linear_solve import CG, GMRES, Cholesky, NormalCG
from torchopt.solvers import Anderson

DISTRIBUTIONS = ("torchopt", "optree", "torch")
library: Any = torchopt


def logistic(problem: Any) -> Any:
    """Differentiate the given minimum by conjugate gradients."""
    data = tensors(problem)

    @custom_root(grad(logistic_loss), argnums=1, solve=CG(1e-8), positive_definite=True)
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

    @custom_fixed_point(layer, argnums=1, solve=NormalCG(1e-8))
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


def anderson(problem: Any) -> Any:
    """Solve by Anderson's mixing and differentiate by GMRES."""
    data = tensors(problem)
    solver = Anderson(tol=1e-9, maxiter=1000, linear_solve=GMRES(1e-8))

    def layer(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ data["W"].T + x)

    def run() -> Any:
        x = data["x"].clone().requires_grad_()
        z = solver(layer, torch.zeros_like(x), x)
        return torch.autograd.grad(z, x, data["v"])[0].numpy()

    return run


def ridge_residual(w: Tensor, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Return the optimality of one ridge regression."""
    return X.T @ (X @ w - y) / 20 + theta.exp() * w


@custom_root(ridge_residual, argnums=1, solve=Cholesky(), positive_definite=True)
def ridge(w: Tensor, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Solve one ridge regression."""
    A = X.T @ X / 20 + theta.exp() * torch.eye(5, dtype=X.dtype)
    return torch.linalg.solve(A, X.T @ y / 20)


def small_ridge(problem: Any) -> Any:
    """Solve and differentiate all at once, by vmap."""
    data = tensors(problem)
    start = torch.zeros(5, dtype=torch.float64)

    def one(theta: Tensor, X: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return ridge(start, theta, X, y) @ v

    def run() -> Any:
        return vmap(grad(one))(data["theta"], data["X"], data["y"], data["v"]).numpy()

    return run


def memory(mode: str, steps: int) -> dict[str, Any]:
    """Return bytes and seconds of a meta-gradient through `steps` steps of gradient descent."""
    loss, start, theta = inner_problem()

    def descend(w: Tensor, theta: Tensor) -> Tensor:
        for _ in range(steps):
            w = w - 0.05 * grad(loss)(w, theta)
        return w

    if mode == "implicit":
        solver = CG(0.0, maxiter=20, on_fail="ignore")
        descend = custom_root(grad(loss), argnums=1, solve=solver, symmetric=True)(descend)

    def meta_gradient() -> Tensor:
        variable = theta.clone().requires_grad_()
        return torch.autograd.grad(descend(start, variable).pow(2).sum(), variable)[0]

    return measure(meta_gradient)


def products(steps: int) -> dict[str, Any]:
    """Return the counts of a backward pass."""

    def root(F: Any, argnums: int, solve: Any) -> Any:
        return custom_root(F, argnums, solve=solve, symmetric=True)

    return count_products(root, CG(0.0, maxiter=steps, on_fail="ignore"))
