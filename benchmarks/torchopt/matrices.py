# SPDX-License-Identifier: Apache-2.0
"""Steps of the optimizers of matrices in plain torch, one matrix after the other.

torchopt computed them like this before it stacked matrices of equal shape.
"""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

from benchmarks.harness.case import UnsupportedError

__all__ = ["STEPS", "one_by_one"]

LR, MOMENTUM, EPS = 1e-3, 0.95, 1e-4
A, B, C = 3.4445, -4.7750, 2.0315


def one_by_one(params: list[Tensor], name: str) -> Callable[[], None]:
    """Return a step in place of an optimizer of `STEPS`.

    Raises:
        UnsupportedError: there is no loop for this optimizer.
    """
    if name not in STEPS:
        raise UnsupportedError(f"no loop is written out for {name}")
    return STEPS[name](params)


def _muon(params: list[Tensor]) -> Callable[[], None]:
    traces = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, trace in zip(params, traces):
            assert p.grad is not None
            small = (1 - MOMENTUM) * p.grad
            trace.mul_(MOMENTUM).add_(small)
            u = small + MOMENTUM * trace
            rows, columns = u.shape
            x = u if rows <= columns else u.mT
            x = x / x.square().sum().sqrt().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = A * x + (B * gram + C * gram @ gram) @ x
            u = (x if rows <= columns else x.mT) * math.sqrt(max(1.0, rows / columns))
            p.sub_(LR * u)

    return step


def _shampoo(params: list[Tensor]) -> Callable[[], None]:
    kept = [[EPS * torch.eye(n, dtype=torch.float64) for n in p.shape] for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, sides in zip(params, kept):
            assert p.grad is not None
            x = p.grad.double()
            sides[0] += x @ x.mT
            sides[1] += x.mT @ x
            left, right = map(_newton_root, sides)
            p.sub_(LR * (left @ x @ right).to(p.dtype))

    return step


def _newton_root(a: Tensor) -> Tensor:
    """Return a ** -1/4 by fifty coupled Newton steps."""
    identity = torch.eye(len(a), dtype=a.dtype)
    a = a + 2.2e-16 * len(a) * a.trace() * identity
    z = 5 / (2 * a.square().sum().sqrt())
    m, x = a * z, identity * z**0.25
    for _ in range(50):
        t = (5 * identity - m) / 4
        x = x @ t
        m = torch.linalg.matrix_power(t, 4) @ m
    return x


STEPS: dict[str, Callable[[list[Tensor]], Callable[[], None]]] = {
    "muon": _muon,
    "shampoo": _shampoo,
}
"""From the name of an optimizer to a function that makes its step."""
