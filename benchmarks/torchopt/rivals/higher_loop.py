# SPDX-License-Identifier: Apache-2.0
"""higher: a functional copy of the network, and a differentiable copy of an optimizer of torch."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Callable

import torch
from torch import Tensor

from benchmarks.torchopt import tasks

warnings.simplefilter("ignore")
DISTRIBUTIONS = ("higher", "torch")
library: Any = importlib.import_module("higher")


def task(operation: str, network: str) -> Callable[[], list[Tensor]]:
    """Return a whole task, as in its documentation."""
    module, loss = tasks.make_network(network)
    cls, settings = tasks.OPTIMIZERS[operation]

    def run() -> list[Tensor]:
        optimizer = getattr(torch.optim, cls)(module.parameters(), **settings)
        with library.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (net, inner):
            for _ in range(tasks.STEPS):
                inner.step(loss(net))
            return list(torch.autograd.grad(loss(net), list(net.parameters(time=0))))

    return run
