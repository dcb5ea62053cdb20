# SPDX-License-Identifier: Apache-2.0
"""Code that rivals on torch share: counters of bytes and products, and problems."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.torchopt.dispatched import Dispatched


def tensors(problem: Any) -> dict[str, Tensor]:
    """Return the arrays of a problem as tensors."""
    return {name: torch.from_numpy(x) for name, x in problem.items()}


def logistic_loss(w: Tensor, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Return the objective of the logistic problem."""
    fit = binary_cross_entropy_with_logits(X @ w, y, reduction="sum")
    return fit + 0.5 * (theta.exp() * w * w).sum()


def inner_problem() -> tuple[Any, Tensor, Tensor]:
    """Return (loss(w, theta), start, theta): a network of 64 x 32 x 1 on 128 rows, float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    X, y = randn(128, 64), randn(128)

    def loss(w: Tensor, theta: Tensor) -> Tensor:
        first, second = w[: 64 * 32].view(64, 32), w[64 * 32 :]
        fit = ((torch.tanh(X @ first / 8) @ second - y) ** 2).mean()
        return fit + (theta.exp() * w * w).sum()

    size = 64 * 32 + 32
    return loss, 0.1 * randn(size), torch.full((size,), -3.0, dtype=torch.float64)


def measure(meta_gradient: Callable[[], Tensor]) -> dict[str, Any]:
    """Return peak bytes of a meta-gradient, and the median of five times after that first call."""
    with Dispatched() as counter:
        gradient = meta_gradient()
    assert bool(gradient.isfinite().all())
    taken = []
    for _ in range(5):
        start = time.process_time()
        meta_gradient()
        taken.append(time.process_time() - start)
    return {"peak_bytes": counter.peak, "seconds": statistics.median(taken), "min": min(taken)}


COUNT = {"products": 0}


class Multiplications(TorchDispatchMode):
    """Counts multiplications with a matrix from outside of the function that does them.

    A count inside the function would be reset when it is evaluated again for a derivative.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mv.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


class Counted(torch.autograd.Function):
    """A x, which counts products in the backward direction."""

    @staticmethod
    def forward(A: Tensor, x: Tensor) -> Tensor:
        return A @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        COUNT["products"] += 1
        (A,) = ctx.saved_tensors
        return None, A.T @ cotangent


def count_products(
    custom_root: Callable[..., Any], solve: Callable[..., Any], size: int = 60
) -> dict[str, Any]:
    """Return how often a backward pass multiplies with a Hessian, and its error."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    A = root @ root.T / size + torch.eye(size, dtype=torch.float64)
    b = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    solution = torch.linalg.solve(A, b.detach())

    def optimality(x: Tensor, b: Tensor) -> Tensor:
        return Counted.apply(A, x) - b

    solver = custom_root(optimality, argnums=1, solve=solve)(lambda x, b: solution.clone())
    x = solver(torch.zeros_like(solution), b)
    COUNT.update(products=0)
    with Multiplications() as all_:
        x.sum().backward()
    truth = torch.linalg.solve(A, torch.ones_like(solution))
    error = float((b.grad - truth).norm() / truth.norm())
    products = COUNT["products"]
    return {"evaluations": all_.count - products, "products": products, "error": error}
