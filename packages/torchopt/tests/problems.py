# SPDX-License-Identifier: Apache-2.0
"""Problems with solutions in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class MomentumQuadratic:
    """Momentum SGD on h/2 x^2 - c x.

    With t' = m t + h x - c and x' = x - lr t', the state (x, t, 1) is multiplied by one matrix in
    each step, so the T-th iterate is a power of it, differentiable in every number.
    """

    x0: Tensor
    lr: Tensor
    momentum: Tensor
    h: Tensor
    c: Tensor

    def matrix(self) -> Tensor:
        """Return the matrix of one step on (x, t, 1)."""
        one, zero = torch.ones_like(self.h), torch.zeros_like(self.h)
        trace_row = torch.stack([self.h, self.momentum, -self.c])
        x_row = torch.stack([one, zero, zero]) - self.lr * trace_row
        return torch.stack([x_row, trace_row, torch.stack([zero, zero, one])])

    def iterate(self, steps: int) -> Tensor:
        """Return x after `steps` steps from (x0, 0)."""
        start = torch.stack([self.x0, torch.zeros_like(self.x0), torch.ones_like(self.x0)])
        return (torch.linalg.matrix_power(self.matrix(), steps) @ start)[0]


def constant_gradient_adam(
    theta: Tensor, g: Tensor, lr: Tensor, eps: float | Tensor, steps: int
) -> Tensor:
    """Return Adam's iterate for a gradient that is always g: theta - steps * lr * g / (|g| +
    eps)."""
    return theta - steps * lr * g / (g.abs() + eps)


def zoo(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return parameters of several shapes, including a 0-dim and an empty one."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return {"b": randn(3), "empty": randn(0, 2), "s": randn(), "w": randn(4, 3)}


def loss_of(params: dict[str, Tensor], seed: int = 1) -> Tensor:
    """Return a smooth loss of the parameters of `zoo` that depends on all but the empty one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(params["w"].dtype)
    out = torch.tanh(x @ params["w"] + params["b"]) * params["s"]
    return (out**2).mean() + (out - 0.3).abs().pow(3).mean() + params["empty"].sum()


class Cube(torch.autograd.Function):
    """x³ without a second derivative, as if its backward pass used NumPy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * cotangent
