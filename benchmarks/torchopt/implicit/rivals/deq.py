# SPDX-License-Identifier: Apache-2.0
"""torchdeq, for equilibrium layers."""

from __future__ import annotations

from typing import Any

import torch
import torchdeq
from torchdeq import get_deq

DISTRIBUTIONS = ("torchdeq", "torch")
library: Any = torchdeq


def anderson(problem: Any) -> Any:
    """Solve and differentiate by Anderson's mixing."""
    data = {name: torch.from_numpy(x) for name, x in problem.items()}
    deq = get_deq(
        ift=True,
        f_solver="anderson",
        b_solver="anderson",
        f_max_iter=1000,
        b_max_iter=1000,
        f_tol=1e-9,
        b_tol=1e-8,
    )

    def run() -> Any:
        x = data["x"].clone().requires_grad_()
        z, _ = deq(lambda z: torch.tanh(z @ data["W"].T + x), torch.zeros_like(data["x"]))
        return torch.autograd.grad(z[-1], x, data["v"])[0].numpy()

    return run
