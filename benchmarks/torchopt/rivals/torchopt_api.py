# SPDX-License-Identifier: Apache-2.0
"""torchopt: this one, or the published one, which has the same names."""

from __future__ import annotations

import functools
import importlib
import time
import timeit
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
    "muon": {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.0},
    "shampoo": {"lr": 1e-3, "eps": 1e-4},
}
CLASSES = {
    "sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "adamax": "AdaMax",
    "radam": "RAdam", "rmsprop": "RMSProp", "adagrad": "AdaGrad", "adadelta": "AdaDelta",
    "amsgrad": "AMSGrad", "nadam": "NAdam", "asgd": "ASGD", "rprop": "Rprop",
    "adafactor": "Adafactor", "muon": "Muon", "shampoo": "Shampoo",
}  # fmt: skip


def quicker(make: Callable[..., Callable[[], Any]]) -> dict[str, Any]:
    """Return the faster options of a run: those of the accelerated Adam, or none.

    Args:
        make: Maps options to the run, on new tensors.
    """
    times = []
    for options in ({}, {"use_accelerated_op": True}):
        run = make(**options)
        taken = timeit.repeat(run, time.process_time, number=1, repeat=5)  # type: ignore[arg-type]
        times.append(min(taken[1:]))
    return {"use_accelerated_op": True} if times[1] < times[0] else {}


def in_place(params: list[Tensor], name: str) -> Callable[[], Any]:
    """Return the step of a classic optimizer."""
    cls = getattr(library.optim, CLASSES[name], None)
    if cls is None:
        raise UnsupportedError(f"it has no {name}")
    settings = SETTINGS.get(name, {"lr": 1e-3})
    if name in ("adam", "adamw"):

        def trial(**options: Any) -> Callable[[], Any]:
            copies = [p.detach().clone().requires_grad_() for p in params]
            for x, p in zip(copies, params):
                x.grad = None if p.grad is None else p.grad.clone()  # 0.7.3 writes into it
            step: Callable[[], Any] = cls(copies, **settings, **options).step
            return step

        settings = {**settings, **quicker(trial)}
    step: Callable[[], Any] = cls(params, **settings).step
    return step


def functional(params: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Return Adam's update and its application."""
    return _functional(params, grads, **quicker(functools.partial(_functional, params, grads)))


def _functional(
    params: list[Tensor], grads: list[Tensor], **options: Any
) -> Callable[[], list[Tensor]]:
    optimizer = library.adam(problems.LR, **options)
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

    def make(**options: Any) -> Callable[[], Any]:
        step = _functional(params, leaves, **options)
        return lambda: torch.autograd.grad(step(), leaves, ones)

    return make(**quicker(make))


def meta(model: str, steps: int) -> Callable[[], list[Tensor]]:
    """Return the meta-gradient through steps of MetaAdam."""

    def make(**options: Any) -> Callable[[], list[Tensor]]:
        return problems.module_meta_gradient(
            model, steps, lambda module: library.MetaAdam(module, lr=problems.LR, **options)
        )

    return make(**quicker(make))


def task(operation: str, network: str) -> Callable[[], list[Tensor]]:
    """Return a whole task with a meta-optimizer."""
    module, loss = tasks.make_network(network)
    cls, settings = tasks.OPTIMIZERS[operation]
    optimizer, start = getattr(library, f"Meta{cls}"), list(module.parameters())

    def make(**options: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            snapshot = library.extract_state_dict(module)
            inner = optimizer(module, **settings, **options)
            for _ in range(tasks.STEPS):
                inner.step(loss(module))
            found = list(torch.autograd.grad(loss(module), start))
            library.recover_state_dict(module, snapshot)
            return found

        return run

    return make(**(quicker(make) if cls == "Adam" else {}))
