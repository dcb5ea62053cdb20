# SPDX-License-Identifier: Apache-2.0
"""The usual code by hand: the noise of a leaf in one tensor, and one `torch.func.vmap`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.torchopt.zero_order.rivals.torch_mlp import flat, loss, tensors

DISTRIBUTIONS = ("torch",)
library = torch


def estimator(case: Any, weights: list[Any], x: Any, y: Any) -> Any:
    """Return six lines that hold N D numbers of noise."""
    params = tensors(weights)
    x, y = tensors([x, y])
    n, sigma = case.samples, case.sigma
    batched = torch.func.vmap(loss, in_dims=(0, None, None))

    @torch.no_grad()
    def run() -> Any:
        noise = [torch.randn(n, *p.shape) for p in params]
        plus = batched([p + sigma * z for p, z in zip(params, noise)], x, y)
        minus = batched([p - sigma * z for p, z in zip(params, noise)], x, y)
        c = (plus - minus) / (2 * sigma * n)
        return flat([torch.tensordot(c, z, 1) for z in noise])

    return run
