# SPDX-License-Identifier: Apache-2.0
"""This torchopt, one problem after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.torchopt.implicit.rivals.ours import DISTRIBUTIONS, library, ridge
from benchmarks.torchopt.implicit.rivals.torch_counters import tensors

__all__ = ["DISTRIBUTIONS", "library", "small_ridge"]


def small_ridge(problem: Any) -> Any:
    """Solve and differentiate in a Python loop, by autograd."""
    data = tensors(problem)
    start = torch.zeros(5, dtype=torch.float64)

    def run() -> Any:
        found = []
        for theta, X, y, v in zip(data["theta"], data["X"], data["y"], data["v"]):
            variable = theta.clone().requires_grad_()
            w = ridge(start, variable, X, y)
            found.append(torch.autograd.grad(w, variable, v)[0].item())
        return np.array(found)

    return run
