# SPDX-License-Identifier: Apache-2.0
"""A loop over tensors in plain torch, as in higher and in inner loops written by hand."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from benchmarks.torchopt import matrices, problems

DISTRIBUTIONS = ("torch",)
library: Any = torch

meta = problems.plain_meta_gradient
in_place = matrices.one_by_one


def functional(params: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Return Adam's next parameters."""
    return problems.plain_second_step(params, grads)


def differentiable(params: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Return the same with a graph, and the gradient of all new parameters."""
    leaves = [g.clone().requires_grad_() for g in grads]
    ones = [torch.ones_like(p) for p in params]
    step = functional(params, leaves)
    return lambda: torch.autograd.grad(step(), leaves, ones)
