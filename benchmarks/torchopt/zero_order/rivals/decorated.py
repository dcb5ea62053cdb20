# SPDX-License-Identifier: Apache-2.0
"""`torchopt.diff.zero_order` as a decorator: ours and the published one, by the same call."""

from __future__ import annotations

from typing import Any

import torch

import torchopt
from benchmarks.torchopt.zero_order.rivals.torch_mlp import flat, loss, tensors
from torchopt.diff import zero_order

DISTRIBUTIONS = ("torchopt", "torch")
library = torchopt


def estimator(case: Any, weights: list[Any], x: Any, y: Any) -> Any:
    """Return backward through the decorated loss."""
    params = [p.requires_grad_() for p in tensors(weights)]
    x, y = tensors([x, y])
    normal = torch.distributions.Normal(0.0, 1.0)
    decorated = zero_order(normal, "antithetic", 0, case.samples, case.sigma)(loss)

    def run() -> Any:
        for p in params:
            p.grad = None
        decorated(params, x, y).backward()
        return flat([p.grad for p in params])  # type: ignore[misc]  # backward has set it

    return run


def toy(fn: Any, point: Any, method: str, samples: int, sigma: float, seed: int) -> tuple[Any, int]:
    """Return the estimate of a published method and its number of evaluations."""
    if method not in ("naive", "forward", "antithetic"):
        raise NotImplementedError(f"no method {method}")
    torch.manual_seed(seed)
    x = point.clone().requires_grad_()
    decorated = zero_order(torch.distributions.Normal(0.0, 1.0), method, 0, samples, sigma)(fn)
    decorated(x).backward()
    return x.grad, samples * (2 if method == "antithetic" else 1) + 1
