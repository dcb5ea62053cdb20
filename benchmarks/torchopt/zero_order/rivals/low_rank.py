# SPDX-License-Identifier: Apache-2.0
"""Our low-rank perturbations, rank 1."""

from __future__ import annotations

from typing import Any

import torch

import torchopt
from benchmarks.torchopt.zero_order.rivals.torch_mlp import flat, loss, tensors
from torchopt.diff.zero_order.low_rank import LowRank

DISTRIBUTIONS = ("torchopt", "torch")
library = torchopt


class Network(torch.nn.Module):
    """Holds the weights of the network."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)


def estimator(case: Any, weights: list[Any], x: Any, y: Any) -> Any:
    """Return an estimate without error bars, which the rivals do not have."""
    net = Network(tensors(weights))
    x, y = tensors([x, y])
    chunk = max(1, 2**22 // (x.numel() + max(len(w) for w in weights) * len(x)))
    engine = LowRank(1, "antithetic", num_samples=case.samples, sigma=case.sigma, chunk_size=chunk)

    def run() -> Any:
        result = engine.estimate(net, lambda m: loss(list(m.weights), x, y), with_error=False)
        return flat(list(result.gradient.values()))

    return run
