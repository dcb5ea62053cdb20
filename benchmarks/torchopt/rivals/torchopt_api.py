# SPDX-License-Identifier: Apache-2.0
"""torchopt: this one, or the published one, which has the same names."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Callable

import torch
from torch import Tensor

from benchmarks.harness.case import UnsupportedError
from benchmarks.torchopt import problems, tasks

warnings.simplefilter("ignore")
DISTRIBUTIONS = ("torchopt", "optree", "torch")
library: Any = importlib.import_module("torchopt")

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3},
    "momentum": {"lr": 1e-3, "momentum": 0.9},
    "rmsprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
}
CLASSES = {
    "sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "adamax": "AdaMax",
    "radam": "RAdam", "rmsprop": "RMSProp", "adagrad": "AdaGrad", "adadelta": "AdaDelta",
    "amsgrad": "AMSGrad", "nadam": "NAdam", "asgd": "ASGD", "rprop": "Rprop",
    "adafactor": "Adafactor",
}  # fmt: skip


def in_place(params: list[Tensor], name: str) -> Callable[[], Any]:
    """Return the step of a classic optimizer."""
    cls = getattr(library.optim, CLASSES[name], None)
    if cls is None:
        raise UnsupportedError(f"it has no {name}")
    step: Callable[[], Any] = cls(params, **SETTINGS.get(name, {"lr": 1e-3})).step
    return step


def functional(params: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Return Adam's update and its application."""
    optimizer = library.adam(problems.LR)
    first = problems.first_gradients([g.detach() for g in grads])
    state = optimizer.update(first, optimizer.init(params), params=params, inplace=False)[1]

    def run() -> Any:
        updates, _ = optimizer.update(grads, state, params=params, inplace=False)
        return library.apply_updates(params, updates, inplace=False)

    return run


def differentiable(params: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Return the same with a graph, and the gradient of all new parameters."""
    leaves = [g.clone().requires_grad_() for g in grads]
    ones = [torch.ones_like(p) for p in params]
    step = functional(params, leaves)
    return lambda: torch.autograd.grad(step(), leaves, ones)


def meta(model: str, steps: int) -> Callable[[], list[Tensor]]:
    """Return the meta-gradient through steps of MetaAdam."""
    return problems.module_meta_gradient(
        model, steps, lambda module: library.MetaAdam(module, lr=problems.LR)
    )


def task(operation: str, network: str) -> Callable[[], list[Tensor]]:
    """Return a whole task with a meta-optimizer."""
    module, loss = tasks.make_network(network)
    cls, settings = tasks.OPTIMIZERS[operation]
    make, start = getattr(library, f"Meta{cls}"), list(module.parameters())

    def run() -> list[Tensor]:
        snapshot = library.extract_state_dict(module)
        inner = make(module, **settings)
        for _ in range(tasks.STEPS):
            inner.step(loss(module))
        found = list(torch.autograd.grad(loss(module), start))
        library.recover_state_dict(module, snapshot)
        return found

    return run
